"""The trainable virtual tokens, and their form on disk: a PEFT prompt-tuning adapter.

adapter_model.safetensors   {"prompt_embeddings": [P, D]}, fp32
adapter_config.json         what ``peft.PeftModel.from_pretrained`` reads
soft_prompt.json            our own facts: placement, initialisation, the base model
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_model.checks import check_ids
from ..base_model.fingerprint import base_facts, differences, tokenizer_facts
from ..base_model.output_head import input_embedding
from ..data.chat_template import DATE, KWARGS, recorded_template
from ..data.queries import PLACEMENTS, Placement
from ..utils.console import progress
from ..utils.files import read_json, refuse_pickle, write_bytes, write_json

PromptInit = Literal["context", "text", "vocab", "random"]

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
FACTS_FILE = "soft_prompt.json"
FORMAT_VERSION = 1
# What is read from ``base`` without a model at hand; ``check_base`` compares the rest.
PEFT_FACTS = {"name_or_path", "hidden_size", "num_hidden_layers", "num_attention_heads"}


@dataclass(kw_only=True)
class SoftPromptConfig:
    """How many virtual tokens, what they start as, and where they stand."""

    num_virtual_tokens: int = field(default=16, metadata={"help": "P, the length of the prompt."})
    prompt_tuning_init: PromptInit = field(
        default="context",
        metadata={
            "help": "Start as the context's first tokens, as those of prompt_tuning_init_text, as "
            "sampled tokens of the vocabulary, or as noise of the embedding's own scale."
        },
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "The text for prompt_tuning_init=text."}
    )
    placement: Placement = field(
        default="system",
        metadata={
            "help": "system: in the context's place in the chat template; "
            "prefix: before everything, as PEFT does."
        },
    )
    prompt_seed: int = field(
        default=0, metadata={"help": "Seed of the vocab and random initialisations."}
    )

    def __post_init__(self) -> None:
        P = self.num_virtual_tokens
        if not isinstance(P, int) or isinstance(P, bool):
            raise TypeError(f"num_virtual_tokens must be an int: got {P!r}.")
        if P < 1:
            raise ValueError(f"num_virtual_tokens must be >= 1: got {P}.")
        for name, allowed in (
            ("prompt_tuning_init", get_args(PromptInit)),
            ("placement", PLACEMENTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {value!r}.")
        if (self.prompt_tuning_init == "text") != (self.prompt_tuning_init_text is not None):
            raise ValueError(
                "prompt_tuning_init_text goes with prompt_tuning_init='text': got "
                f"{self.prompt_tuning_init_text!r} with {self.prompt_tuning_init!r}."
            )


class SoftPrompt(nn.Module):
    """P virtual tokens: ``embedding`` [P, D], fp32 whatever the model's dtype."""

    def __init__(self, embedding: Tensor, config: SoftPromptConfig, base: dict[str, Any]) -> None:
        """base: the facts of the model that the prompt belongs to (``base_facts``)."""
        super().__init__()
        self.embedding = nn.Parameter(embedding.detach().float().clone())
        self.config = config
        self.base = base

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        config: SoftPromptConfig,
        context: str | None = None,
    ) -> SoftPrompt:
        """A new prompt for ``model``, initialised as ``config`` says.

        tokenizer: None where the initialisation needs no text; then the prompt does not know it.

        Raises ValueError if the initialisation needs a text that is missing or has no token.
        """
        own = {} if tokenizer is None else tokenizer_facts(tokenizer)
        base = base_facts(model) | own
        return cls(_initial(model, tokenizer, config, context), config, base)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the three files; each is replaced as a whole or not at all.

        Raises ValueError if an entry is not finite: the files there stay as they are.
        """
        directory = Path(directory)
        if not self.embedding.isfinite().all():
            raise ValueError(f"The soft prompt has entries that are not finite: {directory} kept.")
        directory.mkdir(parents=True, exist_ok=True)
        embedding = self.embedding.detach().cpu().contiguous()
        write_bytes(directory / WEIGHTS_FILE, save({"prompt_embeddings": embedding}))
        write_json(directory / PEFT_FILE, self.peft_config())
        write_json(
            directory / FACTS_FILE,
            {"format_version": FORMAT_VERSION, "config": asdict(self.config), "base": self.base},
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], model: PreTrainedModel | None = None
    ) -> SoftPrompt:
        """Load a saved prompt, and check that it was trained for ``model`` where one is given.

        Raises ValueError naming the file or the differing fields; FileNotFoundError.
        """
        directory = Path(directory)
        for name in (WEIGHTS_FILE, FACTS_FILE):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} holds no saved soft prompt: no {name}.")
        config, base = _read_facts(directory / FACTS_FILE)
        shape = (config.num_virtual_tokens, base["hidden_size"])
        prompt = cls(_read_embedding(directory / WEIGHTS_FILE, shape), config, base)
        if model is not None:
            prompt.check_base(model)
        return prompt

    def check_base(self, model: PreTrainedModel) -> None:
        """Raises ValueError listing the fields in which ``model`` is not the prompt's model."""
        differing = differences(self.base, base_facts(model))
        if differing:
            raise ValueError(
                "The soft prompt belongs to another model "
                f"({self.base.get('name_or_path')!r}): {'; '.join(differing)}."
            )

    @property
    def template(self) -> dict[str, Any]:
        """What the chat template was given: the arguments of ``load_model`` that give it again."""
        return recorded_template(self.base)

    def check_tokenizer(self, tokenizer: Any, *, own_kwargs: bool = False) -> None:
        """Raises ValueError if chats are rendered otherwise than when the prompt was made; says it
        where the tokenizer, or only the library that writes it down, is another one.

        own_kwargs: the user asked for other variables of the template, which is said then.
        """
        now = tokenizer_facts(tokenizer)
        self.check_template(now, own_kwargs=own_kwargs)
        if self.base.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
            progress("Note: the tokenizer is not the one that the soft prompt was trained with")

    def check_template(self, now: dict[str, Any], *, own_kwargs: bool = False) -> None:
        """The same of the template, by the facts ``now`` of a tokenizer or of another prompt."""
        if "chat_template" not in self.base.keys() & now.keys():
            return  # made without a tokenizer
        if self.base["chat_template"] != now["chat_template"]:
            raise ValueError(
                "The soft prompt was trained with another chat template than the model has now, "
                "and would stand in other text. Restore the template, or train anew."
            )
        for name in (KWARGS, DATE):
            there, here = self.base.get(name), now.get(name)
            # Prompts of before it was recorded have no date.
            if there == here or (name == DATE and there is None):
                continue
            problem = f"was trained with {name} {there}, and not with {here}"
            if name == DATE or not own_kwargs:
                raise ValueError(f"The soft prompt {problem}: it would stand in other text.")
            progress(f"Note: the soft prompt {problem}")

    def peft_config(self) -> dict[str, Any]:
        """What PEFT reads as adapter_config.json."""
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            # TEXT would make PEFT ask for a tokenizer; the embeddings are loaded over it anyway.
            "prompt_tuning_init": "RANDOM",
            "num_virtual_tokens": self.config.num_virtual_tokens,
            "token_dim": self.base["hidden_size"],
            "num_layers": self.base["num_hidden_layers"],
            "num_attention_heads": self.base["num_attention_heads"],
            "num_transformer_submodules": 1,
            "base_model_name_or_path": self.base["name_or_path"],
            "inference_mode": True,
        }


