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
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

from .filters import Distinct, clean, fault, has_question, normalized, subjects
from .kinds import EXAMPLE_WORDS, KINDS, asking_for

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


@dataclass(kw_only=True, eq=False)
class Cell:
    """What has come of one chunk and one kind."""

    chunk: int
    kind: str
    visits: int = 0
    texts: int = 0
    """That the model wrote."""

    kept: int = 0
    """Of them, those that are queries now."""

    dry: int = 0
    """Visits since the last one that gave a query."""

    spare: list[str] = field(default_factory=list)
    """Texts that are good, and not needed so far."""


class QueryPlan:
    """Which texts to ask for, and which of them become queries:

    while (visit := plan.next_visit()) is not None:
        plan.take(visit, texts of the model)
    """

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
        self._dropped: Counter[str] = Counter()
        # In the order of a draw, so that few queries about a long context come from all over it.
        names = [(chunk, kind) for chunk in range(len(chunks)) for kind in kinds]
        names.sort(key=lambda name: number_of(seed, "cell", *name))
        self._cells = {(chunk, kind): Cell(chunk=chunk, kind=kind) for chunk, kind in names}
        self._in_chunk: Counter[int] = Counter()
        self._of_kind: Counter[str] = Counter()
        self._most_of_cell = math.ceil(MOST_OF_SHARE * num_queries / len(names))
        self._distinct = Distinct(query for kind in KINDS.values() for query in kind.examples)
        context = "".join(chunks)
        self._about = subjects(context)
        self._banned = frozenset(EXAMPLE_WORDS.split()).difference(normalized(context).split())

    @property
    def num_texts(self) -> int:
        """That the model wrote."""
        return sum(cell.texts for cell in self._cells.values())

    @property
    def dropped(self) -> Counter[str]:
        """How many texts became no query, by reason."""
        spare = sum(len(cell.spare) for cell in self._cells.values())
        return self._dropped + Counter({"not needed": spare})

    def next_visit(self) -> Visit | None:
        """None where all queries are there, or where no more are to be had."""
        need = self._need()
        most = min(self.batch_size, MOST_TEXTS * self.num_queries - self.num_texts)
        if need < 1 or most < 1:
            return None
        cell = min(self._unasked() or self._not_dry(), key=self._rank)
        visits = sum(cell.visits for cell in self._cells.values())
        count = min(max(SPARE * need, LEAST_TEXTS), most)
        kind = KINDS[cell.kind]
        return Visit(
            number=visits,
            chunk=cell.chunk,
            kind=cell.kind,
            wording=visits % len(kind.instructions),
            openings=tuple(islice(cycle(kind.openings), cell.texts, cell.texts + count)),
        )

    def take(self, visit: Visit, texts: Sequence[str]) -> None:
        """What the model wrote when asked for ``visit``, which is over with this."""
        cell = self._cells[visit.chunk, visit.kind]
        enough = cell.kept + self._need()
        before = cell.kept
        read = self._read_at(visit)
        for text in texts:
            query = clean(text)
            problem = self._fault(query, read, visit.kind)
            if problem is not None:
                self._dropped[problem] += 1
            elif cell.kept < enough:
                self._keep(cell, query)
            else:
                cell.spare.append(query)
        cell.visits += 1
        cell.texts += len(texts)
        cell.dry = 0 if cell.kept > before else cell.dry + 1
        if not self._unasked():
            self._use_spare()

    def _need(self) -> int:
        """How many of the queries that are missing one cell should give; 0 where none can."""
        missing, cells = self.num_queries - len(self.queries), len(self._not_dry())
        return -(-missing // cells) if cells else 0

    def _unasked(self) -> list[Cell]:
        return [cell for cell in self._cells.values() if not cell.texts]

    def _not_dry(self) -> list[Cell]:
        return [cell for cell in self._cells.values() if cell.dry < DRY]

    def _rank(self, cell: Cell) -> tuple[int, int, int]:
        """The lowest comes next: that of the cell, chunk and kind that have the fewest queries."""
        return cell.kept, self._in_chunk[cell.chunk], self._of_kind[cell.kind]

    def _read_at(self, visit: Visit) -> str:
        """What the model reads before it writes."""
        asked = asking_for(visit.kind, visit.wording, self.chunks[visit.chunk])
        return "\n".join(message["content"] for message in asked)

    def _fault(self, query: str, read: str, kind: str) -> str | None:
        problem = fault(query, read, about=self._about, banned=self._banned)
        if problem is None and KINDS[kind].is_question and not has_question(query):
            return "no question"
        return problem

    def _keep(self, cell: Cell, query: str) -> None:
        if not self._distinct.add(query):
            self._dropped["duplicate"] += 1
            return
        self.queries.append(Written(text=query, kind=cell.kind, chunk=cell.chunk))
        cell.kept += 1
        self._in_chunk[cell.chunk] += 1
        self._of_kind[cell.kind] += 1

    def _use_spare(self) -> None:
        """Where one cell gave too little, others may have given more: cheaper than to ask again."""
        while len(self.queries) < self.num_queries:
            cells = [
                cell
                for cell in self._cells.values()
                if cell.spare and cell.kept < self._most_of_cell
            ]
            if not cells:
                return
            cell = min(cells, key=self._rank)
            self._keep(cell, cell.spare.pop(0))


def number_of(*key: object) -> int:
    """64 bits of a digest: a random number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
