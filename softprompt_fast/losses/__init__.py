"""The losses over a frozen head: drop-in functions and modules, the sketch, the naive reference."""

from . import reference
from .functional import linear_distill, linear_kl, linear_nll
from .modules import LinearKLLoss, LinearNLLLoss, linear_cross_entropy
from .options import LossOptions
from .sketch import TeacherSketch, sketch_teacher

__all__ = [
    "LinearKLLoss",
    "LinearNLLLoss",
    "LossOptions",
    "TeacherSketch",
    "linear_cross_entropy",
    "linear_distill",
    "linear_kl",
    "linear_nll",
    "reference",
    "sketch_teacher",
]
