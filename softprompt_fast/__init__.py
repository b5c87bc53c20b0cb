"""Soft prompts that replace long contexts, trained with losses that never build the logits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import backends
from .losses import reference
from .losses.functional import LossOptions, linear_distill, linear_kl, linear_nll
from .losses.modules import LinearKLLoss, LinearNLLLoss, linear_cross_entropy
from .losses.sketch import TeacherSketch, sketch_teacher

if TYPE_CHECKING:
    from .student.soft_prompt import SoftPrompt, SoftPromptConfig
    from .training.arguments import SoftPromptTrainingArguments
    from .training.trainer import SoftPromptTrainer

__version__ = "0.1.0"

__all__ = [
    "LinearKLLoss",
    "LinearNLLLoss",
    "LossOptions",
    "SoftPrompt",
    "SoftPromptConfig",
    "SoftPromptTrainer",
    "SoftPromptTrainingArguments",
    "TeacherSketch",
    "backends",
    "linear_cross_entropy",
    "linear_distill",
    "linear_kl",
    "linear_nll",
    "reference",
    "sketch_teacher",
]

# Who imports the losses alone does not wait for transformers.
_LAZY = {
    "SoftPrompt": "soft_prompt",
    "SoftPromptConfig": "soft_prompt",
    "SoftPromptTrainer": "trainer",
    "SoftPromptTrainingArguments": "arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
