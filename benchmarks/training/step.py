"""A training step at the shapes of real models, measured: the program of a fresh process."""

from __future__ import annotations

import tempfile
from math import floor
from typing import Any, NamedTuple

import torch
from cases import DEVICE_DTYPE, HEADS
from device import DEVICE, ON_GPU, peak_mib, seconds
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt_fast import SoftPrompt, SoftPromptConfig, SoftPromptTrainer
from softprompt_fast.data.queries import Query
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.teacher.answers import Answer, SketchOptions, keep_sketches
from softprompt_fast.teacher.examples import TrainingExample
from softprompt_fast.training.arguments import SoftPromptTrainingArguments

P, QUERY, ANSWER = 16, 16, 96  # tokens of the soft prompt, of a query and of its answer
DTYPE = getattr(torch, DEVICE_DTYPE[DEVICE.type])
# Guesses at the size that fills the budget, each from the line through the last two sizes.
TRIES = 4

# What AutoConfig needs to make the published model, its head and the weights apart.
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(
        model_type="llama",
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2",
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "Gemma-3-1B": dict(
        model_type="gemma3_text",
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
}
BUDGET_MIB = 16384 if ON_GPU else 192


class Kind(NamedTuple):
    """How the KL to the teacher is computed."""

    loss_impl: str
    stored: bool  # a sketch of the teacher, or its hidden states


KINDS = {
    "PyTorch, logits in memory": Kind("reference", stored=False),
    "softprompt_fast, teacher's hidden states": Kind("fused", stored=False),
    "softprompt_fast, sketch": Kind("fused", stored=True),
}


def measure_steps(name: str, kind: str) -> dict[str, Any]:
    """T counts answer tokens, in sequences of ANSWER."""
    D, V = HEADS[name]
    config = AutoConfig.for_model(
        **CONFIGS[name], hidden_size=D, vocab_size=V, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE)
    noise = SoftPromptConfig(num_virtual_tokens=P, prompt_tuning_init="random", placement="prefix")
    model = SoftPromptModel(base, SoftPrompt.from_model(base, None, noise))
    with tempfile.TemporaryDirectory() as directory:
        args = SoftPromptTrainingArguments(
            directory, loss_impl=KINDS[kind].loss_impl, report_to="none", packing=False
        )
        trainer = SoftPromptTrainer(model, args, examples(model, 1, kind))
        model.activation_checkpointing_enable()
        model.train()

        def step(sequences: int) -> tuple[float, float]:
            """Seconds, and MiB at the peak."""
            inputs = trainer.prepare_inputs(trainer.data_collator(examples(model, sequences, kind)))

            def work() -> None:
                trainer.compute_loss(model, inputs).backward()

            times: list[float] = []
            peak = peak_mib(lambda: times.append(seconds(work)))
            return times[0], peak

        step(1)  # code and thread pools are not the step's
        few, many = 2, 4
        _, small = step(few)
        time, large = step(many)
        measured = {few: small, many: large}
        for _ in range(TRIES):
            (n0, mib0), (n1, mib1) = list(measured.items())[-2:]
            per_sequence = (mib1 - mib0) / (n1 - n0)
            guess = max(1, n1 + floor((BUDGET_MIB - mib1) / per_sequence))
            if guess in measured:
                break
            _, measured[guess] = step(guess)
        fitting = [sequences for sequences, mib in measured.items() if mib <= BUDGET_MIB]
        most = max(fitting, default=0)
    return {
        "T": many * ANSWER,
        "seconds": time,
        "peak_mib": large,
        "mib_per_token": per_sequence / ANSWER,
        "budget_mib": BUDGET_MIB,
        "largest_T": most * ANSWER,
        "largest_peak_mib": measured.get(most, 0.0),
    }


def examples(model: SoftPromptModel, count: int, kind: str) -> list[TrainingExample]:
    """Random tokens, and random states of a teacher."""
    head = model.head
    V, D = head.weight.shape
    answers = [Answer(ids=torch.randint(V, (ANSWER,)).tolist()) for _ in range(count)]
    states = [torch.randn(ANSWER, D, dtype=DTYPE) for _ in answers]
    if KINDS[kind].stored:
        keep_sketches(answers, [s.to(DEVICE) for s in states], head, SketchOptions())
    else:
        for answer, hidden in zip(answers, states, strict=True):
            answer.hidden = hidden
    ids = torch.randint(V, (QUERY,)).tolist()
    query = Query(before=[], context=[], after=ids, plain=ids)
    return [TrainingExample(query=query, answer=answer) for answer in answers]
