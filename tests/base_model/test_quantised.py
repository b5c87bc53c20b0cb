"""Quantised models, and others that rewrite what they hold: they stay the same model in use."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload
from toy import SWITCHING, make_model, make_tokenizer
from toy_run import train_flags
from toy_teacher import given_answers, make_queries, make_teacher
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from softprompt_fast.base_model import loading
from softprompt_fast.base_model.checks import check_model
from softprompt_fast.base_model.fingerprint import base_facts, differences
from softprompt_fast.base_model.loading import load_model
from softprompt_fast.base_model.output_head import OutputHead
from softprompt_fast.cli.main import main
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.answers import Answer
from softprompt_fast.teacher.examples import TrainingExample
from softprompt_fast.teacher.facts import weights_sha256


def bitsandbytes(**options):
    return lambda plain: load_as(plain, BitsAndBytesConfig(**options))


def torchao(plain):
    from torchao.quantization import Int8WeightOnlyConfig

    return load_as(plain, TorchAoConfig(Int8WeightOnlyConfig()))


def load_as(plain, config):
    return AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map={"": "cpu"}
    )


def compressed_tensors(plain):
    """4 bits with a scale for each row, packed in words."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(plain)
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    options = {"format": "pack-quantized", "quantization_status": "frozen"}
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], **options)
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 7
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    save = model.save_pretrained
    model.save_pretrained = lambda path: (save(path), compressor.update_config(path))
    return model


FORMS = {
    "nf4": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4": ("bitsandbytes", bitsandbytes(load_in_4bit=True)),
    "int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "torchao": ("torchao", torchao),
    "compressed-tensors": ("compressed_tensors", compressed_tensors),
}
each_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
            ),
        )
        for name, (package, _) in FORMS.items()
    ],
)


def save_quantised(folder, form, model=None, tokenizer=None):
    """``model``, or the toy, quantised and saved in ``folder``."""
    (model or make_model()).save_pretrained(folder / "plain")
    _, quantise = FORMS[form]
    quantise(folder / "plain").save_pretrained(folder / "model")
    (tokenizer or make_tokenizer()).save_pretrained(folder / "model")
    shutil.rmtree(folder / "plain")
    return folder / "model"


@torch.no_grad()
def use(model):
    for length in (1, 8, 200):
        model(input_ids=torch.arange(length)[None], use_cache=False)


@each_form
def test_a_quantised_model_stays_the_same_when_it_is_used(form, tmp_path):
    path = save_quantised(tmp_path, form)
    model, _ = load_model(path, device="cpu")
    facts, digest = base_facts(model), weights_sha256(model)
    assert facts["quantization"] == FORMS[form][0].replace("_", "-")
    use(model)
    assert base_facts(model) == facts
    assert weights_sha256(model) == digest
    anew, _ = load_model(path, device="cpu")
    use(anew)  # before anybody asks
    assert weights_sha256(anew) == digest
    assert base_facts(anew) == facts


@each_form
def test_another_quantised_model_is_another(form, tmp_path):
    other = make_model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    for name, model in (("one", make_model()), ("other", other)):
        (tmp_path / name).mkdir()
        save_quantised(tmp_path / name, form, model)
    one, other = (load_model(tmp_path / n / "model", device="cpu")[0] for n in ("one", "other"))
    (difference,) = differences(base_facts(one), base_facts(other))
    assert difference.startswith("weights: ")
    assert "compared, model.layers.1.mlp.up_proj.weight" in difference
    assert weights_sha256(one) != weights_sha256(other)
    plain = differences(base_facts(one), base_facts(make_model()))
    assert any(line.startswith("quantization: prompt ") for line in plain)


