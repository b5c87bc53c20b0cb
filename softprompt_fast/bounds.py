"""Numbers that an option may have; what is outside is refused before a model loads."""

from __future__ import annotations

import math
from typing import Any


def check_at_least(options: Any, least: float, *names: str) -> None:
    """Raises ValueError naming the option that is below ``least``, infinite or not a number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= {least}: got {value}.")
