"""What the README.md of an export says: the lines that read it, and what to know of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

QUESTION = "{question}"


@dataclass(kw_only=True, frozen=True)
class Usage:
    title: str
    language: str
    code: str
    notes: Sequence[str]

    def readme(self) -> str:
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"# {self.title}\n\n```{self.language}\n{self.code}```\n\n{notes}"


def usage_of_safetensors(path: str, placement: str) -> Usage:
    where = (
        "in the place of the context in the chat template, which is the system message"
        if placement == "system"
        else "before everything, the chat template included"
    )
    return Usage(
        title="Soft prompt",
        language="python",
        code=f"""\
from safetensors import safe_open

with safe_open({path!r}, "pt") as file:
    prompt, facts = file.get_tensor("prompt_embeddings"), file.metadata()
""",
        notes=[
            "`prompt_embeddings` is `[P, D]` in fp32. The model reads it as it reads the "
            "embeddings of P tokens, after any scale that its embedding layer applies.",
            f"It stands {where}.",
        ],
    )


def usage_in_peft(
    path: str,
    base: str,
    *,
    dtype: str,
    num_virtual_tokens: int,
    num_opening_tokens: int,
    text: str | None,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> Usage:
    """text: what PEFT is given, with QUESTION in it; None where ids alone are exact."""
    ends, pad_id = (list(end_ids), end_ids[0]) if end_ids else (None, 0)
    if text is not None:
        text_line = f"text = {text!r}.replace({QUESTION!r}, question)\n"
        ids = 'tokenizer(text, add_special_tokens=False)["input_ids"]'
        library = ""
    else:
        text_line = (
            'query = tokenize_query(tokenizer, [{"role": "user", "content": question}], "")\n'
        )
        ids = "query.after"
        library = "from softprompt_fast.data.queries import tokenize_query\n"
    notes = [
        "The generation config holds what ends an answer, and nothing else: that of the checkpoint "
        "may bring penalties, with which it was not trained.",
        "`use_cache=False` is for PEFT 0.21 with transformers 5.24, where a cached `generate` "
        "reads the virtual tokens anew before each token and answers something else. With "
        "transformers up to 5.23 it can go, and answers are the same and come faster.",
        "Ask one question at a time, or questions of equally many tokens: PEFT puts the virtual "
        "tokens before the padding of a batch, where the positions no longer fit.",
    ]
    if num_opening_tokens:
        notes.insert(
            0,
            f"Of the {num_opening_tokens + num_virtual_tokens} virtual tokens of the adapter, the "
            f"first {num_opening_tokens} are the opening of the chat template, and the last "
            f"{num_virtual_tokens} were trained. So PEFT is given only what follows them.",
        )
    return Usage(
        title="Soft prompt for PEFT",
        language="python",
        code=f"""\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
{library}
question = "Hi"
tokenizer = AutoTokenizer.from_pretrained({base!r})
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})
base.generation_config = GenerationConfig(eos_token_id={ends}, pad_token_id={pad_id})
model = PeftModel.from_pretrained(base, {path!r})

{text_line}ids = torch.tensor([{ids}])
written = model.generate(
    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens={max_new_tokens},
    do_sample=False, use_cache=False,
)
print(tokenizer.decode(written[0, ids.shape[1]:], skip_special_tokens=True))
""",
        notes=notes,
    )


def usage_in_vllm(
    path: str,
    base: str,
    *,
    dtype: str,
    requests: Sequence[str],
    system_file: str | None,
    without_chat: Sequence[int],
) -> Usage:
    """requests: the names of the first files. without_chat: the numbers of the questions that only
    the Completions API can be asked."""
    code = f"vllm serve {shlex.quote(base)} --enable-prompt-embeds --dtype {dtype}\n"
    for name in requests:
        api = "completions" if name.startswith("completion") else "chat/completions"
        file = shlex.quote(f"@{path}/{name}")
        code += f"curl localhost:8000/v1/{api} -H 'Content-Type: application/json' -d {file}\n"
    notes = [
        "`prompt_embeds` and `data` are base64 of `torch.save`: the embeddings `[L, D]` in the "
        "dtype of the model that they were made with.",
        "A request names what ends an answer, and no penalty: the checkpoint's own generation "
        "config may bring some, with which the prompt was not trained.",
    ]
    if system_file:
        notes.append(
            f"`{system_file}` is the soft prompt as a message: the first of the `messages` of any "
            "conversation in the Chat API. It takes a vLLM whose chats know parts of the type "
            "`prompt_embeds`."
        )
    else:
        notes.append(
            "The Chat API cannot say where this prompt stands: before the chat template, or in "
            "one that has no system message to hold it."
        )
    if without_chat:
        numbers = ", ".join(map(str, without_chat))
        notes.append(f"Not there as a chat, for their own system message: {numbers}.")
    return Usage(title="Soft prompt for vLLM", language="sh", code=code, notes=notes)
