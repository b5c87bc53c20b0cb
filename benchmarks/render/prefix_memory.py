"""Memory of a long context on one card, worked out from the shapes of a model; nothing is run.

Legend: P layers, D hidden width, F width inside the MLP, H heads of queries, K of keys, d width of
a head, V vocabulary, S tokens of the context, B rows that are answered at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from render.tables import Table

from softprompt_fast.base_model.held_prefix import GROUP

GIB = 1 << 30
CARD_GIB = 80
CONTEXTS = {"32k": 32 << 10, "128k": 128 << 10}
ROWS = (8, 16)
# Of a row: a query and its answer.
ROW_TOKENS = 512
BF16, FP32, INT8 = 2, 4, 1


class Shape(NamedTuple):
    """A decoder with gated MLPs and a head of its own, as its config describes it."""

    P: int
    D: int
    F: int
    H: int
    K: int
    d: int
    V: int
    query_key_value_bias: bool

    @property
    def parameters(self) -> int:
        of_heads = (self.H + 2 * self.K) * self.d
        attention = self.D * of_heads + self.H * self.d * self.D
        attention += of_heads if self.query_key_value_bias else 0
        layer = attention + 3 * self.D * self.F + 2 * self.D  # two norms
        return self.P * layer + 2 * self.V * self.D + self.D

    @property
    def numbers_per_token(self) -> int:
        """Of keys and values, in all layers."""
        return 2 * self.P * self.K * self.d

    @property
    def range_bytes_per_token(self) -> float:
        """Of 8 bits: two numbers for GROUP tokens of a channel of keys, and for a token's value."""
        return self.P * self.K * 2 * FP32 * (self.d / GROUP + 1)

    def bf16(self, tokens: int) -> int:
        return BF16 * self.numbers_per_token * tokens

    def int8(self, tokens: int) -> float:
        return (INT8 * self.numbers_per_token + self.range_bytes_per_token) * tokens

    def layer(self, tokens: int) -> float:
        """One layer in bf16."""
        return self.bf16(tokens) / self.P


MODELS = {
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, True),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
}


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f}"


def table() -> str:
    most, rows = ROWS[-1], []
    columns = ["model, tokens", "weights", "context, bf16", "context, 8 bits"]
    columns += [f"a row of {ROW_TOKENS} tokens", f"all, {most} rows, bf16", "all, 8 bits"]
    columns += [f"a copy for each of {B} rows" for B in ROWS]
    for model, shape in MODELS.items():
        weights = BF16 * shape.parameters
        for name, S in CONTEXTS.items():
            held = [shape.bf16(S), shape.int8(S)]
            own = most * shape.bf16(ROW_TOKENS)
            ours = [weights + held[0] + own, weights + held[1] + own + shape.layer(S)]
            cells = [gib(size) for size in (weights, *held, shape.bf16(ROW_TOKENS), *ours)]
            cells += [_with_copies(shape, S, B) for B in ROWS]
            rows.append([f"{model}, {name}", *cells])
    return "\n\n".join([Table("", columns, rows).markdown(), *_notes()])


def _with_copies(shape: Shape, S: int, B: int) -> str:
    """Of plain transformers: keys and values of each row, and the keys of a layer twice, while
    they are copied into a tensor that is longer by a token."""
    rows = B * shape.bf16(S + ROW_TOKENS)
    size = BF16 * shape.parameters + rows + rows / shape.P / 2
    return gib(size) if size <= CARD_GIB * GIB else f"**{gib(size)}**"


def _notes() -> list[str]:
    name, S = list(CONTEXTS.items())[-1]
    layers = " and ".join(f"{gib(shape.layer(S))} GiB of {m}" for m, shape in MODELS.items())
    repeated = " and ".join(f"{gib(s.layer(S) * s.H / s.K)} GiB" for s in MODELS.values())
    return [
        f"GiB, worked out from the shapes and not measured; bold: more than the {CARD_GIB} GiB of "
        "a card. Weights are in bf16. In 8 bits, one layer at a time is in bf16 too.",
        f"With `prefix_device: cpu`, the card holds one layer of the context at a time: {layers} "
        f"at {name}. While the context is read, transformers' attention repeats the keys and "
        f"values of one layer for all heads of queries: {repeated} more.",
    ]
