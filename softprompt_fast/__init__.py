"""Soft prompts that replace long contexts, trained with losses that never build the logits."""

from . import backends, reference
from .losses import LossOptions, linear_distill, linear_kl, linear_nll
from .modules import LinearKLLoss, LinearNLLLoss, linear_cross_entropy

__version__ = "0.1.0"

__all__ = [
    "LinearKLLoss",
    "LinearNLLLoss",
    "LossOptions",
    "backends",
    "linear_cross_entropy",
    "linear_distill",
    "linear_kl",
    "linear_nll",
    "reference",
]
