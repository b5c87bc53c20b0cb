"""A long text in chunks: the chunk that a query asks about, and the excerpt around it.

The chunks make up the text; excerpts are of as many of them as a reader can take, and overlap::

    chunks      | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |
    excerpts    |------ 0 ------|
                            |------ 1 ------|
                                    |------ 2 ----------|
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import bm25s

from ..utils.text import words
from .queries import text_ids

Count = Callable[[str], int]
"""The number of tokens of a text."""

# Where a text may be cut, the best places first: after a paragraph, a line, a sentence.
BREAKS = tuple(map(re.compile, (r"\n\s*\n\s*", r"\n\s*", r"(?<=[.!?;])\s+|(?<=[。！？；])\s*")))
SPACE = re.compile(r"\s+")
# Tokens of a chunk, where nothing else is asked for.
CHUNK_TOKENS = 256
# Of an excerpt, that the next one has too: what is told about at its end is read whole there.
OVERLAP = 1 / 8


class ChunkedText:
    """A text, and its chunks of at most so many tokens."""

    def __init__(self, text: str, count: Count, most: int) -> None:
        self.text = text
        self.chunks = cut_into_chunks(text, most, count)
        self._starts = list(accumulate(map(len, self.chunks), initial=0))
        self._count = count

    @classmethod
    def of_tokens(cls, tokenizer: Any, text: str, most: int = CHUNK_TOKENS) -> ChunkedText:
        return cls(text, lambda part: len(text_ids(tokenizer, part)), most)

    def asked_about(self, query: str) -> int:
        """The chunk that comes first by BM25 (Robertson et al., 1994), in Lucene's form, of the
        query's words; the first of all where it has none of them."""
        known = self._index.get_tokens_ids(words(query))
        return int(self._index.get_scores_from_ids(known).argmax())

    def retrieve(self, query: str) -> str:
        return self.chunks[self.asked_about(query)]

    def at(self, start: int, end: int) -> range:
        """The chunks that have the characters from ``start`` up to ``end``."""
        inner = self._starts[1:-1]
        return range(bisect_right(inner, start), bisect_left(inner, end) + 1)

    def span(self, chunk: int) -> tuple[int, int]:
        """The characters from which and up to which it goes."""
        return self._starts[chunk], self._starts[chunk + 1]

    def excerpts(self, most: int) -> list[range]:
        """Chunks that are read together, of at most ``most`` tokens: as few times as will do."""
        return overlapping([self._count(chunk) for chunk in self.chunks], most)

    def text_of(self, chunks: range) -> str:
        return self.text[self._starts[chunks.start] : self._starts[chunks.stop]]

    @cached_property
    def _index(self) -> bm25s.BM25:
        index = bm25s.BM25(method="lucene")
        # The empty word: bm25s makes no index of chunks without any.
        index.index([["", *words(chunk)] for chunk in self.chunks], show_progress=False)
        return index


def around(chunks: range, excerpts: Sequence[range]) -> range:
    """The excerpt that has most of the chunks, and has them most nearly in its middle."""

    def rank(excerpt: range) -> tuple[int, int]:
        shared = min(excerpt.stop, chunks.stop) - max(excerpt.start, chunks.start)
        return -shared, abs(excerpt.start + excerpt.stop - chunks.start - chunks.stop)

    return min(excerpts, key=rank)


def overlapping(lengths: Sequence[int], most: int) -> list[range]:
    """Runs of parts of such lengths, each as long as ``most`` allows.

    A run begins within ``OVERLAP`` of the end of the one before, the last one further back. A part
    that is longer than ``most`` is a run by itself.
    """
    ends = list(accumulate(lengths, initial=0))

    def length(first: int, last: int) -> int:
        return ends[last] - ends[first]

    runs: list[range] = []
    first = 0
    while True:
        last = first + 1
        while last < len(lengths) and length(first, last + 1) <= most:
            last += 1
        if last == len(lengths):
            while first > 0 and length(first - 1, last) <= most:
                first -= 1
            return [*runs, range(first, last)]
        runs.append(range(first, last))
        first = last
        while length(first - 1, last) <= OVERLAP * most and length(first - 1, last + 1) <= most:
            first -= 1


def cut_into_chunks(text: str, most: int, count: Count) -> list[str]:
    """Parts of at most ``most`` tokens, of about the same length, that make up ``text``.

    No word is cut, unless it is longer than a chunk itself. A character is never cut, however many
    tokens it takes.
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
