"""A toy teacher, some queries, and their answers by way of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from toy import make_model, make_tokenizer
from toy_teacher import CONTEXT, QUESTIONS, given_answers, make_queries, make_teacher

from softprompt_fast.losses.sketch import TeacherSketch
from softprompt_fast.teacher.answers import Answer, SketchOptions
from softprompt_fast.teacher.cache import TeacherCache
from softprompt_fast.teacher.facts import queries_sha256, teacher_facts, tensor_bytes

# With one query in a batch, a shard has four.
NUM_SHARDS = 3


@dataclass(kw_only=True)
class CachedToy:
    """What decides on the content of a cache; by default all that a cache can hold is stored."""

    model: Any = field(default_factory=make_model)
    tokenizer: Any = field(default_factory=make_tokenizer)
    context: str = CONTEXT
    questions: list[str] = field(default_factory=lambda: [*QUESTIONS, "Cat?", "Why?", "Now?"])
    max_new_tokens: int = 3
    batch_size: int = 1
    do_sample: bool = False
    record_hidden: bool = True
    sketch: SketchOptions | None = field(default_factory=lambda: SketchOptions(top_k=4))

    def __post_init__(self) -> None:
        options = ("max_new_tokens", "batch_size", "do_sample")
        self.teacher = make_teacher(self.model, **{name: getattr(self, name) for name in options})
        # The teacher writes the answers of the first shard, the data have the others.
        self.queries = make_queries([*self.questions, *self.questions[:4]], self.context)
        known = [ids[:5] for ids in given_answers() * 2]
        self.given = [None] * 4 + known[: len(self.queries) - 4]
        self.form = {"record_hidden": self.record_hidden, "sketch": self.sketch}

    @property
    def facts(self) -> dict[str, Any]:
        return teacher_facts(self.teacher, self.tokenizer, self.context, **self.form)

    @property
    def digests(self) -> list[str]:
        """Of what the teacher reads for each shard."""
        parts = self.teacher.shards(len(self.queries))
        return [queries_sha256(self.queries[part], self.given[part]) for part in parts]

    def answers(self, directory: Path, facts: dict[str, Any] | None = None) -> list[Answer]:
        """facts: to read the weights no more than once."""
        cache = TeacherCache(directory)
        return cache.answers(
            self.teacher, self.queries, self.given, facts or self.facts, **self.form
        )


def bits(answers: list[Answer]) -> list[Any]:
    """All that the answers hold, to be compared."""

    def of(value: Any) -> Any:
        if isinstance(value, TeacherSketch):
            return [of(getattr(value, field.name)) for field in fields(value)]
        if hasattr(value, "shape"):
            return [tuple(value.shape), value.dtype, bytes(tensor_bytes(value))]
        return value

    return [[of(part) for part in (a.ids, a.hidden, a.sketch)] for a in answers]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.safetensors"))
