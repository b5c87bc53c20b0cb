"""The options that all commands with a teacher share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..base_model.held_prefix import PrefixDevice, PrefixDtype


@dataclass(kw_only=True)
class PrefixOptions:
    """How the teacher holds the keys and values of the context."""

    prefix_dtype: PrefixDtype = field(
        default="auto",
        metadata={
            "help": "Of the keys and values of the context that the teacher holds: auto (the "
            "model's) or int8; what 8 bits cost is printed."
        },
    )
    prefix_device: PrefixDevice = field(
        default="auto",
        metadata={
            "help": "Where they are held: auto (with the model) or cpu, from which one layer at a "
            "time is brought to the model."
        },
    )

    def of_prefix(self) -> dict[str, Any]:
        """Keyword arguments of ``Teacher``."""
        return {"prefix_dtype": self.prefix_dtype, "prefix_device": self.prefix_device}
