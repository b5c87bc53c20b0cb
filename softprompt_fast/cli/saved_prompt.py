"""What the commands that use a saved soft prompt have in common: options, loading, answering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..base_model.loading import check_dtype, load_model
from ..data.chat_template import KWARGS, parse_kwargs
from ..data.queries import Query
from ..student.generation import stream
from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt
from ..utils.console import say, show
from ..utils.errors import check_at_least


@dataclass(kw_only=True)
class PromptOptions:
    """A saved soft prompt and the model that it was trained for."""

    prompt_dir: str = field(metadata={"help": "Directory of the soft prompt: train's output_dir."})
    model: str | None = field(
        default=None, metadata={"help": "Directory or Hub id; default: the model of the training."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens; default: as in training."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "auto (the checkpoint's own), float32, bfloat16, float16; default: as in "
            "training."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )

    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "JSON object: variables of the chat template; default: as in training."},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens")
        self.chat_template_kwargs = parse_kwargs(self.chat_template_kwargs)
        if self.dtype is not None:
            check_dtype(self.dtype)


def recorded_inputs(options: PromptOptions, run: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, else what the training run recorded, else nothing."""
    recorded = run.get("inputs", {})
    names = ("model", "dtype", "max_new_tokens", "max_context_tokens", "eval_file", "context_file")
    inputs = {name: getattr(options, name, None) for name in names}
    inputs = {n: recorded.get(n) if value is None else value for n, value in inputs.items()}
    inputs["max_new_tokens"] = 64 if inputs["max_new_tokens"] is None else inputs["max_new_tokens"]
    return inputs


def load_prompt(options: PromptOptions, inputs: dict[str, Any]) -> tuple[Any, Any, SoftPrompt]:
    """Model, tokenizer and prompt; whether the prompt is there is known before the model loads."""
    prompt = SoftPrompt.from_pretrained(options.prompt_dir)
    name = inputs["model"] or prompt.base["name_or_path"]
    given = options.chat_template_kwargs
    # The recorded choice to trust remote code is not taken over: a prompt may come from elsewhere.
    model, tokenizer = load_model(
        name,
        dtype=inputs["dtype"] or "auto",
        trust_remote_code=options.trust_remote_code,
        **prompt.template | ({} if given is None else {KWARGS: given}),
    )
    prompt.check_base(model)
    prompt.check_tokenizer(tokenizer, own_kwargs=given is not None)
    return model, tokenizer, prompt


def tell_answer(model: SoftPromptModel, tokenizer: Any, query: Query, max_new_tokens: int) -> str:
    """The answer, which is on the screen while it is written."""
    model.check_length(query, max_new_tokens)  # before a line begins
    try:
        return stream(model, tokenizer, query, show, max_new_tokens=max_new_tokens)
    finally:
        say()  # the line ends where a signal stops the answer, too
