"""Packing: sequences that share a row, and its prompt, are read as if each were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import ARCHITECTURES, PADDING_SENSITIVE, VOCAB, WINDOW, make_model
from toy_trainer import make_trainer, trained

from softprompt_fast.base_model.output_head import hidden_states
from softprompt_fast.data.queries import Query, student_layout
from softprompt_fast.student.collator import Packing
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.packing import longest_packed, pack
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.answers import Answer
from softprompt_fast.teacher.examples import TrainingExample

P = 4
# Tokens of the query and of the answer; together with before and P they fit into WINDOW.
SIZES = [(3, 2), (9, 1), (1, 8), (5, 5), (2, 1)]
WIDE = 10**6  # attention costs nothing: all in one row
NEVER = {"falcon_h1", *PADDING_SENSITIVE}


def make_examples(befores=((7, 8),)) -> list[TrainingExample]:
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1, VOCAB, (n,), generator=generator).tolist()

    return [
        TrainingExample(
            query=Query(
                before=list(befores[number % len(befores)]),
                context=ids(3),
                after=ids(asked),
                plain=ids(asked + 1),
                source=f"example {number}",
            ),
            answer=Answer(ids=ids(answered), hidden=torch.full((answered, 1), float(number))),
        )
        for number, (asked, answered) in enumerate(SIZES)
    ]


def make_student(architecture="llama", *, dtype=torch.float32, placement="system"):
    model = make_model(architecture, dtype=dtype)
    config = SoftPromptConfig(num_virtual_tokens=P, prompt_tuning_init="vocab", placement=placement)
    return SoftPromptModel(model, SoftPrompt.from_model(model, None, config))


def packed_in_one_row(collator, **changes):
    return replace(collator, packing=replace(collator.packing, width=WIDE, **changes))


def alone(student, example) -> torch.Tensor:
    """Hidden states [n, D] that predict an answer, by a call of its own with neither mask nor
    positions."""
    before, after = student_layout(example.query, student.prompt.config.placement)
    embed = student.base.get_input_embeddings()
    embeds = [
        embed(torch.tensor(before, dtype=torch.long)),
        student.prompt.embedding,
        embed(torch.tensor(after + example.answer.ids[:-1])),
    ]
    hidden = hidden_states(student.base, inputs_embeds=torch.cat(embeds)[None], use_cache=False)
    return hidden[0, -len(example.answer.ids) :]


def assert_read_alone(student, examples, batch):
    """Hidden states and the prompt's gradient, as if each example of the batch were alone."""
    inputs = {k: v for k, v in batch.items() if k not in ("sources", "teacher_hidden")}
    hidden = student(**inputs)
    # Each token's example: what belongs to the tokens goes by the order of their labels.
    numbers = batch["teacher_hidden"][:, 0].long()
    assert batch["sources"] == [f"example {n}" for n in numbers.unique_consecutive()]
    results = []
    for states in (
        [hidden[numbers == number] for number in range(len(examples))],
        [alone(student, example) for example in examples],
    ):
        student.prompt.embedding.grad = None
        generator = torch.Generator().manual_seed(0)
        sum((h * torch.randn(h.shape, generator=generator)).sum() for h in states).backward()
        results.append([*(h.detach() for h in states), student.prompt.embedding.grad])
    # Of the whole, since a small entry of a gradient is a difference of large ones.
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_plain_batch_is_read_as_its_examples_are(architecture):
    student, examples = make_student(architecture), make_examples(befores=[(7, 8), ()])
    batch = student.collator()(examples)
    assert "attention_mask" in batch and "segment_ids" not in batch
    assert_read_alone(student, examples, batch)


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("architecture", "placement"),
    [("llama", "prefix"), *((name, "system") for name in sorted(ARCHITECTURES.keys() - NEVER))],
)
def test_a_packed_row_is_read_as_its_sequences_are(architecture, placement, share_prompt):
    student, examples = make_student(architecture, placement=placement), make_examples()
    collator = packed_in_one_row(student.collator(packing=True), share_prompt=share_prompt)
    batch = collator(examples)
    assert batch["segment_ids"].shape[0] == 1
    assert batch["prompt_mask"].sum() == (P if share_prompt else P * len(examples))
    assert_read_alone(student, examples, batch)


