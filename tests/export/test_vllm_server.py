"""vLLM's real server answers the exported files, as they are, with the tokens written here."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from serving.server import serving, vllm_command

import softprompt_fast as spf
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import student_layout

COMMAND = vllm_command()
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(COMMAND is None, reason="vLLM is not installed: make vllm"),
    pytest.mark.xdist_group("vllm"),  # one worker starts the server
]
FLAGS = ["--enable-prompt-embeds", "--dtype", "float32"]
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
        self.prompt, self.student = prompt, spf.SoftPromptModel(self.model, prompt)
        queries = folder / "queries.jsonl"
        queries.write_text("".join(json.dumps({"prompt": c}) + "\n" for c in CONVERSATIONS))
        paths = {"prompt_dir": folder / "prompt", "output_dir": self.out, "query_file": queries}
        flags = [f"--{name}={value}" for name, value in paths.items()]
        assert main(["export", "--to=vllm", f"--max_new_tokens={NEW_TOKENS}", *flags]) == 0

    def body(self, api, number):
        return (self.out / f"{api}-{number}.json").read_bytes()

    def answer(self, number):
        options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
        return spf.generate(self.student, self.tokenizer, [self.query(number)], **options)[0]

    @torch.no_grad()
    def log_probabilities(self, number, ids):
        """[len(ids), V] of the tokens that follow the query, the first of ``ids``, and so on."""
        before, after = student_layout(self.query(number), self.prompt.config.placement)
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(part, dtype=torch.long)) for part in (before, after + ids)]
        embeds = torch.cat([parts[0], self.prompt.embedding, parts[1]])
        logits = self.model(inputs_embeds=embeds[None]).logits[0]
        return logits[-len(ids) - 1 : -1].log_softmax(-1)

    def query(self, number):
        return spf.tokenize_query(self.tokenizer, CONVERSATIONS[number - 1], "")


@pytest.fixture(scope="module")
def ask(real_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # To compile takes minutes; benchmarks/serving does it.
    with serving(COMMAND, real_model, *FLAGS, "--enforce-eager", log=log) as ask:
        yield ask


@pytest.fixture(scope="module")
def exports(real_model, tmp_path_factory):
    return {p: Exported(real_model, tmp_path_factory.mktemp(p), p) for p in ("system", "prefix")}


def text_of(answer):
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def check(exported, api, number, answer):
    """The text of ``generate``; each token is our most probable one, and as probable as here.

    A wrong row may leave every token as it was, and changes the probabilities.
    """
    assert text_of(answer).strip() == exported.answer(number)
    (choice,) = answer["choices"]
    ids, told = choice["token_ids"], choice["logprobs"]
    log_q = exported.log_probabilities(number, ids)
    assert log_q.argmax(-1).tolist() == ids
    found = (
        told["token_logprobs"] if api == "completion" else [t["logprob"] for t in told["content"]]
    )
    assert found == pytest.approx(log_q[range(len(ids)), ids].tolist(), abs=1e-3)


def more_told(api, body):
    told = {"logprobs": 0} if api == "completion" else {"logprobs": True}
    return json.dumps({**json.loads(body), "return_token_ids": True, **told}).encode()


@pytest.mark.parametrize("number", [1, 2], ids=["question", "conversation"])
@pytest.mark.parametrize(
    ("placement", "api"), [("system", "completion"), ("prefix", "completion"), ("system", "chat")]
)
def test_the_server_answers_as_this_package(ask, exports, placement, api, number):
    exported = exports[placement]
    answer = ask(URLS[api], more_told(api, exported.body(api, number)))
    check(exported, api, number, answer)


def test_the_lines_of_the_readme_are_answered(ask, exports):
    """What curl would send, byte for byte."""
    exported = exports["system"]
    readme = (exported.out / "README.md").read_text()
    lines = re.search(r"```sh\n(.*)```", readme, re.DOTALL)[1].splitlines()
    serve, *requests = map(shlex.split, lines)
    assert serve[:2] == ["vllm", "serve"]
    assert serve[3:] == FLAGS
    assert len(requests) == 2
    for curl in requests:
        body = Path(curl[-1].removeprefix("@")).read_bytes()
        answer = ask(curl[1].removeprefix("localhost:8000"), body)
        assert text_of(answer).strip() == exported.answer(1)


def test_one_wrong_row_is_seen(ask, exports):
    exported = exports["system"]
    body = json.loads(exported.body("completion", 1))
    embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    row = len(exported.query(1).before) + P // 2  # of the soft prompt
    embeds[row] = embeds[row].flip(0)
    file = io.BytesIO()
    torch.save(embeds, file)
    body["prompt_embeds"] = base64.b64encode(file.getvalue()).decode()
    answer = ask(URLS["completion"], more_told("completion", json.dumps(body)))
    with pytest.raises(AssertionError):
        check(exported, "completion", 1, answer)
