"""Answers with a soft prompt. That they are the right ones is part of test_evaluate.py."""

from __future__ import annotations

import signal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import PADDING_SENSITIVE, make_model, make_tokenizer
from toy_run import CONTEXT, NEW_TOKENS, QUESTIONS, save_toy_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.student.generation import Pieces, generate, stream
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.utils.text import answer_text


def make_student(model, num_virtual_tokens=4, **options):
    config = SoftPromptConfig(
        num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="random", **options
    )
    return SoftPromptModel(model, SoftPrompt.from_model(model, make_tokenizer(), config))


def answers(student, questions=QUESTIONS, **options):
    queries = [
        tokenize_query(make_tokenizer(), [{"role": "user", "content": q}], CONTEXT, source=f"q:{i}")
        for i, q in enumerate(questions)
    ]
    options = {"max_new_tokens": NEW_TOKENS, "show_progress": False, **options}
    return generate(student, make_tokenizer(), queries, **options)


@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon_h1", *PADDING_SENSITIVE])
def test_answers_do_not_depend_on_the_batch(architecture, placement):
    student = make_student(make_model(architecture), placement=placement)
    together = answers(student, batch_size=5)
    assert together == [answers(student, [question])[0] for question in QUESTIONS]
    assert len(set(together)) > 1


@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gemma3n", "phi3"])
def test_rows_that_share_the_prompt_answer_as_one_that_is_read_alone(architecture, placement):
    """``stream`` has transformers write, behind a prompt of the query's own."""
    student = make_student(make_model(architecture), placement=placement)
    alone = [
        stream(
            student,
            make_tokenizer(),
            tokenize_query(make_tokenizer(), [{"role": "user", "content": question}], CONTEXT),
            lambda piece: None,
            max_new_tokens=NEW_TOKENS,
        )
        for question in QUESTIONS
    ]
    assert answers(student, batch_size=2) == alone


def test_the_checkpoints_own_defaults_change_no_answer():
    student = make_student(make_model())
    expected = answers(student)
    student.base.generation_config.update(use_cache=False, suppress_tokens=list(range(100)))
    assert answers(student) == expected


def test_answers_read_the_prompt_and_leave_no_trace_in_the_model():
    student = make_student(make_model("falcon_h1"))
    before = answers(student)
    with torch.no_grad():
        student.prompt.embedding.neg_()
    assert answers(student) != before
    assert not student.base.get_input_embeddings()._forward_hooks


def test_a_model_that_never_calls_its_embedding_layer_is_named(monkeypatch):
    """A prompt that nobody reads would be a silent error."""
    student = make_student(make_model())
    written = torch.zeros(1, 99, dtype=torch.long)
    monkeypatch.setattr(student.base, "generate", lambda **inputs: written)
    query = tokenize_query(make_tokenizer(), [{"role": "user", "content": "Hi"}], CONTEXT)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM does not read all ids of a call through"
    ):
        stream(student, make_tokenizer(), query, print)


def test_a_prompt_longer_than_the_model_is_named():
    student = make_student(make_model("gpt2"), num_virtual_tokens=490)
    with pytest.raises(ValueError, match="q:0: 490 virtual tokens, .* 512 positions"):
        answers(student, ["Hi"])


# As they are written


def test_a_streamed_answer_is_the_answer():
    student = make_student(make_model())
    for question, answer in zip(QUESTIONS, answers(student, max_new_tokens=40), strict=True):
        query = tokenize_query(make_tokenizer(), [{"role": "user", "content": question}], "")
        streamed: list[str] = []
        assert (
            stream(student, make_tokenizer(), query, streamed.append, max_new_tokens=40) == answer
        )
        assert "".join(streamed) == answer


def streamed_by(tokenizer, ids) -> list[str]:
    pieces: list[str] = []
    streamer = Pieces(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the query
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert pieces, "nothing came before the end"
    streamer.end()
    return pieces


@pytest.mark.parametrize("space", ["", " \n\t "])
def test_a_piece_ends_at_a_character(space):
    text = "Grüße an 漢字, 🚴🏽 or e\u0301!\n\nSo  it\x1b[2J is \U0001f469\u200d\U0001f527."
    tokenizer = make_tokenizer()
    pieces = streamed_by(tokenizer, tokenizer(space + text + space + "<|end|>")["input_ids"])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 10


@pytest.mark.parametrize("cleans_up", [True, False])
def test_what_is_shown_is_never_rewritten(cleans_up):
    """Words and signs apart, which transformers joins afterwards if the tokenizer says so."""
    tokens = ["it", "'", "s", "a", "word", ",", "do", "##ing", ".", "[UNK]"]
    core = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", clean_up_tokenization_spaces=cleans_up
    )
    ids = tokenizer("it's a word, doing.")["input_ids"]
    shown = streamed_by(tokenizer, ids)
    assert shown == ["it", " '", " s", " a", " word", ",", " do", "ing", "."]
    assert "".join(shown) == answer_text(tokenizer, ids)


def test_bytes_that_turn_out_to_be_no_character_end_no_stream():
    tokens = ["a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    begun = tokenizer.convert_tokens_to_ids(["a", "<0xC3>", "<0xA9>", "<0xE4>", "b", "a"])
    assert answer_text(tokenizer, begun[:3]) == "a\u00e9"
    assert answer_text(tokenizer, begun).endswith("ba")
    assert "".join(streamed_by(tokenizer, begun)).endswith("ba")


@pytest.fixture
def written_by(tmp_path, monkeypatch):
    """The command, with a model that writes the given texts, calling what it is given between."""
    base = AutoModelForCausalLM.from_pretrained(save_toy_model(tmp_path / "model"))
    make_student(base).prompt.save_pretrained(tmp_path / "prompt")

    def run_with(text, between):
        ids = make_tokenizer()(text)["input_ids"]

        def write(model, rows, mask, *, streamer, **options):
            streamer.put(rows)
            for token in ids:
                streamer.put(torch.tensor([token]))
                between()
            streamer.end()
            return [ids]

        monkeypatch.setattr("softprompt_fast.student.generation.write", write)
        return main(["generate", f"--prompt_dir={tmp_path / 'prompt'}", "Hi"])

    return run_with


def test_the_command_shows_what_there_is_and_never_a_control_character(written_by, capsys):
    seen: list[str] = []
    text = " red \x1b[31m tab\t\u202e漢 end\n"
    assert written_by(text, lambda: seen.append(capsys.readouterr().out)) == 0
    out = "".join([*seen, capsys.readouterr().out])
    assert out == "red \\x1b[31m tab\t\\u202e漢 end\n"
    assert sum(map(bool, seen)) > 5


def test_ctrl_c_ends_the_line_of_the_answer(written_by, capsys):
    with pytest.raises(SystemExit, match="130"):
        written_by("red and more", lambda: signal.raise_signal(signal.SIGINT))
    assert capsys.readouterr().out == "r\n"