def test_bitsandbytes_does_not_pack_a_model_that_is_to_be_trained(tmp_path, monkeypatch):
    """On a CPU with AVX512-BF16 its first call packs 4 bits for inference, without gradients."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    packed = []
    pack = modules._convert_weight_packed_for_cpu
    monkeypatch.setattr(
        modules, "_convert_weight_packed_for_cpu", lambda *args: packed.append(1) or pack(*args)
    )
    big = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # whole blocks of scales
    model, _ = load_model(save_quantised(tmp_path, "fp4", make_model(**big)), device="cpu")
    base_facts(model)
    use(model)
    assert not packed
    for layer in model.modules():
        if isinstance(layer, modules.Linear4bit):
            layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(ValueError, match=r"q_proj: bitsandbytes has packed its 4 bits for inf"):
        make_teacher(model)


@each_form
def test_gradients_are_those_of_the_numbers_that_it_computes_with(form, tmp_path):
    model, tokenizer = load_model(save_quantised(tmp_path, form), device="cpu")
    plain = make_model()
    base_facts(model)
    with torch.no_grad():
        for name, layer in plain.model.layers.named_modules():
            if isinstance(layer, torch.nn.Linear):
                quantised = model.model.layers.get_submodule(name)
                layer.weight.copy_(quantised(torch.eye(layer.in_features)).T)
    config = SoftPromptConfig(num_virtual_tokens=4, prompt_tuning_init="random")
    prompt = SoftPrompt.from_model(plain, tokenizer, config)
    found = []
    for base in (model, plain):
        prompt.base = base_facts(base)
        student = SoftPromptModel(base, prompt)
        (answer, *_) = given_answers()
        batch = student.collator()(
            [TrainingExample(query=make_queries()[0], answer=Answer(ids=answer))]
        )
        batch.pop("sources")
        loss = OutputHead.from_model(base).logits(student(**batch)).logsumexp(-1).sum()
        found.append(torch.autograd.grad(loss, student.prompt.embedding)[0])
    # In 8 bits bitsandbytes rounds what a layer reads, too.
    assert (found[0] - found[1]).norm() <= (0.2 if form == "int8" else 1e-3) * found[1].norm()


@pytest.mark.parametrize(
    "model",
    [
        # Halves the weights of every sixth layer when it first answers.
        functools.partial(
            AutoConfig.for_model, "rwkv", vocab_size=99, hidden_size=32, num_hidden_layers=7,
            attention_hidden_size=32, rescale_every=6,
        ),
        # Keeps the angles of its last call.
        functools.partial(AutoConfig.for_model, **SWITCHING["longrope"], vocab_size=259,
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0),
    ],
    ids=["rwkv", "longrope"],
)  # fmt: skip
def test_so_does_a_plain_one_that_rewrites_what_it_holds(model):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model()).eval()
    held = {
        name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    facts, digest = base_facts(model), weights_sha256(model)
    with torch.no_grad():
        model(input_ids=torch.arange(150)[None] % 99)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert any(not torch.equal(held[name], now[name]) for name in held), "nothing was rewritten"
    assert base_facts(model) == facts
    assert weights_sha256(model) == digest


@pytest.mark.slow
@each_form
def test_it_trains_and_its_prompt_and_its_teachers_work_are_its_own(form, tmp_path, capsys):
    flags = {"max_steps": 2, "teacher_cache": tmp_path / "cache"}
    first, second = (train_flags(tmp_path, output, **flags) for output in ("run", "again"))
    shutil.rmtree(tmp_path / "model")
    save_quantised(tmp_path, form)
    assert main(first) == 0
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    assert main(second) == 0
    assert shards == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    run = ["--prompt_dir", str(tmp_path / "run")]
    assert main(["eval", *run]) == 0
    assert main(["generate", *run, "When?"]) == 0
    assert main(["export", *run, "--to", "vllm", "--output_dir", str(tmp_path / "out"), "Hi"]) == 0
    assert "MatMul8bitLt" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["nf4"])
def test_it_keeps_the_dtype_that_it_was_quantised_in(form, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    path = save_quantised(tmp_path, form, make_model(dtype=torch.bfloat16))
    monkeypatch.setattr(loading, "is_native", lambda *_: False)
    model, _ = load_model(path, device="cpu")
    assert OutputHead.from_model(model).weight.dtype == torch.bfloat16
    use(model)
    with contextlib.suppress(ValueError):  # some versions of transformers can change it
        assert load_model(path, dtype="float32", device="cpu")[0].dtype == torch.float32


def test_what_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    path = save_quantised(tmp_path, "nf4")
    with pytest.raises(
        ValueError, match=r"is quantised \(bitsandbytes\), and its layers cannot be"
    ):
        load_model(path, device="cpu", shard=True)
    model, _ = load_model(path, device="cpu")
    model.lm_head = model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM is quantised"):
        OutputHead.from_model(model)


def test_layers_may_be_offloaded_and_the_rest_not():
    offloaded = make_model()
    cpu_offload(offloaded.model.layers)
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    assert base_facts(offloaded) == base_facts(make_model())
    teacher, expected = make_teacher(offloaded), make_teacher(make_model())
    queries = make_queries()
    assert [a.ids for a in teacher.answer(queries)] == [a.ids for a in expected.answer(queries)]
    with pytest.raises(ValueError, match="needs the whole model in memory, and model.layers.0."):
        weights_sha256(offloaded)
    for part, message in (("lm_head", "output head"), ("model.embed_tokens", "input embedding")):
        model = make_model()
        cpu_offload(model.get_submodule(part))
        with pytest.raises(ValueError, match=f"the {message} of LlamaForCausalLM is offloaded"):
            check_model(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "quanto", "eetq"])
def test_a_missing_quantiser_is_named(method, tmp_path, capsys):
    train = train_flags(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 32}
    config.save_pretrained(tmp_path / "model")
    assert main(train) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "error: " in said
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.xdist_group("the real model")
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_real_model(form, real_model, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train = train_flags(
        tmp_path,
        max_steps=8,
        learning_rate=0.02,
        num_virtual_tokens=16,
        teacher_cache=tmp_path / "cache",
    )
    shutil.rmtree(tmp_path / "model")
    save_quantised(tmp_path, form, *load_model(real_model, device="cpu"))
    assert main(train) == 0
    assert main(["doctor", str(tmp_path / "run")]) == 0
    run = ["--prompt_dir", str(tmp_path / "run")]
    assert main(["eval", *run]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    kl = {name: row["kl"] for name, row in report["conditions"].items()}
    assert kl["soft prompt"] < kl["no context"], kl
    capsys.readouterr()
    assert main(["generate", *run, "When are you open?"]) == 0
    answer = capsys.readouterr().out.strip()
    assert answer
    for to in ("peft", "vllm", "safetensors"):
        out = str(tmp_path / to)
        assert main(["export", *run, "--to", to, "--output_dir", out]) == 0
