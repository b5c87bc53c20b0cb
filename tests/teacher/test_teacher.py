"""Batched teacher and student against an oracle that runs one unpadded sequence at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import PADDING_SENSITIVE, VOCAB, WINDOW, make_model, make_tokenizer
from toy_teacher import (
    NEW_TOKENS,
    given_answers,
    make_queries,
    make_teacher,
)

from softprompt_fast.base_model.activation_checkpointing import set_checkpointing
from softprompt_fast.base_model.output_head import OutputHead, hidden_states
from softprompt_fast.base_model.prefix_cache import Prefix
from softprompt_fast.data.queries import Query, student_layout, teacher_ids, tokenize_query
from softprompt_fast.student.collator import Collator
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.answers import Answer
from softprompt_fast.teacher.examples import TrainingExample
from softprompt_fast.teacher.teacher import Teacher

# Rotary positions, absolute positions, two kinds of sliding windows, and a recurrent state.
ARCHITECTURES = ["llama", "gpt2", "gemma3", "mistral", "falcon_h1"]
OTHER_CONTEXT = "Nobody is here now."


def oracle_answer(model, ids: list[int]) -> list[int]:
    """Greedy, one query, no cache, no padding."""
    end, written = make_tokenizer().eos_token_id, []
    while len(written) < NEW_TOKENS and (not written or written[-1] != end):
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def without_context(query):
    return Query(before=[], context=[], after=query.plain, plain=query.plain, source=query.source)


def let_some_end_early(model, expected):
    """Makes a token of the second answer an end: rows are padded until their batch is done."""
    end = expected[1][3]
    model.generation_config.eos_token_id = [make_tokenizer().eos_token_id, end]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in expected]
    assert len(set(map(len, expected))) > 1
    return expected


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in PADDING_SENSITIVE)],
)
@torch.no_grad()
def test_written_answers_are_those_of_one_query_at_a_time(architecture):
    model = make_model(architecture)
    queries = make_queries() + make_queries(context=OTHER_CONTEXT)
    queries += [without_context(query) for query in make_queries()]
    expected = [oracle_answer(model, teacher_ids(query)) for query in queries]
    expected = let_some_end_early(model, expected)
    answers = make_teacher(model).answer(queries, record_hidden=False)
    assert [answer.ids for answer in answers] == expected
    assert all(answer.hidden is None for answer in answers)


@pytest.mark.parametrize(
    "default",
    [
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(repetition_penalty=3.0),
        dict(min_new_tokens=NEW_TOKENS),
        dict(suppress_tokens=list(range(100))),
        dict(bad_words_ids=[[token] for token in range(100)]),
        dict(guidance_scale=3.0),
        dict(num_beams=4, num_return_sequences=2),
        dict(return_dict_in_generate=True),
        dict(max_time=1e-9),
        dict(stop_strings=["a"]),
    ],
    ids=lambda default: next(iter(default)),
)
@torch.no_grad()
def test_the_checkpoints_own_defaults_change_no_answer(default):
    model = make_model()
    queries = make_queries()
    expected = [oracle_answer(model, teacher_ids(query)) for query in queries]
    expected = let_some_end_early(model, expected)
    model.generation_config.update(**default)
    kept = model.generation_config.to_dict()
    answers = make_teacher(model).answer(queries, record_hidden=False)
    assert [answer.ids for answer in answers] == expected
    assert model.generation_config.to_dict() == kept


@torch.no_grad()
def test_a_sampled_answer_is_a_draw_from_the_models_own_distribution():
    """So a default that leaves one token to draw from is none of it."""
    model = make_model()
    model.generation_config.min_p = 1.0
    teacher = make_teacher(model, do_sample=True, batch_size=8)
    torch.manual_seed(0)
    answers = teacher.answer(make_queries(["When?"] * 8), record_hidden=False)
    assert len({tuple(answer.ids) for answer in answers}) > 4


@torch.no_grad()
def test_dropout_of_a_model_in_training_mode_changes_nothing():
    model = make_model("gpt2").train()
    teacher = make_teacher(model)
    first, again = (
        teacher.answer(make_queries(), given_answers(), record_hidden=True) for _ in range(2)
    )
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_recorded_states_are_those_of_one_unpadded_forward(architecture):
    model = make_model(architecture)
    queries = make_queries() + make_queries(context=OTHER_CONTEXT)
    answers = make_teacher(model).answer(queries, given_answers() * 2, record_hidden=True)
    assert len(teacher_ids(queries[0])) > WINDOW
    for query, answer, ids in zip(queries, answers, given_answers() * 2, strict=True):
        assert answer.ids == ids
        alone = hidden_states(model, input_ids=torch.tensor([teacher_ids(query) + ids]))
        torch.testing.assert_close(answer.hidden, alone[0, -len(ids) - 1 : -1])


@torch.no_grad()
def test_layers_that_checkpoint_for_the_student_do_not_hide_the_context():
    model = make_model()
    expected = make_teacher(model).answer(make_queries(), given_answers(), record_hidden=True)
    teacher = make_teacher(model)
    model.gradient_checkpointing_enable()
    set_checkpointing(model, True)
    answers = teacher.answer(make_queries(), given_answers(), record_hidden=True)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(answers, expected, strict=True))
    assert all(layer.training for layer in model.model.layers)


@torch.no_grad()
def test_data_and_teacher_may_share_the_answers():
    model = make_model()
    queries = make_queries()
    given = [None, given_answers()[1], None, given_answers()[3], None]
    answers = make_teacher(model).answer(queries, given, record_hidden=True)
    for query, answer, ids in zip(queries, answers, given, strict=True):
        assert answer.ids == (ids or oracle_answer(model, teacher_ids(query)))
        predicted = OutputHead.from_model(model).logits(answer.hidden).argmax(-1).tolist()
        assert ids is not None or predicted == answer.ids


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_student_states_are_those_of_one_unpadded_forward(architecture, placement, padding_side):
    P = 6
    model = make_model(architecture)
    config = SoftPromptConfig(
        num_virtual_tokens=P, placement=placement, prompt_tuning_init="random"
    )
    student = SoftPromptModel(model, SoftPrompt.from_model(model, make_tokenizer(), config))
    examples = [
        TrainingExample(query=query, answer=Answer(ids=ids))
        for query, ids in zip(make_queries(), given_answers(), strict=True)
    ]
    collate = Collator(num_virtual_tokens=P, placement=placement, padding_side=padding_side)
    batch = collate(examples)
    assert batch.pop("sources") == ["q:1", "q:2", "q:3", "q:4", "q:5"]
    assert batch["labels"][batch["labels"] != -100].tolist() == sum(given_answers(), [])

    states = student(**batch).split(list(map(len, given_answers())))
    embed = model.get_input_embeddings()
    for example, hidden in zip(examples, states, strict=True):
        before, after = student_layout(example.query, placement)
        rest = torch.tensor(after + example.answer.ids)
        sequence = torch.cat(
            [embed(torch.tensor(before, dtype=torch.long)), student.prompt.embedding, embed(rest)]
        )
        alone = hidden_states(model, inputs_embeds=sequence[None])
        torch.testing.assert_close(hidden, alone[0, -len(example.answer.ids) - 1 : -1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral"])
@torch.no_grad()
def test_a_batch_never_writes_into_the_shared_prefix(architecture):
    model = make_model(architecture)
    query = make_queries()[0]
    prefix = Prefix.read(model, query.before + query.context)
    before = copy.deepcopy([(layer.keys, layer.values) for layer in prefix.cache.layers])
    copied = prefix.cache_for(4, prefix.length + 7)
    assert copied.layers[0].keys.data_ptr() == prefix.cache.layers[0].keys.data_ptr()
    hidden_states(model, input_ids=torch.ones(4, 7).long(), past_key_values=copied)
    assert copied.get_seq_length() == prefix.length + 7
    assert prefix.cache.get_seq_length() == prefix.length
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_each_context_is_read_once():
    model = make_model()
    lengths = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    queries = make_queries() + make_queries(context=OTHER_CONTEXT)
    make_teacher(model).answer(queries, record_hidden=True)
    prefixes = [len(queries[i].before + queries[i].context) for i in (0, -1)]
    queries_and_answers = max(len(query.after) for query in queries) + NEW_TOKENS
    assert sorted(length for length in lengths if length > queries_and_answers) == prefixes[:1]
    assert lengths.count(prefixes[1]) == 1


def test_a_sequence_longer_than_the_model_is_named():
    queries = make_queries(["x" * 600])
    with pytest.raises(ValueError, match=r"q:1: .* take \d+ tokens .* up to 9, .* 512 positions"):
        make_teacher(make_model()).answer(queries, record_hidden=False)
    with pytest.raises(ValueError, match="q:1: the answer has no tokens"):
        make_teacher(make_model()).answer(make_queries(["Hi"]), [[]], record_hidden=False)


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="batch_size must be >= 1: got 0"):
        make_teacher(make_model(), batch_size=0)
    model = make_model()
    model.config.return_dict = False
    with pytest.raises(ValueError, match="LlamaForCausalLM: config.return_dict must be True"):
        make_teacher(model)


def test_a_token_without_an_embedding_is_named_before_any_work():
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.add_tokens(["<|new|>"])
    model = make_model()
    query = tokenize_query(tokenizer, [{"role": "user", "content": "a <|new|>"}], "c", source="d:3")
    teacher = Teacher(model, tokenizer, show_progress=False)
    with pytest.raises(ValueError, match=rf"d:3: token {VOCAB} has no embedding, the model has"):
        teacher.answer([query])
    plain = tokenize_query(tokenizer, [{"role": "user", "content": "a"}], "c", source="d:4")
    with pytest.raises(ValueError, match=rf"d:4: token {VOCAB} has no embedding"):
        teacher.answer([plain], [[VOCAB]])
    config = SoftPromptConfig(prompt_tuning_init="text", prompt_tuning_init_text="<|new|>")
    with pytest.raises(ValueError, match="prompt_tuning_init='text': token"):
        SoftPrompt.from_model(model, tokenizer, config)
    config = SoftPromptConfig(prompt_tuning_init="vocab")
    student = SoftPromptModel(model, SoftPrompt.from_model(model, tokenizer, config))
    with pytest.raises(ValueError, match=r"d:3: token"):
        student.check_length(query, 1)