def test_eager_attention_takes_the_mask_as_numbers():
    student, examples = make_student(), make_examples()
    student.base.set_attn_implementation("eager")
    batch = packed_in_one_row(student.collator(packing=True))(examples)
    assert_read_alone(student, examples, batch)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompts_that_stand_behind_other_tokens_are_not_shared(padding_side):
    student, examples = make_student(), make_examples(befores=[(7, 8), (7, 9), ()])
    collator = packed_in_one_row(student.collator(padding_side, packing=True))
    batch = collator(examples)
    assert batch["segment_ids"].shape[0] == 3
    assert batch["prompt_mask"].sum() == 3 * P
    assert_read_alone(student, examples, batch)


@pytest.mark.parametrize("architecture", sorted(NEVER))
def test_a_model_that_cannot_read_packed_rows_gets_plain_ones(architecture):
    student = make_student(architecture)
    assert longest_packed(student.base) == 0
    assert "attention_mask" in student.collator(packing=True)(make_examples())


def test_a_model_that_goes_by_positions_of_its_own_gets_plain_rows():
    student = make_student()
    assert longest_packed(student.base) > 0
    student.base.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert longest_packed(student.base) == 0


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_a_sequence_that_leaves_the_sliding_window_is_not_packed(architecture):
    student, examples = make_student(architecture), make_examples()
    collator = student.collator(packing=True)
    assert collator.packing.longest == WINDOW
    assert "segment_ids" in collator(examples)
    opening, answer = 2 + P, len(examples[0].answer.ids) - 1
    for length, is_packed in ((WINDOW, True), (WINDOW + 1, False)):
        query = replace(examples[0].query, after=[5] * (length - opening - answer))
        long = TrainingExample(query=query, answer=examples[0].answer)
        batch = packed_in_one_row(collator)([long, *examples[1:]])
        assert ("segment_ids" in batch) == is_packed
        if is_packed:
            assert_read_alone(student, [long, *examples[1:]], batch)


def test_rows_are_split_where_attention_would_cost_more_than_it_saves():
    lengths = [100, 90, 80, 10, 10, 10]

    def cost(rows, width):
        longest = max(16 + sum(lengths[i] for i in row) for row in rows)
        return len(rows) * longest * (3 * width + longest)

    alone = [[i] for i in range(len(lengths))]
    for width in (1, 8, 64, 4096):
        rows = pack(lengths, 16, width)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert cost(rows, width) <= min(cost(alone, width), cost([sum(alone, [])], width))
    assert len(pack(lengths, 16, 4096)) == 1 and len(pack(lengths, 16, 8)) == 3


@pytest.mark.parametrize("impl", ["fused", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["nll", "kl", "mix"])
def test_packed_training_is_plain_training(tmp_path, objective, impl):
    # Plain SGD shows a gradient of the wrong size; Adam would hide it.
    options = dict(objective=objective, loss_impl=impl, optim="sgd", learning_rate=0.5)
    plain = trained(make_trainer(tmp_path, packing=False, **options))
    for share_prompt in (True, False):
        trainer = make_trainer(tmp_path, share_prompt=share_prompt, **options)
        trainer.data_collator = packed_in_one_row(trainer.data_collator)
        assert trainer.data_collator.packing.share_prompt is share_prompt
        torch.testing.assert_close(trained(trainer), plain, rtol=1e-4, atol=1e-5)


def test_packing_is_on_by_default_and_can_be_turned_off(tmp_path):
    assert make_trainer(tmp_path).data_collator.packing == Packing(
        width=32, longest=float("inf"), share_prompt=True
    )
    assert make_trainer(tmp_path, packing=False).data_collator.packing is None
