"""What the targets share: the README of an export, and embeddings in the dtype of the base.

Each target is a module with one function, which fills a directory and returns the text of its
README. Of the arguments that they share, ``at`` is the path where the directory will be found,
``base`` the name of the model there.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined
from torch import Tensor

from ..base_model.output_head import input_embedding
from ..student.model import SoftPromptModel

TEMPLATES = Path(__file__).parent / "templates"
# Stands for the question in the text that a README gives to a reader.
QUESTION = "{question}"


def readme(target: str, **facts: Any) -> str:
    """The template ``templates/TARGET.md`` with ``facts`` filled in.

    Its code in Python is a file beside it, ``templates/TARGET.py``. That is valid Python before
    anything is filled in, so that a linter reads it: blocks stand in comments, ``# {% if ... %}``.
    """
    environment = Environment(
        loader=FunctionLoader(_source),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["repr"] = repr
    environment.filters["quoted"] = shlex.quote
    return environment.get_template(f"{target}.md").render(facts)


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8").replace("# {%", "{%")


def embed(model: SoftPromptModel, ids: list[int]) -> Tensor:
    """[len(ids), D], in the dtype of the base."""
    device = model.prompt.embedding.device
    return input_embedding(model.base)(torch.tensor(ids, dtype=torch.long, device=device))


def dtype_name(model: SoftPromptModel) -> str:
    return str(model.base.dtype).removeprefix("torch.")
