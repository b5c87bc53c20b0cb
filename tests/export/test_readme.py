"""The code in the README of an export: valid before it is filled in, and runnable after."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import torch
from jinja2 import UndefinedError
from safetensors.torch import save_file

from softprompt_fast.export.common import TEMPLATES, readme

# Names that need quotes, of both kinds, in Python and in a shell.
PATH, MODEL = 'my exports/it\'s "one"', "models/it's {{ mine }}"
VLLM = {
    "path": PATH,
    "model_name": MODEL,
    "dtype": "bfloat16",
    "requests": ["completion-1.json", "chat-1.json"],
    "system_file": "system_message.json",
    "without_chat": [],
    "chat_options": {},
    "date": None,
}


def code(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.py")), ids=lambda path: path.stem)
def test_a_template_in_python_is_python(path):
    """So ruff reads it."""
    compile(path.read_text(), path.name, "exec")


def test_there_is_a_readme_for_each_target():
    assert {path.stem for path in TEMPLATES.glob("*.md")} == {"peft", "safetensors", "vllm"}


@pytest.mark.parametrize("placement", ["system", "prefix"])
def test_the_lines_for_safetensors_read_the_file(tmp_path, placement):
    path = tmp_path / "it's one.safetensors"
    expected = torch.randn(4, 8)
    save_file({"prompt_embeddings": expected}, path, {"placement": placement})
    names: dict = {}
    exec(code(readme("safetensors", path=str(path), placement=placement), "python"), names)
    assert torch.equal(names["prompt"], expected)
    assert names["facts"] == {"placement": placement}


def test_the_lines_for_vllm_name_its_files_in_any_shell():
    lines = code(readme("vllm", **VLLM), "sh")
    subprocess.run(["sh", "-n"], input=lines, text=True, check=True)
    serve, completion, chat = map(shlex.split, lines.splitlines())
    assert serve == ["vllm", "serve", MODEL, "--enable-prompt-embeds", "--dtype", "bfloat16"]
    assert completion[1] == "localhost:8000/v1/completions"
    assert chat[1] == "localhost:8000/v1/chat/completions"
    assert completion[-1] == f"@{PATH}/completion-1.json"
    assert chat[-1] == f"@{PATH}/chat-1.json"


def test_a_fact_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'dtype' is undefined"):
        readme("vllm", **{name: value for name, value in VLLM.items() if name != "dtype"})
