"""What an error means, and numbers that an option may not have."""

from __future__ import annotations

import math
from typing import Any


class OptionError(ValueError):
    """An option that is unknown, or cannot be used so; the command line exits with 2."""


def check_at_least(options: Any, least: float, *names: str) -> None:
    """Raises ValueError naming the option that is below ``least``, infinite or not a number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= {least}: got {value}.")


def is_out_of_memory(error: BaseException) -> bool:
    import torch  # not above: the command line is to answer to Ctrl-C while this loads

    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
        error
    )
