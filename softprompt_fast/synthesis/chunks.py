"""A long text in chunks that a model can write about, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

# Where a text may be cut, the best places first: after a paragraph, a line, a sentence.
BREAKS = tuple(map(re.compile, (r"\n\s*\n\s*", r"\n\s*", r"(?<=[.!?;])\s+|(?<=[。！？；])\s*")))
SPACE = re.compile(r"\s+")


def cut_into_chunks(text: str, most: int, count: Callable[[str], int]) -> list[str]:
    """Parts of at most ``most`` tokens, of about the same length, that make up ``text``.

    count: the number of tokens of a text. No word is cut, unless it is longer than a chunk itself.
    A character is never cut, however many tokens it takes.
    """
    num_tokens = count(text)
    if num_tokens <= most or len(text) == 1:
        return [text]
    parts = -(-num_tokens // most)
    cut = _best_cut(text, len(text) * (parts // 2) // parts, len(text) // (3 * parts))
    return [
        *cut_into_chunks(text[:cut], most, count),
        *cut_into_chunks(text[cut:], most, count),
    ]


def _best_cut(text: str, wanted: int, reach: int) -> int:
    """A place inside of ``text``: the best one within ``reach`` of ``wanted``, or else a space."""
    for pattern in BREAKS:
        cut = _nearest(pattern, text, wanted)
        if cut is not None and abs(cut - wanted) <= reach:
            return cut
    cut = _nearest(SPACE, text, wanted)
    return max(1, wanted) if cut is None else cut


def _nearest(pattern: re.Pattern[str], text: str, wanted: int) -> int | None:
    ends = (match.end() for match in pattern.finditer(text))
    return min(
        (end for end in ends if 0 < end < len(text)),
        key=lambda end: abs(end - wanted),
        default=None,
    )
