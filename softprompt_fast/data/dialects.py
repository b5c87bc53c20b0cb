"""Queries and answers under the names that other projects give them.

    {"prompt": ..., "response": ...}, {"prompt": ..., "answer": ...}       an answer
    {"system": ..., "prompt": ...}                                         a system message
    {"instruction": ..., "input": ..., "output": ...}                      Alpaca
    {"conversations": [{"from": "human", "value": ...}, ...]}              ShareGPT
    {"role": ..., "content": [{"type": "text", "text": ...}, ...]}         content in parts

What cannot be read without a guess, and would change the answer, is refused by name. What says
nothing about the answer is counted, so that it can be told once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from ..utils.text import shortened

FIELDS = ("prompt", "messages", "completion", "context", "context_span")
ANSWERS = ("completion", "response", "answer")
READ = (*FIELDS, *ANSWERS[1:], "system")
# Read or a plain word: a name this close to one that is read is a misspelling of it.
KNOWN, CLOSE = (*READ, "content"), 0.85
QUOTED_CHARACTERS = 200

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "bot", "assistant"), "assistant"),
    "system": "system",
    "tool": "tool",
}
# Fields that say something about the query or its answer, and the one of ours that comes nearest.
REFUSED = {
    **dict.fromkeys(("question", "query", "instruction", "input", "inputs", "text"), "prompt"),
    **dict.fromkeys(("dialog", "dialogue", "conversation", "conversations"), "messages"),
    **dict.fromkeys(("history", "chat"), "messages"),
    **dict.fromkeys(("output", "outputs", "target", "targets", "label", "labels"), "completion"),
    **dict.fromkeys(("chosen", "rejected", "solution", "assistant"), "completion"),
    **dict.fromkeys(("expected", "expected_output", "expected_answer"), "completion"),
    **dict.fromkeys(("reference", "reference_answer", "ground_truth"), "completion"),
    **dict.fromkeys(("gold", "gold_answer", "reply"), "completion"),
    **dict.fromkeys(("system_prompt", "system_message", "instructions"), "system"),
    **dict.fromkeys(("document", "documents", "passage", "passages"), "context"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), None),
    **dict.fromkeys(("images", "image", "audio"), None),
}
# What a message holds beside its role and its content, for the chat template.
PASSED_ON = ("tool_calls", "tool_call_id", "name")


def standard(value: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """A line under our own names, and the names of the fields that are left out.

    Raises ValueError naming a field that is misspelt, given twice, or cannot be read.
    """
    value = dict(value)
    for key in value:
        close = difflib.get_close_matches(key.lower(), READ, n=1, cutoff=CLOSE)
        if key not in KNOWN and close:
            raise ValueError(f"{source}: unknown field {quoted(key)}; did you mean {close[0]!r}?")
    asked = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(asked) == 1:  # the other one may be there as null
        value.pop("messages" if asked == ["prompt"] else "prompt", None)
    if "conversations" in value and not asked:
        value["messages"] = _messages_of_turns(value.pop("conversations"), source)
    elif "instruction" in value and not asked:
        _read_alpaca(value, source)
    _read_answer(value, source)
    _read_system(value, source)
    for key in value:
        if key.lower() in REFUSED and value[key] not in (None, "", [], {}):
            near = REFUSED[key.lower()]
            advice = f"rename it to {near!r}, or leave it out" if near else "leave it out"
            raise ValueError(
                f"{source}: the field {quoted(key)} is not read, and the answer may hang on it: "
                f"{advice}"
            )
    ignored = [key for key in value if key not in FIELDS] + _ignored_of_messages(value)
    return {key: value[key] for key in value if key in FIELDS}, ignored


def _ignored_of_messages(value: dict[str, Any]) -> list[str]:
    lists = [(name, value[name]) for name in FIELDS if isinstance(value.get(name), list)]
    return sorted(
        {
            f"{name}[].{key}"
            for name, messages in lists
            for message in messages
            if isinstance(message, dict)
            for key in message
            if key not in ("role", "content", *PASSED_ON) and message[key] is not None
        }
    )


def _read_alpaca(value: dict[str, Any], source: str) -> None:
    """Instruction and input are the prompt, the output is the completion."""
    parts = [_own_text(value, name, source) for name in ("instruction", "input")]
    value["prompt"] = "\n\n".join(part for part in parts if part)
    for name in ("instruction", "input"):
        value.pop(name, None)
    if "output" in value:
        if any(value.get(name) is not None for name in ANSWERS):
            raise ValueError(f"{source}: 'output' and another answer; keep one of them")
        value["completion"] = value.pop("output")


def _own_text(value: dict[str, Any], name: str, source: str) -> str:
    text = value.get(name)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{source}: {name!r} must be a string, got {kind(text)}")
    return (text or "").strip()


def _read_answer(value: dict[str, Any], source: str) -> None:
    given = [name for name in ANSWERS if value.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(map(repr, given))
        raise ValueError(f"{source}: the line has {names}; keep one of them")
    for name in ANSWERS[1:]:
        answer = value.pop(name, None)
        if answer is not None:
            value["completion"] = answer


def _read_system(value: dict[str, Any], source: str) -> None:
    system = _own_text(value, "system", source)
    value.pop("system", None)
    if not system:
        return
    name = "prompt" if value.get("prompt") is not None else "messages"
    messages = value.get(name)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return  # said where messages are read
    if any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
        raise ValueError(f"{source}: 'system' and a system message in {name!r}; keep one of them")
    value[name] = [{"role": "system", "content": system}, *messages]


def _messages_of_turns(turns: Any, source: str) -> Any:
    """ShareGPT's turns as messages; turns that are messages already stay what they are."""
    messages = []
    for where, turn in objects(turns, "conversations", "a list of turns", source):
        if "from" not in turn:
            messages.append(turn)
            continue
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(
                f"{source}: '{where}.from' must be one of {', '.join(SPEAKERS)}; "
                f"got {quoted(speaker)}"
            )
        said = turn.get("value", turn.get("content"))
        rest = {name: turn[name] for name in turn if name not in ("from", "value")}
        messages.append({**rest, "role": SPEAKERS[speaker], "content": said})
    return messages


def objects(
    value: Any, field: str, expected: str, source: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list that is not empty, and where each of them stands."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else kind(value)
        raise ValueError(f"{source}: {field!r} must be {expected}, got {got}")
    for index, item in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise ValueError(f"{source}: {where!r} must be an object, got {kind(item)}")
        yield where, item


def text_of_parts(parts: list[Any], where: str, source: str) -> str:
    """The content of a message that comes in parts, all of which must be text."""
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else part
        is_text = not isinstance(part, dict) or part.get("type", "text") == "text"
        if not is_text or not isinstance(text, str):
            found = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(
                f"{source}: '{where}[{index}]' is {quoted(found)}, and only parts of text are read"
            )
        texts.append(text)
    return "".join(texts)


def quoted(value: Any) -> str:
    return shortened(repr(value), QUOTED_CHARACTERS)


def kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", bytes: "bytes"}
    return names.get(type(value), "null" if value is None else "a number")
