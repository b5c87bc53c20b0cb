"""Training: the loss, its normalisation, and checkpoints that are as good as never stopping."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from toy import make_model
from toy_trainer import LENGTHS, make_examples, make_trainer, trained
from transformers import TrainingArguments

import softprompt_fast as spf
from softprompt_fast.student.soft_prompt import SoftPrompt
from softprompt_fast.training import checkpointed_trainer
from softprompt_fast.training.checkpoints import last_good_checkpoint
from softprompt_fast.training.trainer import SoftPromptTrainer, SoftPromptTrainingArguments


@pytest.mark.parametrize("placement", ["system", "prefix"])
def test_learns_the_teacher(tmp_path, placement):
    trainer = make_trainer(tmp_path, placement=placement, max_steps=100, learning_rate=0.2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before


@pytest.mark.parametrize(
    "options",
    [
        dict(objective="nll"),
        dict(objective="kl"),
        dict(objective="kl", beta=0.5, temperature=2.0),
        dict(objective="mix", alpha=0.3),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", pytest.param("cohere", marks=pytest.mark.slow)]
)
def test_fused_and_reference_losses_train_alike(tmp_path, architecture, options):
    model = make_model(architecture)
    examples = make_examples(model, record_hidden=options["objective"] != "nll")
    runs = [
        trained(make_trainer(tmp_path, model=model, examples=examples, loss_impl=impl, **options))
        for impl in ("fused", "reference")
    ]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
    assert runs[0][1][0] > 0


def test_gradient_accumulation_divides_by_all_answer_tokens(tmp_path):
    # Plain SGD shows a gradient of the wrong size; Adam would hide it.
    options = dict(optim="sgd", learning_rate=0.5, seed=3)
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **options)
    parts = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    torch.testing.assert_close(trained(whole), trained(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_fp16_gradients_do_not_underflow_in_a_step_of_many_tokens(tmp_path, impl):
    trainer = make_trainer(tmp_path, model=make_model(dtype=torch.float16), loss_impl=impl)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    prompt, tokens = trainer.model.prompt.embedding, 2**20
    values, gradients = [], []
    for count in (1, tokens):
        prompt.grad = None
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
        loss.backward()
        values.append(loss * count)
        gradients.append(prompt.grad * count)
    # Dividing by a power of two is exact: any difference is a gradient that fp16 could not hold.
    assert torch.equal(*values)
    assert torch.equal(*gradients)


def test_evaluation_is_the_mean_over_answer_tokens(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    student, examples = trainer.model, list(trainer.eval_dataset)
    batch = trainer.data_collator(examples)
    batch.pop("sources")
    teacher = batch.pop("teacher_hidden")
    with torch.no_grad():
        expected = spf.reference.linear_kl(
            student(**batch), student.head.weight, teacher, **student.head.loss_options()
        )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_logits_are_computed_in_training(tmp_path):
    trainer = make_trainer(tmp_path)

    def refuse(*args):
        raise AssertionError("the model's own head was called")

    trainer.model.base.get_output_embeddings().register_forward_hook(refuse)
    projected = []
    impl = spf.linear_kl
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            spf.losses, "linear_kl", lambda h, *a, **k: projected.append(len(h)) or impl(h, *a, **k)
        )
        trainer.train()
    assert sum(projected) == 3 * sum(LENGTHS)  # 6 steps of 8 of the 16 examples


def test_prompt_and_optimizer_are_fp32_over_a_bf16_base(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(dtype=torch.bfloat16))
    assert trainer.train_dataset[0].answer.hidden.dtype == torch.bfloat16
    before = trainer.model.prompt.embedding.detach().clone()
    after, _ = trained(trainer)
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    (state,) = trainer.optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert {p.dtype for p in trainer.model.base.parameters()} == {torch.bfloat16}


def test_only_the_prompt_is_trained_and_the_base_stays_in_eval_mode(tmp_path):
    model = make_model("gpt2")  # its configuration has dropout
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert trainer.model.training is True and not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


SAVING = dict(save_steps=1, save_total_limit=None, per_device_train_batch_size=4)


def test_a_resumed_run_is_bitwise_an_undisturbed_one(tmp_path):
    undisturbed = trained(make_trainer(tmp_path / "one", **SAVING))
    # Step 3 is in the middle of the first epoch of 4 steps.
    for step in range(4, 7):
        shutil.rmtree(tmp_path / "one" / f"checkpoint-{step}")
    resumed = trained(make_trainer(tmp_path / "one", **SAVING), resume_from_checkpoint=True)
    assert torch.equal(resumed[0], undisturbed[0])
    assert resumed[1] == undisturbed[1]


def test_a_checkpoint_holds_the_prompt_and_no_base(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "soft_prompt.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_log.json",
        "manifest.json",
    }
    saved = SoftPrompt.from_pretrained(tmp_path / "checkpoint-6", trainer.model.base)
    assert torch.equal(saved.embedding, trainer.model.prompt.embedding)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_from_manifest(path):
    values = json.loads(path.read_text())
    del values["files"]["rng_state.pth"]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("optimizer.pt", truncate, "optimizer.pt is not the file that was saved"),
        ("adapter_model.safetensors", flip, "adapter_model.safetensors is not the file"),
        ("trainer_state.json", lambda path: path.unlink(), "trainer_state.json is missing"),
        ("manifest.json", lambda path: path.unlink(), "is incomplete: it has no manifest.json"),
        ("manifest.json", truncate, "manifest.json is not JSON"),
        ("manifest.json", drop_from_manifest, "cannot be resumed: it was saved without rng_state"),
    ],
    ids=["truncated", "flipped", "missing", "no-manifest", "cut-manifest", "no-rng"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, file, damage, message):
    make_trainer(tmp_path, **SAVING, max_steps=2).train()
    damage(tmp_path / "checkpoint-2" / file)
    if file == "manifest.json" and damage is truncate:
        damage(tmp_path / "checkpoint-2" / file)
    with pytest.warns(UserWarning, match=f"skipped: .*{message}"):
        assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **SAVING).train(str(tmp_path / "checkpoint-2"))


def test_there_may_be_no_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path / "absent") is None
    with pytest.raises(ValueError, match="holds no good checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_prompt_is_refused(tmp_path):
    make_trainer(tmp_path, **SAVING, max_steps=1).train()
    with pytest.raises(ValueError, match="holds another kind of soft prompt.*placement='system'"):
        make_trainer(tmp_path, placement="prefix", max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="belongs to another model.*weights: "):
        make_trainer(tmp_path, model=make_model(seed=1)).train(resume_from_checkpoint=True)


def test_rotation_waits_for_the_new_checkpoint_and_keeps_the_best(tmp_path, monkeypatch):
    seen = []
    write_manifest = checkpointed_trainer.write_manifest

    def spy(checkpoint):
        seen.append((checkpoint.name, sorted(path.name for path in tmp_path.iterdir())))
        write_manifest(checkpoint)

    monkeypatch.setattr(checkpointed_trainer, "write_manifest", spy)
    trainer = make_trainer(
        tmp_path,
        **(SAVING | dict(save_total_limit=2)),
        eval_strategy="steps",
        eval_steps=1,
        # The largest loss counts as the best, which is that of step 1 while the prompt learns.
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    assert seen[2] == ("checkpoint-3", ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-6"]
    assert trainer.args.save_total_limit == 2


def test_the_best_prompt_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **SAVING,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = SoftPrompt.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < 6
    assert torch.equal(trainer.model.prompt.embedding, best.embedding)


def test_a_loss_that_is_not_finite_stops_and_names_the_examples(tmp_path):
    model = make_model()
    examples = make_examples(model)
    trainer = make_trainer(tmp_path, model=model, examples=examples, **SAVING)
    for number, example in enumerate(examples):
        object.__setattr__(example.query, "source", f"train.jsonl:{number}")
    examples[5].answer.hidden[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d, on: .*train.jsonl:5"):
        trainer.train()
    assert trainer.model.prompt.embedding.isfinite().all()


def test_a_prompt_that_is_not_finite_is_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    with torch.no_grad():
        trainer.model.prompt.embedding[0, 0] = torch.inf
    with pytest.raises(ValueError, match="entries that are not finite"):
        trainer.save_model()
    assert SoftPrompt.from_pretrained(tmp_path).embedding.isfinite().all()


def test_missing_teacher_states_are_named(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="objective='mix' needs the teacher's hidden states"):
        examples = make_examples(model, record_hidden=False)
        make_trainer(tmp_path, model=model, examples=examples, objective="mix")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_too_long_for_the_model_is_refused_before_training(tmp_path, architecture):
    model = make_model(architecture)
    examples = make_examples(model)
    object.__setattr__(examples[5].query, "source", "train.jsonl:6")
    make_trainer(tmp_path, model=model, examples=examples, num_virtual_tokens=400)
    message = (
        r"train\.jsonl:6: 500 virtual tokens, the query's \d+ and the answer's 1 do not fit into "
        "the model's 512 positions. Lower num_virtual_tokens"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, examples=examples[5:], num_virtual_tokens=500)


def test_wrong_kinds_of_arguments_are_named(tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path))
    trainer = make_trainer(tmp_path)
    right = dict(model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset)
    for wrong, error, message in (
        (dict(model=trainer.model.base), TypeError, "model must be SoftPromptModel: got Llama"),
        (dict(args=plain), TypeError, "args must be SoftPromptTrainingArguments: got TrainingArg"),
        (
            dict(train_dataset=["record"]),
            TypeError,
            "train_dataset must .* got str. Call .*make_ex",
        ),
        (dict(train_dataset=[]), ValueError, "train_dataset has no examples"),
        (dict(eval_dataset=[]), ValueError, "eval_dataset has no examples"),
        (dict(eval_dataset={"mine": []}), ValueError, "mine has no examples"),
    ):
        with pytest.raises(error, match=message):
            SoftPromptTrainer(**right | wrong)
    with pytest.raises(ValueError, match="eval_dataset has no examples"):
        trainer.evaluate(eval_dataset=[])


def test_several_evaluation_sets_are_told_apart_by_their_names(tmp_path):
    trainer = make_trainer(tmp_path)
    sets = {"first": trainer.train_dataset[:5], "rest": trainer.train_dataset[5:]}
    several = SoftPromptTrainer(trainer.model, trainer.args, eval_dataset=sets)
    metrics = several.evaluate()
    assert metrics["eval_first_loss"] == trainer.evaluate()["eval_loss"]
    assert metrics["eval_rest_loss"] != metrics["eval_first_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(objective="rl"), "objective must be one of nll, kl, mix: got 'rl'"),
        (dict(loss_impl="magic"), "loss_impl must be one of fused, reference: got 'magic'"),
        (dict(alpha=1.5), r"alpha must be in \[0, 1\]: got 1.5"),
        (dict(beta=-0.1), r"beta must be in \[0, 1\]: got -0.1"),
        (dict(temperature=0.0), "temperature must be a finite number above 0: got 0.0"),
        (dict(temperature=math.inf), "temperature must be a finite number above 0: got inf"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor is not supported: got 0.1"),
        (dict(neftune_noise_alpha=5.0), "neftune_noise_alpha is not supported: got 5.0"),
        (dict(bf16_full_eval=True), "bf16_full_eval is not supported: got True"),
        (dict(fp16_full_eval=True), "fp16_full_eval is not supported: got True"),
        (dict(fsdp="full_shard"), "fsdp is not supported: it would split the soft prompt"),
        (
            dict(train_sampling_strategy="group_by_length"),
            "train_sampling_strategy must be one of random, sequential: got 'group_by_length'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_training_argument_names_its_field(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SoftPromptTrainingArguments(output_dir=str(tmp_path), **options)
