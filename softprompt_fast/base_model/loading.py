"""Load a frozen language model."""

from __future__ import annotations

import logging
import os
import pickle
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..data.chat_template import bind_template
from ..data.queries import has_chat_template
from ..utils.console import progress
from ..utils.errors import is_out_of_memory
from .fingerprint import quantization
from .fsdp import shard_base

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What transformers raises, according to which file of a model is damaged and how.
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    *(SafetensorError, StrictDataclassError, pickle.UnpicklingError),
)


def load_model(
    name_or_path,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    shard: bool = False,
    chat_template_kwargs: dict[str, Any] | str | None = None,
    chat_template_date: str | None = None,
):
    """Returns ``(model, tokenizer)``: parameters frozen, in eval mode, on ``device``.

    name_or_path: a directory in Hugging Face format, or the id of a model on the Hub.
    dtype: "auto" keeps the type that the checkpoint was saved in, or takes float32 (which holds the
    same numbers) where the device computes in it natively and in the other not.
    device: None takes the first CUDA device, or else the CPU.
    shard: each of the processes, which all call this, keeps its part of the layers, see
    ``shard_base``.
    chat_template_kwargs, chat_template_date: variables of the chat template, and the day that it
    prints if it prints one, by default today; the tokenizer keeps them, see ``bind_template``.

    Raises FileNotFoundError, naming the path or the model, if it is not there (without a network
    this takes seconds: only the local cache is read then), and ValueError if what is there is not
    a complete causal language model with a tokenizer, or needs remote code.
    """
    check_dtype(dtype)
    name = os.path.expanduser(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": not _may_ask_hub(name),
    }
    try:
        config = AutoConfig.from_pretrained(name, **options)
        _check_is_causal(name, config)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        method = quantization(config)
        if method is not None:
            options |= _options_of_quantised(name, method, device, shard=shard)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their sizes
            **options,
        )
    except DAMAGED as error:
        if is_out_of_memory(error):
            raise
        raise _explain(name, error, options["local_files_only"]) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model {name!r} is incomplete: {len(missing)} weights are not in its files "
            f"(the first is {missing[0]!r}). Download it again, or use another model."
        )
    for key, saved, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"model {name!r} does not fit its config.json: {key} has shape {tuple(saved)} in its "
            f"files and {tuple(expected)} by the config."
        )
    # Tokens that were added to a vocabulary may have no embedding, if text never brings them up.
    embeddings = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > embeddings:
        raise ValueError(
            f"the tokenizer of {name!r} is not that of its model: it has {tokenizer.vocab_size} "
            f"tokens, and the model embeds {embeddings}."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name!r} has neither a pad token nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    bind_template(tokenizer, chat_template_kwargs, chat_template_date)
    if not has_chat_template(tokenizer):
        progress(f"Note: {name} has no chat template: queries are read as plain text")
    model = model.requires_grad_(False).eval()
    if method is None:
        if dtype == "auto" and not is_native(model.dtype, device):
            model = model.float()
        model = shard_base(model, device) if shard else model.to(device)
    else:
        _check_quantised(name, method, model, dtype)
    return model, tokenizer


def _options_of_quantised(
    name: str, method: str, device: torch.device, *, shard: bool
) -> dict[str, Any]:
    """How it is loaded; raises ValueError if its layers are to be split."""
    if shard:
        raise ValueError(
            f"model {name!r} is quantised ({method}), and its layers cannot be split over "
            "processes: leave out --shard_base"
        )
    # It says at each product in 8 bits that it rounds to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"device_map": {"": device}}  # later it cannot be moved


def _check_quantised(name: str, method: str, model: Any, dtype: str) -> None:
    """Raises ValueError if transformers does not know the method, or did not heed ``dtype``."""
    if quantization(model.config) is not None and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"model {name!r} is quantised in a way that is not known here: {method!r}")
    if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ValueError(
            f"model {name!r} was quantised ({method}) to compute in {model.dtype}, and dtype "
            f"cannot change that: got {dtype}. Leave it out, or quantise the model anew."
        )


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in ``dtype`` are fast on ``device``, and not merely possible.

    A CPU without the instructions converts each operand, and is slower than in float32.
    """
    if dtype == torch.bfloat16 and device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.bfloat16 and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch's products in float16 use no CPU's instructions but those of Intel's AMX-FP16.
    return dtype != torch.float16 or device.type != "cpu" or torch.cpu._is_amx_fp16_supported()


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def _may_ask_hub(name: str) -> bool:
    """Whether the Hub is worth asking; raises if ``name`` can only be a path and is not there."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model directory {name!r} has no config.json: it is not a model in Hugging Face "
                "format. Give the directory that save_pretrained wrote."
            )
        return False
    if path.exists():
        raise FileNotFoundError(f"model {name!r} is a file; give the directory that it is in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise FileNotFoundError(f"model directory {name!r} does not exist")
    return not hub_constants.HF_HUB_OFFLINE and _hub_answers()


def _hub_answers() -> bool:
    """One short question. Without it, transformers retries each file for half a minute."""
    request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered; what it said is for huggingface_hub to judge
    except urllib.error.URLError as error:
        # huggingface_hub may know certificates that urllib does not.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def _check_is_causal(name: str, config) -> None:
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in mapping and not getattr(config, "auto_map", None):
        raise ValueError(f"its type {config.model_type!r} is not a causal language model")


def _explain(name: str, error: Exception, only_local: bool) -> Exception:
    """The error that a user should see in place of the one that transformers raised."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return ValueError(
            f"model {name!r} brings Python code of its own, which is not run by default. "
            "If you trust its authors, pass --trust_remote_code (trust_remote_code=True)."
        )
    if isinstance(error, OSError) and not Path(name).is_dir():
        if not only_local:
            return FileNotFoundError(f"cannot get model {name!r} from the Hub: {text}")
        why = "HF_HUB_OFFLINE is set" if hub_constants.HF_HUB_OFFLINE else "the Hub does not answer"
        return FileNotFoundError(
            f"model {name!r} was not found: there is no directory of that name, the cache "
            f"{hub_constants.HF_HUB_CACHE} does not hold it, and {why}."
        )
    if isinstance(error, pickle.UnpicklingError):
        text = "a file of its weights is damaged, or holds code; use a model saved as safetensors"
    return ValueError(f"cannot load model {name!r}: {text}")
