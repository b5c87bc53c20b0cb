"""Where the context and the soft prompt sit among the tokens of a query.

A query is rendered once, by the model's chat template, with a slot where the context goes:

    teacher              before + context + after
    student, "system"    before +  sigma  + after
    student, "prefix"    sigma + plain            (PEFT's layout)

``sigma`` stands for the P virtual tokens, ``plain`` for the query rendered without a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, get_args

from jinja2.exceptions import TemplateError

from ..utils.text import shortened
from .chat_template import apply_template

Placement = Literal["system", "prefix"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)

# Stands in for the context while a template is rendered: plain letters, which none changes.
SLOT = "SoftPromptFastContextSlot"
ANSWER_SLOT = "SoftPromptFastAnswerSlot"
_ASKED = {"role": "user", "content": SLOT}
# What a template's own statements raise, and what it may do to the values of a query.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, RuntimeError),
    ArithmeticError,
)
REASON_CHARACTERS = 200


@dataclass(kw_only=True, frozen=True)
class Query:
    """One tokenised query. All ids are lists of int."""

    before: list[int]
    """The opening of the template, up to the slot."""

    context: list[int]
    """The context's own tokens."""

    after: list[int]
    """From the end of the slot to the generation prompt; never empty."""

    plain: list[int] = field(repr=False)
    """The same query rendered with no context at all."""

    source: str = ""
    """Where the query comes from ("file:line"), for error messages."""


def tokenize_query(
    tokenizer: Any, messages: Sequence[dict[str, str]], context: str, *, source: str = ""
) -> Query:
    """Tokenise the messages of one query around a slot for ``context``.

    The slot is the system message; a system message of the data's own follows it. A template
    without a system role gets the slot at the start of the first user message; a tokenizer without
    a chat template gets ``bos + context + "\\n\\n" + prompt + "\\n"``. White space around the
    context is dropped.

    The ids are those of the pieces in the whole text. A tokenizer may mark where a text begins (the
    "▁" of SentencePiece), and a piece that follows another does not begin one.

    Raises ValueError if there are no messages, or if the template shows the slot not exactly once,
    or as its very end.
    """
    messages = list(messages)
    if not messages:
        raise ValueError(f"{source or 'query'}: no messages. Give at least one of the user's.")
    before, after, plain = render_query(tokenizer, messages, source=source)
    up_to_slot = text_ids(tokenizer, before + SLOT)
    # A space at the end of before may be part of the token that comes next: such a space is left to
    # the context.
    opening = _common_start(text_ids(tokenizer, before), up_to_slot)
    return Query(
        before=opening,
        context=_ids_behind(tokenizer, before, opening, context.strip()),
        after=_ids_behind(tokenizer, before + SLOT, up_to_slot, after),
        plain=text_ids(tokenizer, plain),
        source=source,
    )


def render_query(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, source: str = ""
) -> tuple[str, str, str]:
    """The texts before and after the slot, and the text without one.

    Raises ValueError if the template shows the slot not exactly once, or as its very end.
    """
    if has_chat_template(tokenizer):
        return _render_chat(tokenizer, list(messages), source)
    prompt = "\n".join(message["content"] for message in messages)
    bos = tokenizer.bos_token or ""
    return bos, f"\n\n{prompt}\n", f"{bos}{prompt}\n"


def slot_is_system_message(tokenizer: Any, messages: Sequence[dict[str, str]]) -> bool:
    """Whether the slot is the whole of a system message, which the chat template accepts."""
    if not has_chat_template(tokenizer) or messages[0]["role"] == "system":
        return False
    return SLOT in (_render(tokenizer, _slot_in_system(list(messages)), []) or "")


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render a chat: by a template, or by code of its own.

    Raises ValueError where the text that the code renders gives other tokens than the code itself.
    """
    if getattr(tokenizer, "chat_template", None):
        return True
    try:
        text = apply_template(tokenizer, [_ASKED], tokenize=False, add_generation_prompt=True)
    except (AttributeError, ValueError):  # transformers says so where there is no template
        return False
    encoded = apply_template(tokenizer, [_ASKED], tokenize=True, add_generation_prompt=True)
    ids = encoded if isinstance(encoded, list) else encoded["input_ids"]
    if text_ids(tokenizer, text) != list(ids):
        raise ValueError(
            f"{type(tokenizer).__name__} renders chats by code of its own, and their text gives "
            "other tokens than that code: a context cannot be placed in them. Put the model's chat "
            "template beside its weights, as chat_template.jinja."
        )
    return True


def tokenize_answer(tokenizer: Any, completion: str, end_ids: Sequence[int]) -> list[int]:
    """Token ids of an answer that the data gives, as the chat template makes an assistant's turn.

    The turn's own end closes it; where the template has none, the tokenizer's end of sequence if it
    is one of ``end_ids``, at which the model stops, else the first of these.
    """
    lead, close = _around_answer(tokenizer)
    ends = [_special_start(tokenizer, close), tokenizer.eos_token_id]
    closing = [end for end in ends if end in end_ids][:1] or list(end_ids[:1])
    turn = _render_turn(tokenizer, completion) if close else None
    if turn is not None and turn.startswith(lead) and turn.endswith(close):
        # what the template trims, and what it puts before an answer
        completion = turn[len(lead) : -len(close)]
    return _ids_behind(tokenizer, lead, text_ids(tokenizer, lead), completion) + closing


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, if it does."""
    _, close = _around_answer(tokenizer)
    return _special_start(tokenizer, close)


