"""Answers that are written in rows which make place for each other: those of one query alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, make_model, make_tokenizer

from softprompt_fast.base_model import continuous_batching
from softprompt_fast.base_model.continuous_batching import write_in_rows
from softprompt_fast.base_model.output_head import OutputHead, hidden_states
from softprompt_fast.base_model.prefix_cache import Prefix
from softprompt_fast.base_model.shared_prefix import Rows

NEW_TOKENS = 6
# Half of all tokens end an answer, so answers have all lengths.
ENDS = range(0, VOCAB, 4)


def ids_of(length: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=random).tolist()


def alone(model, before: list[int]) -> tuple[list[int], torch.Tensor]:
    """The answer to one query without cache or padding, and the states that predict it."""
    ids: list[int] = []
    head = OutputHead.from_model(model)
    while len(ids) < NEW_TOKENS and not (ids and ids[-1] in ENDS):
        hidden = hidden_states(model, input_ids=torch.tensor([before + ids]), use_cache=False)[0]
        ids.append(int(head.logits(hidden[-1]).argmax()))
    return ids, hidden[-len(ids) :]


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def oracle(request):
    """A model, a prefix, queries, and what is right."""
    with torch.no_grad():
        model = make_model(request.param)
        prefix = ids_of(30, seed=99)
        asked = [ids_of(1 + 5 * seed % 13, seed) for seed in range(9)]
        return model, prefix, asked, [alone(model, prefix + ids) for ids in asked]


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    part=st.integers(1, 4),
    most_read=st.sampled_from([1, 20, 1024]),
    least_read=st.sampled_from([1, 16]),
)
@torch.no_grad()
def test_neither_rows_nor_calls_change_an_answer_or_its_states(
    oracle, num_rows, part, most_read, least_read
):
    model, prefix, asked, expected = oracle
    assert len({len(ids) for ids, _ in expected}) > 2
    rows = Rows(
        model,
        Prefix.read(model, prefix),
        num_rows=num_rows,
        capacity=max(map(len, asked)) + NEW_TOKENS,
    )
    ended: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_batching, "PART", part)
        patch.setattr(continuous_batching, "MOST_READ", most_read)
        patch.setattr(continuous_batching, "LEAST_READ", least_read)
        written = write_in_rows(
            rows,
            asked,
            max_new_tokens=NEW_TOKENS,
            end_ids=ENDS,
            with_states=True,
            on_written=lambda: ended.append(1),
        )
    assert len(ended) == len(asked)
    for answer, (ids, states) in zip(written, expected, strict=True):
        assert answer.ids == ids
        torch.testing.assert_close(answer.states, states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_are_read_only_where_they_are_asked_for(oracle):
    model, prefix, asked, _ = oracle
    rows = Rows(model, Prefix.read(model, prefix), num_rows=4, capacity=40)
    written = write_in_rows(rows, asked, max_new_tokens=NEW_TOKENS, end_ids=ENDS)
    assert all(answer.states is None for answer in written)


@torch.no_grad()
def test_no_call_reads_more_tokens_than_allowed(monkeypatch):
    model = make_model()
    monkeypatch.setattr(continuous_batching, "MOST_READ", 32)
    rows = Rows(model, Prefix.read(model, ids_of(8, seed=1)), num_rows=8, capacity=40)
    sizes: list[torch.Size] = []
    read = rows.read
    monkeypatch.setattr(
        rows, "read", lambda ids, *more: (sizes.append(ids.shape), read(ids, *more))[1]
    )
    asked = [ids_of(11, seed) for seed in range(8)]
    end = [make_tokenizer().eos_token_id]
    write_in_rows(rows, asked, max_new_tokens=NEW_TOKENS, end_ids=end, with_states=True)
    assert max(B * n for B, n in sizes) <= 32
    assert (2, 11) in sizes and (8, 1) in sizes
