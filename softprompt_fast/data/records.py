"""Queries from JSON Lines files, and contexts from text files.

One JSON object a line, in UTF-8::

    {"prompt": "What do you charge to fix a flat tire?"}
    {"messages": [{"role": "user", "content": "Hi"}], "completion": "Hello", "context": "Be brief"}

``prompt`` (or its alias ``messages``) is a string or a list of messages; a closing assistant
message is the completion. ``completion`` and ``context`` are optional, and so is ``context_span``:
which characters of the context the query is about, ``[start, end]``. Blank lines are skipped. For
fields of other names see ``dialects.py``.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..utils.console import progress
from ..utils.files import decode_utf8
from .containers import opened, parquet_rows
from .dialects import PASSED_ON, kind, objects, quoted, standard, text_of_parts

MAX_LINE_BYTES = 10 * 2**20
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(kw_only=True, frozen=True)
class Record:
    messages: list[dict]
    """The conversation up to the answer, as ``{"role": ..., "content": ...}``; with tool calls
    where it has some."""
    completion: str | None
    """The answer, or None where the teacher is to give it."""
    context: str | None
    """The context of this line; None means the run's own context."""
    source: str
    """Where the record was read, as ``file:line``."""
    context_span: tuple[int, int] | None = None
    """Characters of the context, from the first up to the second, that the query is about."""

    def context_or(self, context: str | None) -> str:
        """Its own context, or else the run's."""
        return self.context or context or ""

    @property
    def asked(self) -> str:
        """What the user says in it."""
        return "\n".join(m["content"] for m in self.messages if m["role"] == "user")


def read_jsonl(path, digest: Any = None) -> list[Record]:
    """All records of the file: JSON Lines, perhaps packed by gzip, or Parquet.

    digest: a ``hashlib`` object, fed with what is read. To open the file once more may find another
    content, or none: ``<(command)`` is a pipe.

    Fields that say nothing about the answer are left out; how many lines have them is told once.

    Raises ValueError that starts with ``file:line:`` (and the column, where the JSON is bad) and
    names the field; ValueError if the file holds no records; OSError if it cannot be read.
    """
    records = []
    left_out: Counter[str] = Counter()
    for source, found in _objects(path, digest):
        value, ignored = standard(found, source)
        records.append(_record(value, ignored, source))
        left_out.update(ignored)
    if not records:
        raise ValueError(f"{path}: no records. Write one JSON object a line, with a field 'prompt'")
    if left_out:
        names = ", ".join(f"{quoted(name)} ({count})" for name, count in left_out.most_common(8))
        progress(f"Note: {path}: fields that are not read, and how many lines have them: {names}")
    return records


def read_text(path, digest: Any = None) -> str:
    """The text of a UTF-8 file, perhaps packed by gzip, without a byte order mark; surrounding
    blank space is cut off."""
    with opened(path) as (stream, is_parquet):
        raw = stream.read()
    if is_parquet:
        raise ValueError(f"{path} is a Parquet file; a context is text")
    if digest is not None:
        digest.update(raw)
    text = decode_utf8(raw, path, 0).strip()
    if not text:
        raise ValueError(f"{path}: the file is empty; a context needs text")
    return text


def _objects(path, digest: Any) -> Iterator[tuple[str, dict]]:
    """``(file:line, object)`` of each line, or row, that holds one."""
    with opened(path) as (stream, is_parquet):
        if not is_parquet:
            for number, line in _lines(stream, path, digest):
                if line.strip():
                    source = f"{path}:{number}"
                    yield source, _json_object(line, source)
            return
        whole = io.BytesIO(stream.read())
        if digest is not None:
            digest.update(whole.getbuffer())
        for number, row in enumerate(parquet_rows(whole, path), 1):
            yield f"{path}:{number}", row


def _lines(stream: BinaryIO, path, digest: Any) -> Iterator[tuple[int, str]]:
    """``(number, line)``, holding no more than one line (of bounded size) in memory."""
    offset = 0
    for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(
                f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes. "
                "JSON Lines has one object a line: is a line break missing?"
            )
        if digest is not None:
            digest.update(raw)
        yield number, decode_utf8(raw, path, offset)
        offset += len(raw)