def _around_answer(tokenizer: Any) -> tuple[str, str]:
    """What stands before an answer that is to be written, and what closes one that is."""
    if not has_chat_template(tokenizer):
        _, _, plain = render_query(tokenizer, [_ASKED])
        return plain, ""
    lead = _render(tokenizer, [_ASKED], []) or ""
    _, _, close = (_render_turn(tokenizer, ANSWER_SLOT) or "").partition(ANSWER_SLOT)
    return lead, close


def _special_start(tokenizer: Any, text: str) -> int | None:
    first = text_ids(tokenizer, text)[:1]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return first[0] if first and first[0] in {*tokenizer.all_special_ids, *added} else None


def _render_turn(tokenizer: Any, answer: str) -> str | None:
    chat = [_ASKED, {"role": "assistant", "content": answer}]
    return _render(tokenizer, chat, [], add_generation_prompt=False)


def teacher_ids(query: Query) -> list[int]:
    return query.before + query.context + query.after


def without_context(query: Query) -> Query:
    """The query as one asks it who has no context at all."""
    return replace(query, before=[], context=[], after=query.plain)


def cut_context(query: Query, num_tokens: int) -> Query:
    """The query with the context cut to its first ``num_tokens``."""
    return replace(query, context=query.context[:num_tokens])


def student_layout(query: Query, placement: str) -> tuple[list[int], list[int]]:
    """The ids before and after the virtual tokens."""
    if placement == "system":
        return query.before, query.after
    if placement == "prefix":
        return [], query.plain
    raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}: got {placement!r}.")


def _render_chat(
    tokenizer: Any, messages: list[dict[str, str]], source: str
) -> tuple[str, str, str]:
    reasons: list[str] = []
    with_slot = _render(tokenizer, _slot_in_system(messages), reasons)
    if with_slot is None or SLOT not in with_slot:
        messages = _without_system_role(messages)
        with_slot = _render(tokenizer, _opening_first_user(messages, SLOT), reasons)
    plain = _render(tokenizer, messages, reasons)
    if with_slot is None or plain is None or with_slot.count(SLOT) != 1:
        raise ValueError(
            f"{source or 'query'}: the chat template cannot place a context before these messages "
            f"(roles: {', '.join(message['role'] for message in messages)}). "
            "It must accept them, and show a system or a first user message exactly once."
            + "".join(f" It says: {reason}" for reason in dict.fromkeys(reasons))
        )
    before, after = with_slot.split(SLOT)
    if not after:
        raise ValueError(
            f"{source or 'query'}: the chat template ends with the context. "
            "Something must follow it, so that the answer has a position that predicts it."
        )
    return before, after, plain


def _render(
    tokenizer: Any,
    messages: list[dict[str, str]],
    reasons: list[str],
    *,
    add_generation_prompt: bool = True,
) -> str | None:
    """The rendered chat, or None where the template refuses the messages, with its reason."""
    try:
        return apply_template(
            tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TEMPLATE_ERRORS as error:
        reasons.append(shortened(f"{type(error).__name__}: {error}", REASON_CHARACTERS))
        return None


def _slot_in_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if messages[0]["role"] == "system":
        own = messages[0]["content"]
        return [{"role": "system", "content": f"{SLOT}\n\n{own}"}, *messages[1:]]
    return [{"role": "system", "content": SLOT}, *messages]


def _without_system_role(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """For a template with no system role: the first user message opens with the system message."""
    if messages[0]["role"] != "system" or len(messages) == 1:
        return messages
    return _opening_first_user(messages[1:], messages[0]["content"])


def _opening_first_user(messages: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The messages with ``text`` at the start of the first one that is the user's."""
    for index, message in enumerate(messages):
        if message["role"] == "user":
            opened = {**message, "content": f"{text}\n\n{message['content']}"}
            return [*messages[:index], opened, *messages[index + 1 :]]
    return messages


def _common_start(one: list[int], other: list[int]) -> list[int]:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in same]


def _ids_behind(tokenizer: Any, lead: str, lead_ids: list[int], text: str) -> list[int]:
    """The ids of ``text`` where it follows ``lead``, whose own ids are cut off."""
    ids = text_ids(tokenizer, lead + text)
    if ids[: len(lead_ids)] == lead_ids:
        return ids[len(lead_ids) :]
    return text_ids(tokenizer, text)  # the end of lead and the start of text have become one token


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text and no others: none that opens or closes it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
