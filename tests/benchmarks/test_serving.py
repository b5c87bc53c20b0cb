"""The requests to a server: what each of them asks for, and that only right answers are timed."""

from __future__ import annotations

import json

import pytest
from render import long_contexts
from serving.questions import ANEW, CACHED, PROMPT, Question
from serving.run import EXAMPLES, Load, measure, run, timed

QUESTION = Question(
    bodies={
        PROMPT: {"prompt_embeds": "AAAA", "stop_token_ids": [2]},
        CACHED: {"prompt": [1, 2, 3], "stop_token_ids": [2]},
    },
    expected={PROMPT: "Yes", CACHED: "No", ANEW: "No"},
)


class Server:
    """Answers as this package would, at any length."""

    def __init__(self) -> None:
        self.bodies = []

    def __call__(self, path, data):
        body = json.loads(data)
        self.bodies.append(body)
        text = " Yes" if "prompt_embeds" in body else " No"
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}
        return {"choices": [{"text": text + " so" * (body["max_tokens"] - 1)}], "usage": usage}


@pytest.mark.parametrize("case", [PROMPT, CACHED, ANEW])
@pytest.mark.parametrize("tokens", [1, 32])
def test_an_answer_has_the_length_that_was_asked_for(case, tokens):
    body = QUESTION.body(case, tokens)
    assert (body["max_tokens"], body["ignore_eos"], body["stop_token_ids"]) == (tokens, True, [])


def test_no_reading_anew_finds_anything_in_the_cache():
    salts = {QUESTION.body(ANEW, 1)["cache_salt"] for _ in range(8)}
    assert len(salts) == 8
    assert "cache_salt" not in QUESTION.body(CACHED, 1)


def test_a_wrong_answer_is_not_timed():
    wrong = Question(bodies=QUESTION.bodies, expected={PROMPT: "Maybe"})
    with pytest.raises(AssertionError, match="'Maybe' is right"):
        timed(Server(), wrong, PROMPT, 1)


def test_an_answer_that_ends_early_is_not_timed():
    def brief(path, data):
        return {"choices": [{"text": "Yes"}], "usage": {"completion_tokens": 1}}

    with pytest.raises(AssertionError):
        timed(brief, QUESTION, PROMPT, 2)


@pytest.mark.parametrize(("case", "more"), [(PROMPT, 1), (CACHED, 1), (ANEW, 0)])
def test_the_cache_is_filled_before_the_clock_starts(case, more):
    server = Server()
    figures = measure(server, case, Load(2, 4, 8), iter([QUESTION] * 5))
    assert len(server.bodies) == 4 + more
    assert len(figures["seconds"]) == 4


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_each_case_and_load_is_a_row(example):
    rows = run(Server(), [QUESTION], example)
    asked = {(case, *load) for case, loads in example.loads.items() for load in loads}
    names = ("reads", "users", "requests", "answer_tokens")
    found = {tuple(row[name] for name in names) for row in rows}
    assert found == {(case, n, example.rounds * count, a) for case, n, count, a in asked}


def test_what_was_not_measured_has_no_figure():
    rows = run(Server(), [QUESTION], EXAMPLES["gpl"])
    report = {
        "machine": {"cores": 2, "cpu": "CPU"},
        **{"vllm": "1", "model": "m", "load_before": 0.0, "rows": rows},
        **{"num_virtual_tokens": 64, "context_tokens": 6400, "key_value_bytes_per_token": 2**14},
    }
    prompt, cached, anew = long_contexts.serving_table(report).splitlines()[2:5]
    assert prompt.startswith("| soft prompt | 64 | 1.0 MiB |")
    assert cached.startswith("| full context, cached | 6,400 | 100.0 MiB |")
    assert anew.endswith("| – |")
    assert not cached.endswith("| – |")
