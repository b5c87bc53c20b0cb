"""Models whose positions depend on the length of a call (LongRoPE): nothing is mixed or shared."""

from __future__ import annotations

import pytest
import torch
from toy import SWITCH, make_model, make_tokenizer
from toy_teacher import NEW_TOKENS, given_answers, make_queries, make_teacher

from softprompt_fast.base_model.checks import position_switch
from softprompt_fast.base_model.decoding import in_batches
from softprompt_fast.base_model.output_head import hidden_states
from softprompt_fast.data.queries import student_layout, teacher_ids
from softprompt_fast.student.generation import generate
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.answers import Answer
from softprompt_fast.teacher.examples import TrainingExample


@pytest.fixture
def model():
    return make_model("longrope")


def one_at_a_time(model, embeds: torch.Tensor) -> list[int]:
    """The greedy answer to embeddings [L, D], whole calls without a cache."""
    end, written = make_tokenizer().eos_token_id, []
    while len(written) < NEW_TOKENS and end not in written:
        more = model.get_input_embeddings()(torch.tensor(written, dtype=torch.long))
        logits = model(inputs_embeds=torch.cat([embeds, more])[None], use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def test_the_toys_lie_on_both_sides_and_pass_over(model):
    assert position_switch(model) == SWITCH
    assert position_switch(make_model("gemma3")) == float("inf")
    lengths = [len(teacher_ids(query)) for query in make_queries()]
    assert min(lengths) + NEW_TOKENS <= SWITCH < max(lengths)
    assert any(length <= SWITCH < length + NEW_TOKENS for length in lengths)
    assert all(len(query.before + query.context) < SWITCH for query in make_queries())


@torch.no_grad()
def test_the_teacher_answers_as_in_whole_calls(model, capsys):
    teacher = make_teacher(model)
    embed = model.get_input_embeddings()
    expected = [one_at_a_time(model, embed(torch.tensor(teacher_ids(q)))) for q in make_queries()]
    assert [answer.ids for answer in teacher.answer(make_queries())] == expected
    teacher.answer(make_queries())
    said = capsys.readouterr().err
    assert said.count(f"otherwise in a call of more than {SWITCH} tokens: 1 queries pass that") == 1


@torch.no_grad()
def test_the_teachers_states_are_those_of_whole_calls(model):
    queries = make_queries()
    for query, answer in zip(
        queries,
        make_teacher(model).answer(queries, given_answers(), record_hidden=True),
        strict=True,
    ):
        ids = torch.tensor([teacher_ids(query) + answer.ids[:-1]])
        expected = hidden_states(model, input_ids=ids, use_cache=False)[0, -len(answer.ids) :]
        torch.testing.assert_close(answer.hidden, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def student(model):
    # As long as the context that it replaces: the same lengths as the teacher's, and a few tokens.
    config = SoftPromptConfig(num_virtual_tokens=60, prompt_tuning_init="vocab")
    return SoftPromptModel(model, SoftPrompt.from_model(model, make_tokenizer(), config))


def embeds_of(student, query, answer: list[int]) -> torch.Tensor:
    before, after = (torch.tensor(ids) for ids in student_layout(query, "system"))
    embed = student.base.get_input_embeddings()
    more = torch.tensor(answer, dtype=torch.long)
    return torch.cat([embed(before), student.prompt.embedding, embed(after), embed(more)])


@pytest.mark.parametrize("packing", [False, True])
def test_a_short_sequence_is_read_as_by_itself(student, packing):
    examples = [
        TrainingExample(query=query, answer=Answer(ids=ids))
        for query, ids in zip(make_queries(), given_answers(), strict=True)
    ]
    lengths = {len(embeds_of(student, e.query, e.answer.ids[:-1])) for e in examples}
    assert min(lengths) <= SWITCH < max(lengths)
    for some in (examples, [e for e in examples if len(e.query.after) < 30]):
        batch = student.collator(packing=packing, with_examples=True)(some)
        batch.pop("sources")
        expected = [
            hidden_states(
                student.base,
                inputs_embeds=embeds_of(student, e.query, e.answer.ids[:-1])[None],
                use_cache=False,
            )[0, -len(e.answer.ids) :]
            for e in batch.pop("examples")
        ]
        torch.testing.assert_close(student(**batch), torch.cat(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_student_answers_as_in_whole_calls(student):
    tokenizer = make_tokenizer()
    expected = [one_at_a_time(student.base, embeds_of(student, q, [])) for q in make_queries()]
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
    answers = generate(student, tokenizer, make_queries(), **options)
    assert answers == [text.strip() for text in texts]


def test_rows_that_pass_over_wait_for_none():
    lengths = [99, 7, 93, 101, 8, 93, 300]
    parts = list(
        in_batches(range(7), 8, length=lengths.__getitem__, may_pad=True, switch=SWITCH, more=8)
    )
    assert [[lengths[i] for i in part] for part in parts] == [[7, 8], [93, 93], [99], [101, 300]]
