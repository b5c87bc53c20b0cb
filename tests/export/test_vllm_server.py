"""vLLM's real server answers the exported files, as they are, with the tokens written here."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex

import pytest
import torch
from serving.server import serving, vllm_command

import softprompt_fast as spf
from softprompt_fast.cli.main import main
from softprompt_fast.student import generation

COMMAND = vllm_command()
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(COMMAND is None, reason="vLLM is not installed: make vllm"),
    pytest.mark.xdist_group("vllm"),  # one worker starts the server
]
P, NEW_TOKENS = 32, 24
CONTEXT = "Spanner & Chain mends bicycles. Open from 9 to 18. Sandals are not safe here."
ASKED = ["Can I wear sandals in the workshop?", "When are you open?"]
CONVERSATIONS = [
    [{"role": "user", "content": ASKED[0]}],
    [
        {"role": "user", "content": ASKED[0]},
        {"role": "assistant", "content": "No, sandals are not safe."},
        {"role": "user", "content": ASKED[1]},
    ],
]
URLS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


class Exported:
    """A soft prompt, the files that the command made of it, and the answers of this package."""

    def __init__(self, real_model, folder, placement):
        self.out = folder / "out"
        self.model, self.tokenizer = spf.load_model(str(real_model))
        config = spf.SoftPromptConfig(num_virtual_tokens=P, placement=placement)
        prompt = spf.SoftPrompt.from_model(self.model, self.tokenizer, config, CONTEXT)
        # As after training: no longer the embeddings of any tokens.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(prompt.embedding.shape, generator=generator)
        prompt.embedding.data += 0.2 * prompt.embedding.std() * noise
        prompt.save_pretrained(folder / "prompt")
        self.student = spf.SoftPromptModel(self.model, prompt)
        queries = folder / "queries.jsonl"
        queries.write_text("".join(json.dumps({"prompt": c}) + "\n" for c in CONVERSATIONS))
        paths = {"prompt_dir": folder / "prompt", "output_dir": self.out, "query_file": queries}
        flags = [f"--{name}={value}" for name, value in paths.items()]
        assert main(["export", "--to=vllm", f"--max_new_tokens={NEW_TOKENS}", *flags]) == 0

    def body(self, api, number):
        return (self.out / f"{api}-{number}.json").read_bytes()

    def answer(self, number, monkeypatch):
        """The text of ``generate`` and the ids that it is made of."""
        rows = []

        def recorded(*args, **options):
            rows.extend(write(*args, **options))
            return rows

        write = generation.write
        query = spf.tokenize_query(self.tokenizer, CONVERSATIONS[number - 1], "")
        options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
        with monkeypatch.context() as patch:
            patch.setattr(generation, "write", recorded)
            (text,) = spf.generate(self.student, self.tokenizer, [query], **options)
        return text, rows[0]


@pytest.fixture(scope="module")
def ask(real_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    flags = ["--enable-prompt-embeds", "--dtype=float32"]
    flags += ["--enforce-eager"]  # to compile takes minutes, and benchmarks/serving does it
    with serving(COMMAND, real_model, *flags, log=log) as ask:
        yield ask


@pytest.fixture(scope="module")
def exports(real_model, tmp_path_factory):
    return {p: Exported(real_model, tmp_path_factory.mktemp(p), p) for p in ("system", "prefix")}


@pytest.fixture
def in_system(exports):
    return exports["system"]


def text_and_ids(answer):
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["token_ids"]


def with_ids(body):
    return json.dumps({**json.loads(body), "return_token_ids": True}).encode()


@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("number", [1, 2], ids=["question", "conversation"])
def test_completions_are_answered_as_here(ask, exports, placement, number, monkeypatch):
    exported = exports[placement]
    answer = ask(URLS["completion"], with_ids(exported.body("completion", number)))
    text, ids = text_and_ids(answer)
    assert (text.strip(), ids) == exported.answer(number, monkeypatch)


@pytest.mark.parametrize("number", [1, 2], ids=["question", "conversation"])
def test_chats_are_answered_as_here(ask, in_system, number, monkeypatch):
    answer = ask(URLS["chat"], with_ids(in_system.body("chat", number)))
    text, ids = text_and_ids(answer)
    assert (text.strip(), ids) == in_system.answer(number, monkeypatch)


def test_the_lines_of_the_readme_are_answered(ask, in_system, monkeypatch):
    """What curl would send, byte for byte."""
    lines = re.search(r"```sh\n(.*)```", (in_system.out / "README.md").read_text(), re.DOTALL)[1]
    serve, *requests = map(shlex.split, lines.splitlines())
    assert serve[:2] == ["vllm", "serve"]
    assert serve[3:] == ["--enable-prompt-embeds", "--dtype", "float32"]
    assert len(requests) == 2
    expected, _ = in_system.answer(1, monkeypatch)
    for curl in requests:
        path = curl[1].removeprefix("localhost:8000")
        file = in_system.out / curl[-1].rpartition("/")[2]
        (choice,) = ask(path, file.read_bytes())["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert text.strip() == expected


def test_a_row_that_is_changed_changes_the_answer(ask, in_system, monkeypatch):
    """So the comparison would see an error in a file."""
    body = json.loads(in_system.body("completion", 1))
    embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    embeds[-1] = embeds[-1].flip(0)
    file = io.BytesIO()
    torch.save(embeds, file)
    body["prompt_embeds"] = base64.b64encode(file.getvalue()).decode()
    answer = ask(URLS["completion"], with_ids(json.dumps(body)))
    assert text_and_ids(answer)[1] != in_system.answer(1, monkeypatch)[1]
