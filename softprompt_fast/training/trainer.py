"""Training a soft prompt with ``transformers.Trainer``.

Schedules, logging, gradient accumulation, resuming and ``accelerate`` are the Trainer's own. What
differs: the loss, which is projected through the head at answer positions only, and what is saved:
the prompt, never the frozen base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .. import losses
from ..base_model.fsdp import in_lockstep, sharded_parameters
from ..losses.sketch import TeacherSketch
from ..student.collator import IGNORE
from ..student.model import SoftPromptModel, scaled
from ..teacher.examples import TrainingExample
from ..teacher.teacher import Reading, Teacher
from .arguments import SoftPromptTrainingArguments
from .checkpointed_trainer import CheckpointedTrainer
from .distributed_batches import own_share, shared_loader
from .preflight import check_examples

Datasets = Sequence[TrainingExample] | dict[str, Sequence[TrainingExample]]


class SoftPromptTrainer(CheckpointedTrainer):
    """Trains ``model.prompt`` on ``TrainingExample`` lists."""

    model: SoftPromptModel
    args: SoftPromptTrainingArguments

    def __init__(
        self,
        model: SoftPromptModel,
        args: SoftPromptTrainingArguments,
        train_dataset: Sequence[TrainingExample] | None = None,
        eval_dataset: Datasets | None = None,
        teacher: Teacher | None = None,
        **options: Any,
    ) -> None:
        """eval_dataset: several are given by their names. teacher: asked anew at every step, in
        place of what the examples know of it. options: the other arguments of
        ``transformers.Trainer``.

        Raises TypeError if an argument is of another kind, and ValueError if a dataset is empty, an
        example does not fit into the model, or lacks the teacher states that the objective needs.
        """
        for name, value, kind in (
            ("model", model, SoftPromptModel),
            ("args", args, SoftPromptTrainingArguments),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be {kind.__name__}: got {type(value).__name__}.")
        self.teacher = teacher if args.needs_teacher_states else None
        several = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **several}.items():
            if dataset is not None:
                check_examples(name, dataset, model, args, self.teacher)
        options.setdefault(
            "data_collator",
            model.collator(
                packing=args.packing,
                share_prompt=args.share_prompt,
                with_examples=self.teacher is not None,
            ),
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **options,
        )
        # What is split has no copies that nn.DistributedDataParallel could keep alike.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, sharded_parameters(model)
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum over this batch's answer tokens / the answer tokens of the whole step.

        Its gradient in the base is that of the sum, which fp16 can hold however many tokens the
        step has; the division meets it at the prompt, which is fp32.
        """
        if num_items_in_batch is None:
            scale = 1.0 / int((inputs["labels"] != IGNORE).sum())
        else:
            # nn.DataParallel has the number repeated, once for each device.
            scale = 1.0 / float(torch.as_tensor(num_items_in_batch).max())
            if self.args.average_tokens_across_devices:
                # Gradients are averaged over the processes; the tokens were counted over all.
                scale *= self.accelerator.num_processes
        total = self._summed_loss(model, inputs, gradient_scale=scale)
        loss = scaled(total, value=scale, gradient=1.0)
        return (loss, {"loss": loss}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """With several processes, each takes its share of the batches that one would read."""
        args = self.args
        if args.world_size == 1:
            return super().get_train_dataloader()
        return shared_loader(
            cast(Any, self.train_dataset),
            self.train_sampler(),
            self.data_collator,
            args,
            self.accelerator,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss, and nothing else."""
        dataset = cast(Sequence[TrainingExample], dataloader.dataset)
        check_examples("eval_dataset", dataset, self.model, self.args, self.teacher)
        self.callback_handler.eval_dataloader = dataloader
        return EvalLoopOutput(
            predictions=cast(Any, None),
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": self.mean_loss(dataset)},
            num_samples=len(dataset),
        )

    def mean_loss(self, dataset: Sequence[TrainingExample]) -> float:
        """The mean over all answer tokens of the dataset, each read by one of the processes."""
        args = self.args
        was_training = self.model.training
        self.model.eval()
        total = tokens = 0.0
        step = args.eval_batch_size * args.world_size
        for start in range(0, len(dataset), step):
            examples = [dataset[i] for i in range(start, min(start + step, len(dataset)))]
            batch = own_share(self.data_collator, args.process_index, args.world_size, examples)
            inputs = self.prepare_inputs(batch)
            with torch.no_grad():
                total += self._summed_loss(self.model, inputs).item()
            tokens += int((inputs["labels"] != IGNORE).sum())
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        self.model.train(was_training)
        sums = self.accelerator.gather(torch.tensor([[total, tokens]], device=args.device))
        total, tokens = cast(Tensor, sums).double().sum(dim=0).tolist()
        return total / tokens

    def _summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: float = 1.0
    ) -> Tensor:
        """The objective, summed over the answer tokens of one batch.

        gradient_scale: of the prompt's gradient, and of no other.
        """
        inputs = dict(inputs)
        sources = inputs.pop("sources")
        hidden, sketch = (inputs.pop(f"teacher_{name}", None) for name in ("hidden", "sketch"))
        teacher = hidden if sketch is None else sketch
        examples = inputs.pop("examples", None)
        labels = inputs["labels"]
        if self.teacher is not None:
            # Of all processes, some may have no example to ask about.
            with in_lockstep(self.model.base):
                teacher = self._ask(self.teacher, examples) if examples else None
        with self.accelerator.autocast():
            hidden = model(**inputs, gradient_scale=gradient_scale)
        if self.teacher is not None:
            teacher = hidden.detach()[:0] if teacher is None else teacher.to(hidden.device)
        total = self.summed_objective(hidden, labels[labels != IGNORE], teacher)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"The loss is {total.item()} at step {self.state.global_step}, on: "
                f"{', '.join(sources)}. Training stopped; checkpoints in {self.args.output_dir} "
                "are as they were. Look at these examples, or lower learning_rate."
            )
        return total

    @staticmethod
    def _ask(teacher: Teacher, examples: Sequence[TrainingExample]) -> Tensor:
        """The teacher's hidden states [T, D] for one batch, whose contexts it reads once more."""
        answers = teacher.answer(
            [example.query for example in examples],
            [example.answer.ids for example in examples],
            record_hidden=True,
            reading=Reading(teacher.model),
        )
        return torch.cat([cast(Tensor, answer.hidden) for answer in answers])

    def summed_objective(
        self, hidden: Tensor, targets: Tensor, teacher: Tensor | TeacherSketch | None
    ) -> Tensor:
        """Summed over T tokens.    hidden: [T, D]    targets: [T]    teacher: over [T]"""
        args = self.args
        head = self.model.head
        options = {"temperature": args.temperature, "reduction": "sum", **head.loss_options()}
        impl: Any = losses.reference
        if args.loss_impl == "fused":
            impl = losses
            options |= {"backend": args.backend, "workspace_mib": args.workspace_mib}
        # Mixed precision returns fp32 hidden states.
        hidden = hidden.to(head.weight.dtype)
        if args.objective == "nll":
            return impl.linear_nll(hidden, head.weight, targets, **options)
        if args.objective == "kl":
            return impl.linear_kl(hidden, head.weight, teacher, beta=args.beta, **options)
        return impl.linear_distill(
            hidden, head.weight, targets, teacher, alpha=args.alpha, beta=args.beta, **options
        )
