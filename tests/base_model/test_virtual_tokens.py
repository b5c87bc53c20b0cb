"""Models that look up more by a token's id than its embedding, and vectors that no token has."""

from __future__ import annotations

import pytest
import torch
from toy import PER_LAYER, make_model, make_tokenizer
from toy_run import train_flags
from toy_teacher import NEW_TOKENS, make_queries
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from softprompt_fast.base_model.checks import check_model, check_reads_embeds
from softprompt_fast.base_model.output_head import OutputHead
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import student_layout
from softprompt_fast.student.generation import generate
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.answers import Answer
from softprompt_fast.teacher.examples import TrainingExample

KNOWN = [
    name for name in PER_LAYER if PER_LAYER[name]["model_type"] in CONFIG_MAPPING_NAMES
]  # the oldest transformers has no Gemma 4
per_layer = pytest.mark.parametrize("architecture", KNOWN)


def make_student(model) -> SoftPromptModel:
    config = SoftPromptConfig(num_virtual_tokens=4, prompt_tuning_init="random")
    return SoftPromptModel(model, SoftPrompt.from_model(model, make_tokenizer(), config))


def oracle(student, query, answer: list[int]) -> torch.Tensor:
    """Logits [n, V] at the answer's positions. The model's own code looks up id 0, the padding, for
    a virtual token, as it does for an image."""
    before, after = student_layout(query, "system")
    model, embed = student.base, student.base.get_input_embeddings()
    ids = torch.tensor([[*before, 0, 0, 0, 0, *after, *answer[:-1]]])
    embeds = embed(ids).index_copy(
        1, torch.arange(len(before), len(before) + 4), student.prompt.embedding[None]
    )
    body = model.get_decoder()
    hidden = body(inputs_embeds=embeds, per_layer_inputs=body.get_per_layer_inputs(ids))[0]
    return OutputHead.from_model(model).logits(hidden)[0, -len(answer) :]


@per_layer
def test_virtual_tokens_have_the_per_layer_inputs_of_a_placeholder(architecture):
    student = make_student(make_model(architecture))
    answers = [[5, 6, 7], [70, 80, 90, 100, 110], [1]]
    queries = make_queries()[:3]
    examples = [
        TrainingExample(query=q, answer=Answer(ids=ids))
        for q, ids in zip(queries, answers, strict=True)
    ]
    expected = torch.cat([oracle(student, q, a) for q, a in zip(queries, answers, strict=True)])
    (wanted,) = torch.autograd.grad(expected.square().sum(), student.prompt.embedding)
    for packing in (False, True):
        batch = student.collator(packing=packing, with_examples=True)(examples)
        order = [examples.index(example) for example in batch.pop("examples")]
        batch.pop("sources")
        hidden = student(**batch)
        logits = OutputHead.from_model(student.base).logits(hidden)
        starts = [0, 3, 8, 9]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
        torch.testing.assert_close(logits, expected[rows], atol=1e-4, rtol=1e-4)
        (found,) = torch.autograd.grad(logits.square().sum(), student.prompt.embedding)
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@per_layer
@torch.no_grad()
def test_what_is_written_reads_them_so_too(architecture):
    student, tokenizer = make_student(make_model(architecture)), make_tokenizer()
    queries, expected = make_queries(), []
    for query in queries:
        ids = [0]
        while len(ids) <= NEW_TOKENS and tokenizer.eos_token_id not in ids:
            ids.insert(-1, int(oracle(student, query, ids)[-1].argmax()))
        expected.append(tokenizer.decode(ids[:-1], skip_special_tokens=True).strip())
    options = {"max_new_tokens": NEW_TOKENS, "show_progress": False}
    assert generate(student, tokenizer, queries, **options) == expected
    assert len(set(expected)) > 1


@per_layer
def test_who_passes_embeddings_alone_is_warned_off(architecture, tmp_path, capsys):
    with pytest.raises(ValueError, match="looks up more by a token's id"):
        check_reads_embeds(make_model(architecture))
    check_reads_embeds(make_model("gemma3"))
    train = train_flags(tmp_path, max_steps=1)
    make_model(architecture).save_pretrained(tmp_path / "model")
    assert main(train) == 0
    run = ["--prompt_dir", str(tmp_path / "run")]
    assert main(["generate", *run, "When?"]) == 0
    assert main(["export", *run, "--to", "peft", "--output_dir", str(tmp_path / "peft")]) == 1
    assert "looks up more by a token's id" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_a_model_that_virtual_tokens_do_not_reach_is_refused():
    model = make_model("llama")
    own = model.get_input_embeddings().weight.detach().clone()

    def nearest(module, args, options):  # an embedding that is mapped back to a token's
        found = torch.cdist(options["inputs_embeds"], own[None]).argmin(-1)
        return args, {**options, "inputs_embeds": own[found]}

    def by_embeds(module, args, options):
        embeds = module.get_input_embeddings()(options["input_ids"])
        return args, {**options, "input_ids": None, "inputs_embeds": embeds}

    body = model.get_decoder()
    body.register_forward_pre_hook(by_embeds, with_kwargs=True)
    check_model(model)
    body.register_forward_pre_hook(nearest, with_kwargs=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not read its input embeddings as"):
        check_model(model)
