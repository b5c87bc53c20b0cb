"""Which texts a model is asked for, and which of them become queries.

A *cell* is one chunk of the context and one kind of query. Each *visit* asks for a batch of texts
about one cell: first about each in turn, then about the one that has the fewest queries. What the
model wrote is all there is to remember: the next visit, and the queries, follow from it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from .filters import Distinct, clean, fault, has_question, normalized, subjects
from .kinds import EXAMPLE_WORDS, KINDS, asking_for

Cell = tuple[int, str]

# Texts written for each query that a cell needs, and at the least: a few more cost next to nothing.
SPARE = 3
LEAST_TEXTS = 8
# A cell that gave nothing this many times in a row is left alone.
DRY = 3
# A cell gives no more than this many times its share as long as others have something.
MOST_OF_SHARE = 1.5
# Of all texts, for each query asked for.
MOST_TEXTS = 32


@dataclass(kw_only=True, frozen=True)
class Visit:
    """One batch of texts to be written."""

    number: int
    chunk: int
    kind: str
    wording: int
    openings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "openings": list(self.openings)}


@dataclass(kw_only=True, frozen=True)
class Written:
    """A query that was kept."""

    text: str
    kind: str
    chunk: int


class Plan:
    """Which texts to ask for, and which of them become queries."""

    def __init__(
        self,
        chunks: Sequence[str],
        kinds: Sequence[str],
        *,
        num_queries: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.chunks = chunks
        self.num_queries = num_queries
        self.batch_size = batch_size
        self.queries: list[Written] = []
        self.num_texts = 0
        self._dropped: Counter[str] = Counter()
        self._visits = 0
        self._kept: Counter[Cell] = Counter()
        self._texts: Counter[Cell] = Counter()
        self._in_chunk: Counter[int] = Counter()
        self._of_kind: Counter[str] = Counter()
        # In the order of a draw, so that few queries about a long context come from all over it.
        cells = [(chunk, kind) for chunk in range(len(chunks)) for kind in kinds]
        self._cells = sorted(cells, key=lambda cell: number_of(seed, "cell", *cell))
        self._dry: Counter[Cell] = Counter()
        self._spare: dict[Cell, list[str]] = {cell: [] for cell in cells}
        self._most = math.ceil(MOST_OF_SHARE * num_queries / len(cells))
        self._distinct = Distinct(query for kind in KINDS.values() for query in kind.examples)
        context = "".join(chunks)
        self._about = subjects(context)
        self._banned = frozenset(EXAMPLE_WORDS.split()).difference(normalized(context).split())

    def next_visit(self) -> Visit | None:
        """None where all queries are there, or where no more are to be had."""
        most = min(self.batch_size, MOST_TEXTS * self.num_queries - self.num_texts)
        need = self._need()
        if need < 1 or most < 1:
            return None
        unasked = [cell for cell in self._cells if not self._texts[cell]]
        chunk, kind = cell = min(unasked or self._open_cells(), key=self._rank)
        count = min(max(SPARE * need, LEAST_TEXTS), most)
        openings = KINDS[kind].openings
        return Visit(
            number=self._visits,
            chunk=chunk,
            kind=kind,
            wording=self._visits % len(KINDS[kind].instructions),
            openings=tuple(islice(cycle(openings), start := self._texts[cell], start + count)),
        )

    def take(self, visit: Visit, texts: Sequence[str]) -> None:
        """What the model wrote when asked for ``visit``, which is over with this."""
        cell = (visit.chunk, visit.kind)
        need = self._need()
        asked = asking_for(visit.kind, visit.wording, self.chunks[visit.chunk])
        read = "\n".join(message["content"] for message in asked)
        self._visits += 1
        self._texts[cell] += len(texts)
        self.num_texts += len(texts)
        before = self._kept[cell]
        for text in texts:
            query = clean(text)
            problem = self._fault(query, read, visit.kind)
            if problem is not None:
                self._dropped[problem] += 1
            elif self._kept[cell] - before < need:
                self._keep(cell, query)
            else:
                self._spare[cell].append(query)
        self._dry[cell] = 0 if self._kept[cell] > before else self._dry[cell] + 1
        if all(self._texts[cell] for cell in self._cells):
            self._use_spare()

    @property
    def dropped(self) -> Counter[str]:
        """How many texts became no query, by reason."""
        return self._dropped + Counter({"not needed": sum(map(len, self._spare.values()))})

    def _keep(self, cell: Cell, query: str) -> None:
        if not self._distinct.add(query):
            self._dropped["duplicate"] += 1
            return
        chunk, kind = cell
        self.queries.append(Written(text=query, kind=kind, chunk=chunk))
        self._kept[cell] += 1
        self._in_chunk[chunk] += 1
        self._of_kind[kind] += 1

    def _use_spare(self) -> None:
        """Where one cell gave too little, others may have given more: cheaper than to ask again."""
        while len(self.queries) < self.num_queries:
            cells = [c for c in self._cells if self._spare[c] and self._kept[c] < self._most]
            if not cells:
                return
            cell = min(cells, key=self._rank)
            self._keep(cell, self._spare[cell].pop(0))

    def _fault(self, query: str, read: str, kind: str) -> str | None:
        problem = fault(query, read, about=self._about, banned=self._banned)
        if problem is None and KINDS[kind].is_question and not has_question(query):
            return "no question"
        return problem

    def _open_cells(self) -> list[Cell]:
        return [cell for cell in self._cells if self._dry[cell] < DRY]

    def _need(self) -> int:
        """How many of the queries that are missing one cell should give; 0 where none can."""
        missing, cells = self.num_queries - len(self.queries), len(self._open_cells())
        return -(-missing // cells) if cells else 0

    def _rank(self, cell: Cell) -> tuple[int, int, int]:
        chunk, kind = cell
        return self._kept[cell], self._in_chunk[chunk], self._of_kind[kind]


def number_of(*key: object) -> int:
    """64 bits of a digest: a random number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
