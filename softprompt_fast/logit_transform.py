"""From the raw product W h + b to the logit that the softmax sees, and its derivative."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """``z = softcap * tanh(logit_scale * (W h + b) / softcap) / temperature``; no cap where None.

    ``softcap`` is Gemma 2's final_logit_softcapping, ``logit_scale`` is Cohere's factor (Granite
    divides by logits_scaling), ``temperature`` flattens the softmax of student and teacher alike.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * (z / self.softcap).tanh()
        return z / self.temperature

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / draw, from the finished logit ``z``."""
        linear = self.logit_scale / self.temperature
        if self.softcap is None:
            return linear
        return linear * (1 - (z * (self.temperature / self.softcap)) ** 2)
