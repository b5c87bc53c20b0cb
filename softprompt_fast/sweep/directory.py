"""The output directory of a sweep.

kl_P16/ ...      a run, with evaluation.json
teacher_cache/   the teacher's work, unless it is kept elsewhere
sweep.json       the compression curve, as far as it is known
sweep.png        the same as a picture, at the end
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_bytes
from ..utils.owned_directory import OwnedDirectory
from .curve import compression_curve
from .plot import curve_picture


class SweepDirectory(OwnedDirectory):
    what = "a sweep of softprompt-fast"
    use = "sweeps"
    state_file = "sweep.json"
    files = ("sweep.png",)
    early = r"sweep\.png|\.sweep\.png\..+\.tmp|teacher_cache|.+_P\d+"
    lock_file = ".sweep.lock"  # each run in it has its own

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.curve, self.picture, self.teacher_cache = (
            path / name for name in (self.state_file, *self.files, "teacher_cache")
        )

    def write_curve(self, measured: Sequence[Path]) -> dict[str, Any]:
        """measured: the directories of the runs that are."""
        curve = compression_curve(measured)
        self.write_state(curve)
        return curve

    def write_picture(self, curve: dict[str, Any]) -> None:
        write_bytes(self.picture, curve_picture(curve))