@torch.no_grad()
def _initial(
    model: PreTrainedModel, tokenizer: Any, config: SoftPromptConfig, context: str | None
) -> Tensor:
    """The start values [P, D]."""
    embed = input_embedding(model)
    P, (V, D) = config.num_virtual_tokens, embed.weight.shape
    generator = torch.Generator().manual_seed(config.prompt_seed)
    sampled = embed(torch.randint(V, (max(P, 1024),), generator=generator).to(embed.weight.device))
    if config.prompt_tuning_init == "vocab":
        return sampled[:P]
    if config.prompt_tuning_init == "random":
        noise = torch.randn(P, D, generator=generator)
        return noise * sampled.float().std().cpu()
    text = context if config.prompt_tuning_init == "context" else config.prompt_tuning_init_text
    ids = tokenizer(text or "", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"prompt_tuning_init={config.prompt_tuning_init!r} needs a text of at least one token: "
            f"got {text!r}."
        )
    check_ids(model, ids, f"prompt_tuning_init={config.prompt_tuning_init!r}")
    repeated = (ids * (P // len(ids) + 1))[:P]
    return embed(torch.tensor(repeated, device=embed.weight.device))


def _read_facts(path: Path) -> tuple[SoftPromptConfig, dict[str, Any]]:
    facts = read_json(path)
    if facts.get("format_version") != FORMAT_VERSION or not {"config", "base"} <= facts.keys():
        raise ValueError(
            f"{path} must hold format_version {FORMAT_VERSION}, config and base: "
            f"got version {facts.get('format_version')!r}, {', '.join(sorted(facts))}."
        )
    base = facts["base"]
    if not isinstance(base, dict) or not base.keys() >= PEFT_FACTS:
        raise ValueError(f"{path}: base must hold {', '.join(sorted(PEFT_FACTS))}: got {base!r}.")
    try:
        return SoftPromptConfig(**facts["config"]), base
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: config: {error}") from error


def _read_embedding(path: Path, shape: tuple[int, int]) -> Tensor:
    refuse_pickle(path)
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {"prompt_embeddings": shape}:
        raise ValueError(f"{path} must hold prompt_embeddings of shape {shape}: got {found}.")
    embedding = tensors["prompt_embeddings"]
    if not embedding.isfinite().all():
        raise ValueError(f"{path}: prompt_embeddings has entries that are not finite.")
    return embedding
