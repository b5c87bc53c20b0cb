"""The options of a synthesis, and which of them decide what is written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base_model.loading import check_dtype
from ..data.chat_template import parse_kwargs
from ..teacher.options import PrefixOptions
from ..teacher.teacher import LEAST_CONTEXT
from ..utils.console import closest
from ..utils.errors import check_at_least
from .kinds import KINDS
from .writer import recipe_sha256

# Where things lie; and what changes nothing that is written.
FREE_OPTIONS = frozenset(["output_dir", "context_file", "trust_remote_code", "prefix_device"])


@dataclass(kw_only=True)
class SynthesizeOptions(PrefixOptions):
    model: str = field(metadata={"help": "Directory or Hub id of the frozen language model."})
    context_file: str = field(metadata={"help": "Text file: the context to ask about."})
    output_dir: str = field(
        metadata={"help": "Directory for the queries; what was stopped goes on there."}
    )
    num_queries: int = field(default=128, metadata={"help": "Queries to write, held out or not."})
    heldout: float = field(default=0.2, metadata={"help": "Share of them that is held out."})
    num_heldout: int | None = field(
        default=None, metadata={"help": "Number of them that is held out, in place of the share."}
    )
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Of {', '.join(KINDS)}."}
    )
    chunk_tokens: int = field(
        default=256, metadata={"help": "Longest part of the context that is asked about at a time."}
    )
    max_context_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Of a longer context an excerpt is read with each query; default: what the "
            "model has positions for."
        },
    )
    max_query_tokens: int = field(default=48, metadata={"help": "Longest query, in tokens."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(
        default=0.7, metadata={"help": "Of the draw of queries: higher is more varied, and wilder."}
    )
    top_p: float = field(
        default=0.95, metadata={"help": "Only tokens of this share of the probability are drawn."}
    )
    batch_size: int = field(default=16, metadata={"help": "Queries written, or answered, at once."})
    seed: int = field(default=0, metadata={"help": "Of the draws of queries and of the split."})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (the checkpoint's own), float32, bfloat16, float16"},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON object: variables of the model's chat template."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )

    def __post_init__(self) -> None:
        at_least_1 = ("num_queries", "max_query_tokens", "max_new_tokens", "batch_size")
        check_at_least(self, 1, *at_least_1)
        check_at_least(self, 16, "chunk_tokens")
        check_at_least(self, LEAST_CONTEXT, "max_context_tokens")
        check_at_least(self, 0.01, "temperature")
        check_at_least(self, 0, "heldout", "num_heldout")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1: got {self.top_p}.")
        if self.heldout >= 1:
            raise ValueError(f"heldout is a share below 1: got {self.heldout}.")
        if self.num_heldout is not None and self.num_heldout >= self.num_queries:
            raise ValueError(
                f"num_heldout must leave a query to train on: got {self.num_heldout} of "
                f"num_queries={self.num_queries}."
            )
        if not self.kinds:
            raise ValueError(f"kinds is empty: name some of {', '.join(KINDS)}.")
        for kind in self.kinds:
            if kind not in KINDS:
                hint = closest(kind, KINDS)
                raise ValueError(f"kinds must be of {', '.join(KINDS)}: got {kind!r}{hint}")
        self.kinds = [kind for kind in KINDS if kind in self.kinds]
        check_dtype(self.dtype)
        # None is how directories of before it was an option read.
        self.chat_template_kwargs = parse_kwargs(self.chat_template_kwargs) or None

    def num_held_out(self, num_queries: int) -> int:
        """Of so many; one is always left to train on."""
        wanted = round(self.heldout * num_queries) if self.num_heldout is None else self.num_heldout
        return min(wanted, num_queries - 1)


def decisive_options(options: SynthesizeOptions, context_sha256: str) -> dict[str, Any]:
    """All that the result depends on; the context by its content, so that the file may move."""
    values = {n: v for n, v in asdict(options).items() if n not in FREE_OPTIONS}
    if options.prefix_dtype == "auto":  # directories of before it was an option are as good
        del values["prefix_dtype"]
    model = os.path.expanduser(options.model)
    if os.path.isdir(model):
        values["model"] = os.path.abspath(model)
    return {**values, "context_sha256": context_sha256, "recipe_sha256": recipe_sha256()}
