"""The options of a training run: those of ``transformers.TrainingArguments`` and the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from . import backends
from .losses.options import check_options
from .utils.errors import check_at_least

Objective = Literal["nll", "kl", "mix"]
LossImpl = Literal["fused", "reference"]


NOT_SUPPORTED = (
    # The losses are this package's own.
    "label_smoothing_factor",
    # They round the fp32 prompt, and it stays rounded when training goes on.
    *("bf16_full_eval", "fp16_full_eval"),
    # Noise on the embeddings of the queries makes the student another model than the teacher.
    "neftune_noise_alpha",
    # Training could not go on from what it leaves.
    "save_only_model",
    # They take the student for a model with a head of its own, or send it elsewhere.
    *("use_liger_kernel", "deepspeed", "push_to_hub"),
)
COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    "workspace_mib",
)
AMOUNTS = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps")


@dataclass
class SoftPromptTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the objective, and defaults for soft prompts."""

    objective: Objective = field(
        default="kl",
        metadata={
            "help": "nll: the teacher's answer; kl: its distribution at every answer token; "
            "mix: alpha * kl + (1 - alpha) * nll."
        },
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of kl in mix, in [0, 1]."})
    beta: float = field(
        default=0.0,
        metadata={"help": "0: KL(teacher || student), 1: KL(student || teacher), between: JSD."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Logits are divided by it."})
    loss_impl: LossImpl = field(
        default="fused",
        metadata={"help": "fused: never builds the logits; reference: plain PyTorch."},
    )
    backend: str = field(default="auto", metadata={"help": "Row kernel of the fused losses."})
    workspace_mib: int = field(default=256, metadata={"help": "Memory of the fused losses."})
    packing: bool = field(
        default=True,
        metadata={"help": "Short sequences share a row, where the model reads them so."},
    )
    share_prompt: bool = field(
        default=True,
        metadata={"help": "With packing: one copy of the soft prompt in each row is enough."},
    )

    # Soft prompts need steps a hundred times longer than weights do.
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after warm-up."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of warm-up; below 1, a part of all steps."}
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the queries."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    save_steps: float = field(default=50, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    # The examples are not columns, and a loss that is not finite stops the run instead.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not needed here."})
    # The prompt is all that is trained, and has a gradient in every step.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed."})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", get_args(Objective)),
            ("loss_impl", get_args(LossImpl)),
            # The other strategies read an example's length from a column "input_ids".
            ("train_sampling_strategy", ("random", "sequential")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {value!r}.")
        check_options(alpha=self.alpha, beta=self.beta)
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be a finite number above 0: got {self.temperature}."
            )
        for name in NOT_SUPPORTED:
            if getattr(self, name, False):
                raise ValueError(
                    f"{name} is not supported: got {getattr(self, name)}. Leave it out."
                )
        if self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "fsdp is not supported: it would split the soft prompt and save the frozen model. "
                "Leave it out; --shard_base splits the frozen model alone."
            )
        check_at_least(self, 1, *COUNTS)
        check_at_least(self, 0, *AMOUNTS)
        if self.max_steps < 1 and not 0.0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs must be a finite number above 0: got {self.num_train_epochs} "
                f"(and max_steps={self.max_steps}, which would go first)."
            )
        super().__post_init__()
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices must be True with several processes: got False, "
                "with which a token's weight depends on the process that reads it."
            )
        backends.resolve(self.backend, self.device)

    @property
    def needs_teacher_states(self) -> bool:
        """Whether the objective compares with the teacher's distribution."""
        return self.objective != "nll"
