"""Token ids as text, and text that may be long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# What a decoder writes for the bytes of a character that is not complete yet.
INCOMPLETE = "\ufffd"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of all, which the pieces make up.

    A character of several tokens is that of the last one; the others are empty.
    """
    texts = [""]
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        whole = end == len(ids) or not text.endswith(INCOMPLETE)
        texts.append(text if whole else texts[-1])
    return [after[len(before) :] for before, after in pairwise(texts)]


def shortened(text: str, characters: int) -> str:
    """The start of a long text, with how long it is."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]} … ({len(text):,} characters)"
