"""A conversation: each answer has read what was said before."""

from __future__ import annotations

import builtins
import io

import pytest
from toy_run import save_toy_model

from softprompt_fast.base_model.loading import load_model
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.student.generation import generate
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.utils.console import printable

NEW_TOKENS = 9


class Chat:
    def __init__(self, folder) -> None:
        self.folder = folder
        base, self.tokenizer = load_model(str(save_toy_model(folder / "model")))
        config = SoftPromptConfig(num_virtual_tokens=4, prompt_tuning_init="random")
        prompt = SoftPrompt.from_model(base, self.tokenizer, config)
        prompt.save_pretrained(folder)
        self.model = SoftPromptModel(base, prompt)

    def run(self) -> int:
        return main(["chat", f"--prompt_dir={self.folder}", f"--max_new_tokens={NEW_TOKENS}"])

    def answers(self, questions, messages=()) -> list[str]:
        """Those of one conversation, by ``generate``."""
        messages, answers = list(messages), []
        for question in questions:
            messages.append({"role": "user", "content": question})
            query = tokenize_query(self.tokenizer, messages, "")
            options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
            answers += generate(self.model, self.tokenizer, [query], **options)
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def say(chat, monkeypatch, capsys):
    """Runs the command on bytes of stdin: exit code, stdout, stderr."""

    def run(text):
        raw = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        code = chat.run()
        out, err = capsys.readouterr()
        return code, out, err.rpartition("it/s]\n")[2]  # what comes after the bar of the loading

    return run


def lines(answers) -> str:
    return "".join(f"{printable(answer)}\n" for answer in answers)


def test_an_answer_reads_what_was_said_before(chat, say):
    expected = chat.answers(["Hi", "And on Sunday?"])
    alone = chat.answers(["And on Sunday?"])
    assert expected[1:] != alone
    assert say("Hi\nAnd on Sunday?\n") == (0, lines(expected), "")
    # Blank lines, the end of a line, and a byte order mark say nothing.
    assert say("\ufeffHi \r\n\n   \nAnd on Sunday?")[1] == lines(expected)
    _, out, err = say("Hi\n/reset\nAnd on Sunday?\n/quit\nHi\n")
    assert out == lines([expected[0], *alone])
    assert "Forgotten" in err
    assert say("") == (0, "", "")


def test_turns_that_no_longer_fit_are_forgotten_aloud(chat, say):
    """The toy has 512 positions, one for each byte."""
    questions = [letter * 150 for letter in "abcd"]
    code, out, err = say("\n".join(questions))
    first, second = chat.answers(questions[:2])
    turn = [{"role": "user", "content": questions[1]}, {"role": "assistant", "content": second}]
    third = chat.answers(questions[2:3], turn)
    turn = [{"role": "user", "content": questions[2]}, {"role": "assistant", "content": third[0]}]
    fourth = chat.answers(questions[3:], turn)
    assert (code, out) == (0, lines([first, second, *third, *fourth]))
    assert err.count("The oldest 1 turn no longer fits into the model's positions") == 2


def test_a_question_that_does_not_fit_changes_nothing(chat, say):
    expected = chat.answers(["Hi", "And on Sunday?"])
    code, out, err = say(f"Hi\n{'x' * 600}\nAnd on Sunday?\n")
    assert (code, out) == (1, lines(expected))
    assert "error: the question: 4 virtual tokens, the query's 6" in err


def test_a_line_that_is_not_utf8_is_named(chat, say):
    code, out, err = say(b"Hi\nSo\xff\nHi\n")
    assert (code, out) == (1, lines(chat.answers(["Hi"])))
    assert err == "error: stdin:2: not UTF-8: byte 0xff at offset 2\n"


def test_at_a_terminal_a_sign_asks_for_the_next_line(chat, monkeypatch, capsys):
    typed, signs = iter(["Hi", "\udcff", "/reset", EOFError()]), []

    def type_line(sign):
        signs.append(sign)
        line = next(typed)
        if isinstance(line, EOFError):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert chat.run() == 0
    out, err = capsys.readouterr()
    assert signs == ["> "] * 4
    assert out == lines([*chat.answers(["Hi"]), ""])
    assert "/quit or Ctrl-D ends the conversation" in err
    assert "the line is not UTF-8: see character 0" in err
