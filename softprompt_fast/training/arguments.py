"""The options of a run: model and data, the objective, and ``transformers.TrainingArguments``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from .. import backends
from ..base_model.loading import check_dtype
from ..data.chat_template import parse_kwargs
from ..losses.options import check_options
from ..teacher.options import PrefixOptions
from ..teacher.teacher import LEAST_CONTEXT
from ..utils.errors import check_at_least

Store = Literal["auto", "sketch", "hidden", "online"]
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


@dataclass(kw_only=True)
class TrainOptions(PrefixOptions):
    """The model and the data of a training run."""

    model: str = field(metadata={"help": "Directory or Hub id of the frozen language model."})
    train_file: str = field(metadata={"help": "JSON Lines file of queries to learn from."})
    context_file: str | None = field(
        default=None,
        metadata={"help": "Text file: the context to replace. A query's own replaces this one."},
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file of held-out queries."}
    )
    max_new_tokens: int = field(
        default=64, metadata={"help": "Longest answer of the teacher, in tokens."}
    )
    max_context_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Of a longer context the teacher reads an excerpt with each query; default: "
            "what the model has positions for."
        },
    )
    teacher_batch_size: int = field(default=16, metadata={"help": "Queries answered at a time."})
    teacher_store: Store = field(
        default="auto",
        metadata={
            "help": "sketch: all that forward KL needs; hidden: hidden states, for every "
            "divergence; online: nothing, the teacher is asked at each step; auto: sketch where it "
            "is exact, else hidden."
        },
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Entries that a sketch keeps of each distribution; by default 32, or 128 for "
            "a head in 16 bits."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Directory where the teacher's work is kept, for later runs too."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (the checkpoint's own; float32 where the device only emulates it), "
            "float32, bfloat16, float16"
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON object: variables of the model's chat template, such as "
            '{"enable_thinking": false}.'
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )
    shard_base: bool = field(
        default=False,
        metadata={"help": "Each of several processes holds its part of the model's layers."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the earlier run in output_dir and train anew."}
    )
    find_lr: bool = field(
        default=False,
        metadata={"help": "Try learning rates on the data, suggest one, and train nothing."},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens", "teacher_batch_size", "teacher_top_k")
        check_at_least(self, LEAST_CONTEXT, "max_context_tokens")
        check_dtype(self.dtype)
        self.chat_template_kwargs = parse_kwargs(self.chat_template_kwargs)


# Options that change how a run is watched or where things lie, and not what comes out of it.
FREE_OPTIONS = frozenset(
    [
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_total_limit"),
        *("train_file", "context_file", "eval_file"),  # the first two are compared by content
        "chat_template_kwargs",  # too
        *("teacher_cache", "shard_base", "prefix_device"),
        *("disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "log_level"),
        *("report_to", "run_name", "hub_token", "trust_remote_code", "find_lr"),
    ]
)
