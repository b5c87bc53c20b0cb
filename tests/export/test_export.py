"""A soft prompt in the hands of other programs: what they answer is what is answered here."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch
from clock import TEMPLATE, set_day
from safetensors import safe_open
from toy import CHAT_TEMPLATE, make_model, make_tokenizer
from toy_run import QUESTIONS, write_lines

from softprompt_fast.base_model.fingerprint import tokenizer_facts
from softprompt_fast.base_model.loading import load_model
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.student.generation import generate
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.utils.files import new_directory

NEW_TOKENS = 6
OWN_SYSTEM = {"role": "system", "content": "Be brief."}


class Toy:
    """A saved model, a saved prompt for it, and the command that exports the prompt."""

    def __init__(
        self, folder, architecture="llama", placement="system", template=CHAT_TEMPLATE, **bound
    ):
        self.folder = folder
        tokenizer = make_tokenizer.__wrapped__()
        tokenizer.chat_template = template
        model = make_model(architecture)
        # What a checkpoint may bring, and no prompt is trained with.
        model.generation_config.repetition_penalty = 5.0
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        self.base, self.tokenizer = load_model(str(folder / "model"), **bound)
        config = SoftPromptConfig(
            num_virtual_tokens=4, prompt_tuning_init="random", placement=placement
        )
        self.prompt = SoftPrompt.from_model(self.base, self.tokenizer, config)
        self.prompt.save_pretrained(folder / "prompt")

    def export(self, to, *arguments) -> int:
        flags = {"prompt_dir": "prompt", "output_dir": "out"}
        paths = [f"--{name}={self.folder / value}" for name, value in flags.items()]
        return main(["export", f"--to={to}", *paths, f"--max_new_tokens={NEW_TOKENS}", *arguments])

    def answers(self, conversations) -> list[str]:
        model = SoftPromptModel(self.base, self.prompt)
        queries = [tokenize_query(self.tokenizer, messages, "") for messages in conversations]
        options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
        return [generate(model, self.tokenizer, [query], **options)[0] for query in queries]

    def answers_to(self, embeds) -> str:
        """What the model writes after these embeddings [L, D]."""
        written = self.base.generate(
            inputs_embeds=embeds[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
        )
        return self.tokenizer.decode(written[0], skip_special_tokens=True).strip()

    def read(self, name):
        return json.loads((self.folder / "out" / name).read_text())


def user(question):
    return [{"role": "user", "content": question}]


def as_vllm_reads(text) -> torch.Tensor:
    """The checks of vLLM's own reader, in its order."""
    file = io.BytesIO(base64.b64decode(text, validate=True))
    embeds = torch.load(file, weights_only=True, map_location="cpu")
    assert embeds.dim() == 2 and embeds.dtype == torch.float32
    assert embeds.shape[1] == 32 and embeds.layout == torch.strided
    # Of a view, torch.save would write all that it is a view of.
    assert embeds.untyped_storage().nbytes() == embeds.numel() * embeds.element_size()
    return embeds


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT leaves them out
@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_peft_gives_the_same_answers(tmp_path, capsys, architecture, placement):
    """By the lines that the export's own README gives."""
    toy = Toy(tmp_path, architecture, placement)
    assert toy.export("peft") == 0, capsys.readouterr().err
    readme = (tmp_path / "out/README.md").read_text()
    code = re.search(r"```python\n(.*)```", readme, re.DOTALL)[1]
    assert code in capsys.readouterr().out
    expected = toy.answers(map(user, QUESTIONS[:2]))
    assert len(set(expected)) == 2
    found = []
    for question in QUESTIONS[:2]:
        exec(code.replace('"Hi"', repr(question)), {"print": found.append})
    assert [answer.strip() for answer in found] == expected
    # As anyone else would call it; transformers 5.24, where that differs, is not installed here.
    cached = code.replace(", use_cache=False", "").replace('"Hi"', repr(QUESTIONS[0]))
    assert cached != code
    exec(cached, {"print": found.append})
    assert found[-1].strip() == expected[0]


