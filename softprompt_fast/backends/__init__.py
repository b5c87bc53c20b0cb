"""Where a loss is computed: one engine a backend, behind one ``Problem``."""

from .registry import ENGINES, available, build_info, interpreted, resolve

__all__ = ["ENGINES", "available", "build_info", "interpreted", "resolve"]
