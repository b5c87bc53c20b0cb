"""The soft prompt: its start values, and its form on disk."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import PeftModel
from toy import ARCHITECTURES, make_model, make_tokenizer

from softprompt_fast.base_model.output_head import hidden_states
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig

P = 5


def make_prompt(model, *, context="Open at 10, closed on Monday.", **options) -> SoftPrompt:
    config = SoftPromptConfig(num_virtual_tokens=P, **options)
    return SoftPrompt.from_model(model, make_tokenizer(), config, context)


def test_starts_as_the_tokens_of_the_context_or_of_a_text():
    model, tokenizer = make_model(dtype=torch.bfloat16), make_tokenizer()
    embed = model.get_input_embeddings()
    prompt = make_prompt(model, context="Hello world")
    assert prompt.embedding.dtype == torch.float32 and prompt.embedding.requires_grad
    assert torch.equal(prompt.embedding, embed(torch.tensor(tokenizer("Hello")["input_ids"])))

    repeated = make_prompt(model, prompt_tuning_init="text", prompt_tuning_init_text="abc")
    assert torch.equal(repeated.embedding, embed(torch.tensor(tokenizer("abcab")["input_ids"])))


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_sampled_starts_have_the_embedding_scale_and_follow_the_seed(init):
    # Gemma multiplies its embeddings by sqrt(D): the scale is that of what the layers are given.
    model = make_model("gemma3")
    options = dict(prompt_tuning_init=init, num_virtual_tokens=200)
    one, same, other = (
        SoftPrompt.from_model(model, None, SoftPromptConfig(prompt_seed=seed, **options)).embedding
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    given_to_the_layers = model.get_input_embeddings()(torch.arange(1, 250))
    assert one.std().item() == pytest.approx(given_to_the_layers.std().item(), rel=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_peft_gives_the_same_logits_for_a_prefix_prompt(tmp_path, architecture):
    model = make_model(architecture)
    prompt = make_prompt(model, placement="prefix")
    prompt.save_pretrained(tmp_path)
    ids = torch.tensor([make_tokenizer()("When do you open?")["input_ids"]])

    ours = SoftPromptModel(model, prompt)
    padded = torch.cat([ids.new_zeros(1, P), ids], dim=1)
    where = torch.arange(padded.shape[1])[None] < P
    with torch.no_grad():
        hidden = hidden_states(model, inputs_embeds=ours.inputs_embeds(padded, where))
        expected = ours.head.logits(hidden)
        theirs = PeftModel.from_pretrained(model, tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(theirs, expected)


def test_a_model_left_in_training_mode_is_taken_without_its_dropout():
    model = make_model("gpt2").train()  # its configuration has dropout
    SoftPromptModel(model, make_prompt(model))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saves_and_loads_exactly(tmp_path, architecture):
    model = make_model(architecture)
    prompt = make_prompt(model)
    prompt.save_pretrained(tmp_path)
    loaded = SoftPrompt.from_pretrained(tmp_path, model)
    assert torch.equal(loaded.embedding, prompt.embedding)
    assert loaded.config == prompt.config
    # The same model in another dtype is still the same model.
    SoftPrompt.from_pretrained(tmp_path, make_model(architecture, dtype=torch.bfloat16))


def test_a_save_that_fails_leaves_the_old_prompt(tmp_path, monkeypatch):
    model = make_model()
    old, new = make_prompt(model), make_prompt(model, prompt_tuning_init="random")
    old.save_pretrained(tmp_path)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path)
    assert torch.equal(SoftPrompt.from_pretrained(tmp_path, model).embedding, old.embedding)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_base_model_is_refused_with_the_differing_fields(tmp_path):
    make_prompt(make_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another model.*weights: \d+ of \d+ compared, "):
        SoftPrompt.from_pretrained(tmp_path, make_model(seed=1))
    with pytest.raises(ValueError, match="model_type: prompt 'llama', model 'gpt2'"):
        SoftPrompt.from_pretrained(tmp_path, make_model("gpt2"))


def test_a_fine_tuned_base_model_is_refused(tmp_path):
    """It may keep the embedding bit for bit."""
    make_prompt(make_model()).save_pretrained(tmp_path)
    tuned = make_model()
    for name, weight in tuned.named_parameters():
        if "q_proj" in name:
            weight.data *= 1.05
    with pytest.raises(ValueError, match=r"weights: \d+ of \d+ compared, .*q_proj"):
        SoftPrompt.from_pretrained(tmp_path, tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prompt_belongs_to_its_model_in_every_dtype(tmp_path, dtype):
    make_prompt(make_model()).save_pretrained(tmp_path)
    SoftPrompt.from_pretrained(tmp_path, make_model().to(dtype))


class Exploit:
    def __reduce__(self):
        return (print, ("a pickle was opened",))


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_by_its_content(tmp_path, capsys, write):
    make_prompt(make_model()).save_pretrained(tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "wb") as file:
        write(Exploit(), file)
    with pytest.raises(ValueError, match="safetensors file: its content is a pickle"):
        SoftPrompt.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved soft prompt: no adapter_model"):
        SoftPrompt.from_pretrained(tmp_path)
    make_prompt(make_model()).save_pretrained(tmp_path)
    weights, facts = tmp_path / "adapter_model.safetensors", tmp_path / "soft_prompt.json"

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="adapter_model.safetensors is not a readable"):
        SoftPrompt.from_pretrained(tmp_path)
    weights.write_bytes(whole)

    values = json.loads(facts.read_text())
    values["config"]["num_virtual_tokens"] = 7
    facts.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"shape \(7, 32\): got .*\(5, 32\)"):
        SoftPrompt.from_pretrained(tmp_path)
    facts.write_text("{")
    with pytest.raises(ValueError, match="soft_prompt.json is not JSON"):
        SoftPrompt.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["config"].update(virtual=1), "config: .*argument 'virtual'"),
        (lambda facts: facts["config"].update(num_virtual_tokens="5"), "config: num_.* got '5'"),
        (lambda facts: facts["config"].update(placement="middle"), "config: placement must be"),
        (lambda facts: facts.update(config=None), "config: .* must be a mapping"),
        (lambda facts: facts.update(base=None), "base must hold hidden_size, .*: got None"),
        (lambda facts: facts["base"].pop("hidden_size"), "base must hold hidden_size, "),
    ],
    ids=["unknown", "type", "value", "no-config", "no-base", "no-width"],
)
def test_facts_that_cannot_be_used_are_named(tmp_path, change, message):
    make_prompt(make_model()).save_pretrained(tmp_path)
    file = tmp_path / "soft_prompt.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"soft_prompt.json: {message}"):
        SoftPrompt.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["16", 4.5, True], ids=repr)
def test_the_number_of_virtual_tokens_is_a_whole_number(value):
    with pytest.raises(TypeError, match=f"num_virtual_tokens must be an int: got {value!r}"):
        SoftPromptConfig(num_virtual_tokens=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_virtual_tokens=0), "num_virtual_tokens must be >= 1: got 0"),
        (dict(placement="middle"), "placement must be one of system, prefix: got 'middle'"),
        (dict(prompt_tuning_init="zeros"), "one of context, text, vocab, random: got 'zeros'"),
        (dict(prompt_tuning_init="text"), "prompt_tuning_init_text goes with"),
        (dict(prompt_tuning_init_text="hello"), "prompt_tuning_init_text goes with"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_configuration_names_its_field(options, message):
    with pytest.raises(ValueError, match=message):
        SoftPromptConfig(**options)


def test_a_context_start_needs_a_context():
    with pytest.raises(ValueError, match="needs a text of at least one token: got None"):
        make_prompt(make_model(), context=None)