def test_peft_where_text_that_goes_on_is_other_tokens(tmp_path, monkeypatch):
    """Then the ids come from here; the text alone would be read as something else."""
    set_day(monkeypatch, "2026-11-27")
    toy = Toy(tmp_path, template=TEMPLATE, chat_template_kwargs={"enable_thinking": False})
    monkeypatch.setattr("softprompt_fast.export.peft.text_ids", lambda tokenizer, text: [])
    assert toy.export("peft") == 0
    readme = (tmp_path / "out/README.md").read_text()
    code = re.search(r"```python\n(.*)```", readme, re.DOTALL)[1]
    assert "from softprompt_fast.data.queries import tokenize_query" in code
    found = []
    set_day(monkeypatch, "2026-11-28")
    exec(code, {"print": found.append})
    assert [found[0].strip()] == toy.answers([user("Hi")])


def test_vllm_completions_hold_the_whole_prompt(tmp_path):
    toy = Toy(tmp_path, placement="prefix")
    queries = write_lines(tmp_path / "queries.jsonl", QUESTIONS)
    assert toy.export("vllm", f"--query_file={queries}") == 0
    bodies = [toy.read(f"completion-{number}.json") for number in range(1, 6)]
    embeds = [as_vllm_reads(body.pop("prompt_embeds")) for body in bodies]
    assert [toy.answers_to(e) for e in embeds] == toy.answers(map(user, QUESTIONS))
    assert bodies[0] == {  # and no name of a model, which is another path on another machine
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [258],
    }
    # Before the template there is no place in a chat.
    assert not [*(tmp_path / "out").glob("chat*"), *(tmp_path / "out").glob("system*")]


def as_vllm_renders(toy, body) -> torch.Tensor:
    """The embeddings of a chat: a placeholder token for each virtual one, then the tensor."""
    parts = [message["content"] for message in body["messages"]]
    assert [part["type"] for part in parts[0]] == ["prompt_embeds"]
    assert body["messages"][0]["role"] == "system"
    prompt = as_vllm_reads(parts[0][0]["data"])
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.chat_template = toy.tokenizer.chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
    held = {"role": "system", "content": "<prompt_embeds>" * len(prompt)}
    ids = tokenizer.apply_chat_template(
        [held, *body["messages"][1:]],
        add_generation_prompt=True,
        return_dict=False,
        **body.get("chat_template_kwargs", {}),
    )
    ids = torch.tensor(ids)
    is_prompt = ids == tokenizer.convert_tokens_to_ids("<prompt_embeds>")
    embeds = toy.base.get_input_embeddings()(ids.masked_fill(is_prompt, 0))
    return embeds.masked_scatter(is_prompt[:, None], prompt)


def test_vllm_chats_hold_the_prompt_as_the_system_message(tmp_path, capsys):
    toy = Toy(tmp_path)
    conversation = [*user("Hi"), {"role": "assistant", "content": "Yes?"}, *user("When?")]
    own_system = [OWN_SYSTEM, *user("Hi")]
    queries = tmp_path / "queries.jsonl"
    lines = [{"prompt": messages} for messages in (user("Hi"), own_system, conversation)]
    queries.write_text("\n".join(map(json.dumps, lines)))
    assert toy.export("vllm", f"--query_file={queries}") == 0
    expected = toy.answers([user("Hi"), own_system, conversation])
    for number, answer in enumerate(expected, 1):
        embeds = as_vllm_reads(toy.read(f"completion-{number}.json")["prompt_embeds"])
        assert toy.answers_to(embeds) == answer
    chats = {number: toy.read(f"chat-{number}.json") for number in (1, 3)}
    for number, body in chats.items():
        assert toy.answers_to(as_vllm_renders(toy, body)) == expected[number - 1]
    # What a server would put between the prompt and a text beside it is the template's affair.
    assert not (tmp_path / "out/chat-2.json").exists()
    assert "Not there as a chat, for their own system message: 2." in capsys.readouterr().out
    assert toy.read("system_message.json") == chats[1]["messages"][0]


def test_vllm_is_told_what_the_chat_template_was_given(tmp_path, monkeypatch, capsys):
    set_day(monkeypatch, "2026-11-27")
    toy = Toy(tmp_path, template=TEMPLATE, chat_template_kwargs={"enable_thinking": False})
    expected = toy.answers([user("Hi")])[0]
    set_day(monkeypatch, "2026-11-28")
    assert toy.export("vllm", "Hi") == 0
    assert toy.answers_to(as_vllm_reads(toy.read("completion-1.json")["prompt_embeds"])) == expected
    body = toy.read("chat-1.json")
    given = {"enable_thinking": False, "date_string": "27 Nov 2026"}
    assert body["chat_template_kwargs"] == given
    assert toy.answers_to(as_vllm_renders(toy, body)) == expected
    assert "chat_template_kwargs" not in toy.read("completion-1.json")
    (line,) = re.findall("has to be sent with `(.*)`", capsys.readouterr().out)
    assert json.loads(f"{{{line}}}") == {"chat_template_kwargs": given}