def _json_object(line: str, source: str) -> dict:
    def refuse_constant(name: str):
        raise json.JSONDecodeError(f"{name} is no JSON value", line, _outside_strings(name, line))

    is_array = line.lstrip("\ufeff \t").startswith("[")
    hint = " Where the file is one array, jq -c '.[]' makes such lines of it." if is_array else ""
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}:{error.colno}: bad JSON: {error.msg}. Each line must hold one JSON object."
            + hint
        ) from None
    except RecursionError:
        raise ValueError(f"{source}:1: bad JSON: nested too deeply") from None
    except ValueError as error:  # a duplicate field, or a number too long to convert
        raise ValueError(f"{source}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {kind(value)}.{hint}")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result: dict = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"field {quoted(key)} appears twice")
        result[key] = value
    return result


def _outside_strings(word: str, line: str) -> int:
    """Where ``word`` first stands in a line of JSON, not counting what is within quotes."""
    found = re.finditer(rf'"(?:[^"\\]|\\.)*"|{word}', line)
    return next(match.start() for match in found if match[0] == word)


def _record(value: dict, ignored: list[str], source: str) -> Record:
    if ("prompt" in value) == ("messages" in value):
        problem = "both" if "prompt" in value else "neither"
        found = ", ".join(map(quoted, [*value, *ignored])) or "no fields"
        raise ValueError(f"{source}: give 'prompt' or 'messages'; the line has {problem} ({found})")
    field = "prompt" if "prompt" in value else "messages"
    messages = _messages(value[field], field, source)
    completion = value.get("completion")
    if messages[-1]["role"] == "assistant":
        if completion is not None:
            raise ValueError(
                f"{source}: {field!r} ends with an assistant message, and there is a 'completion' "
                "too; keep one of them"
            )
        completion = [messages.pop()]
        if "tool_calls" in completion[0]:
            raise ValueError(
                f"{source}: {field!r} ends with tool calls, and an answer must be text"
            )
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{source}: {field!r} has no user message")
    return Record(
        messages=messages,
        completion=None if completion is None else _completion(completion, source),
        context=_text(value, "context", source) if value.get("context") is not None else None,
        source=source,
        context_span=_span(value.get("context_span"), source),
    )


def _span(value, source: str) -> tuple[int, int] | None:
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    if not is_pair or not 0 <= value[0] < value[1]:
        raise ValueError(
            f"{source}: 'context_span' must be the numbers of two characters, [start, end], the "
            f"first one smaller; got {quoted(value)}"
        )
    return value[0], value[1]


def _messages(value, field: str, source: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "user", "content": _text({field: value}, field, source)}]
    messages = []
    for where, message in objects(value, field, "a string or a list of messages", source):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(
                f"{source}: '{where}.role' must be one of {', '.join(ROLES)}; got {quoted(role)}"
            )
        beside = {name: message[name] for name in PASSED_ON if message.get(name) is not None}
        content = message.get("content")
        if isinstance(content, list) and content:
            content = text_of_parts(content, f"{where}.content", source)
        if content is None and "tool_calls" in beside:
            content = ""
        else:
            content = _text({f"{where}.content": content}, f"{where}.content", source)
        messages.append({"role": role, "content": content, **beside})
    return messages


def _completion(value, source: str) -> str:
    if isinstance(value, list):
        messages = _messages(value, "completion", source)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise ValueError(f"{source}: 'completion' must be a string or one assistant message")
        return messages[0]["content"]
    return _text({"completion": value}, "completion", source)


def _text(value: dict, field: str, source: str) -> str:
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"{source}: {field!r} must be a string, got {kind(text)}")
    if not text.strip():
        hint = "; leave it out to have the model answer" if field == "completion" else ""
        raise ValueError(f"{source}: {field!r} is empty{hint}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: {field!r} has half of a surrogate pair at character {error.start}"
        ) from None
    return text