def test_vllm_has_a_clock_of_its_own_where_the_template_takes_no_day(tmp_path, capsys):
    template = CHAT_TEMPLATE.replace("assistant\n", "assistant {{ strftime_now('%x') }}\n")
    toy = Toy(tmp_path, template=template, chat_template_date="2026-11-27")
    assert toy.export("vllm", "Hi") == 0
    assert "Completions hold that of the training, 2026-11-27;" in capsys.readouterr().out
    assert "chat_template_kwargs" not in toy.read("chat-1.json")


def test_vllm_without_a_question_gets_the_message_alone(tmp_path, capsys):
    toy = Toy(tmp_path)
    assert toy.export("vllm") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "system_message.json"]
    (tmp_path / "other").mkdir()
    for options in (dict(template=None), dict(placement="prefix")):
        toy = Toy(tmp_path / "other", **options)
        assert toy.export("vllm") == 1
        assert 'only whole prompts are left. Give a "QUESTION"' in capsys.readouterr().err
        assert not (tmp_path / "other/out").exists()


def test_a_safetensors_file_is_read_by_safetensors_alone(tmp_path, monkeypatch):
    toy = Toy(tmp_path, placement="prefix")
    # The model is not needed; it may be on another machine.
    (tmp_path / "model").rename(tmp_path / "moved")
    assert toy.export("safetensors") == 0
    with safe_open(tmp_path / "out/soft_prompt.safetensors", "pt") as file:
        assert file.keys() == ["prompt_embeddings"]
        assert torch.equal(file.get_tensor("prompt_embeddings"), toy.prompt.embedding)
        assert file.metadata() == {
            "format": "pt",
            "placement": "prefix",
            "num_virtual_tokens": "4",
            "base_model_name_or_path": str(tmp_path / "model"),
            "model_type": "llama",
            "vocab_size": "259",
            "hidden_size": "32",
            "num_hidden_layers": "2",
            "num_attention_heads": "4",
            **tokenizer_facts(toy.tokenizer),
        }


def test_a_safetensors_file_says_what_the_chat_template_was_given(tmp_path):
    toy = Toy(tmp_path, template=TEMPLATE, chat_template_kwargs={"enable_thinking": False})
    assert toy.export("safetensors") == 0
    with safe_open(tmp_path / "out/soft_prompt.safetensors", "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["chat_template_kwargs"]) == {"enable_thinking": False}
    assert facts["chat_template_date"] == toy.prompt.template["chat_template_date"]


def test_an_export_replaces_nothing_and_leaves_nothing_half_done(tmp_path, capsys, monkeypatch):
    toy = Toy(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    assert toy.export("safetensors") == 1
    assert "is occupied: nothing there is replaced" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()

    def no_space(*parts):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        assert toy.export("safetensors") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert list(out.iterdir()) == []
    assert toy.export("safetensors") == 0  # an empty directory is free

    with pytest.raises(OSError, match="cannot write to output_dir .*: Not a directory"):  # noqa: SIM117
        with new_directory("output_dir", str(tmp_path / "out/README.md/x")):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=onnx"], "argument --to: invalid choice: 'onnx'"),
        (["--to=peft", "Hi"], "queries go with --to vllm only: peft is for any query"),
        (["--to=safetensors", "--query_file=q"], "queries go with --to vllm only"),
        (["--to=vllm", "--query_file=q", "Hi"], "give a question or --query_file, not both"),
        (["--to=vllm", "--query_file="], "--query_file is empty"),
        (["--to=vllm", " "], "the question is empty"),
        (["--to=vllm", "--query_file=/none.jsonl"], "/none.jsonl: No such file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_said_before_the_model_loads(tmp_path, capsys, arguments, message):
    code = main(
        ["export", f"--prompt_dir={tmp_path}", f"--output_dir={tmp_path / 'o'}", *arguments]
    )
    assert code in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_query_that_does_not_fit_leaves_nothing(tmp_path, capsys):
    toy = Toy(tmp_path)
    assert toy.export("vllm", "x" * 600) == 1
    assert "the question: 4 virtual tokens, the query's 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
