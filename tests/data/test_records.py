"""Reading data: every malformed file is refused with its place and the field's name."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys

import pyarrow.parquet
import pytest

from softprompt_fast.data import records
from softprompt_fast.data.containers import NO_TEXT
from softprompt_fast.data.dialects import REFUSED
from softprompt_fast.data.records import read_jsonl, read_text


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes | str):
        path = tmp_path / "queries.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


LINE = '{{"prompt": "{}"}}\n'


def test_reads_every_documented_form(write):
    path = write(
        '{"prompt": "one"}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}],'
        ' "completion": "2", "context": "c", "id": 7}\n'
        '{"prompt": [{"role": "user", "content": "three"},'
        ' {"role": "assistant", "content": "3"}]}\n'
        '{"prompt": "four", "completion": [{"role": "assistant", "content": "4"}]}'
    )
    one, two, three, four = read_jsonl(path)
    assert one.messages == [{"role": "user", "content": "one"}]
    assert (one.completion, one.context, one.source) == (None, None, f"{path}:1")
    assert [m["role"] for m in two.messages] == ["system", "user"]
    assert (two.completion, two.context) == ("2", "c")
    assert three.messages == [{"role": "user", "content": "three"}]
    assert three.completion == "3"
    assert four.completion == "4"


def test_fields_that_say_nothing_about_the_answer_are_told_once(write, capsys):
    line = '{"prompt": "a", "prompt_id": 3, "content": "b", "comment": 4}\n'
    record, _ = read_jsonl(write(line + '{"prompt": "b", "comment": null}'))
    assert record.messages[0]["content"] == "a"
    assert (record.completion, record.context) == (None, None)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.endswith("have them: 'comment' (2), 'prompt_id' (1), 'content' (1)")


def test_what_a_message_holds_besides_is_told_too(write, capsys):
    said = {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": None}
    heard = {"from": "human", "value": "a", "weight": 1}
    read_jsonl(write(json.dumps({"messages": [USER, said]})))
    assert "'messages[].weight' (1)" in capsys.readouterr().err
    read_jsonl(write(json.dumps({"conversations": [heard, said]})))
    assert "'messages[].weight' (1)" in capsys.readouterr().err


def test_files_of_our_own_fields_need_no_note(write, capsys):
    read_jsonl(write('{"prompt": "a", "completion": "b", "context": "c"}'))
    assert capsys.readouterr().err == ""


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"prompt": "q", "response": "a"}, [USER]),
        ({"messages": [USER], "answer": "a"}, [USER]),
        ({"system": "s", "prompt": "q", "answer": "a"}, [SYSTEM, USER]),
        ({"system": "s", "messages": [USER, ASSISTANT]}, [SYSTEM, USER]),
        ({"system": "", "messages": [USER, ASSISTANT]}, [USER]),
        ({"instruction": "q", "output": "a"}, [USER]),
        ({"instruction": "q", "input": "", "output": "a"}, [USER]),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [SYSTEM, {"role": "user", "content": "q\n\ni"}],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [USER],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [SYSTEM, USER, ASSISTANT, USER],
        ),
        ({"conversations": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER]),
        ({"conversations": [{"from": "human", "content": "q"}, ASSISTANT]}, [USER]),
        ({"messages": [USER, ASSISTANT], "prompt": None}, [USER]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"text": ""}, "a"]},
                ]
            },
            [USER],
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": "1", "tool_call_id": "7", "name": "f"},
                    ASSISTANT,
                ]
            },
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "7", "name": "f"},
            ],
        ),
    ],
    ids=str,
)
def test_reads_what_other_projects_write(write, capsys, line, messages):
    (record,) = read_jsonl(write(json.dumps(line)))
    assert (record.messages, record.completion) == (messages, "a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_may_change_the_answer_is_refused_by_name(write, field):
    path = write(json.dumps({"prompt": "a", field: "b"}))
    with pytest.raises(ValueError, match=re.escape(f":1: the field {field!r} is not read")):
        read_jsonl(path)
    with pytest.raises(ValueError, match=":1: (the field|unknown field) "):
        read_jsonl(write(json.dumps({"prompt": "a", field.title(): "b"})))
    (record,) = read_jsonl(write(json.dumps({"prompt": "a", field: None})))
    assert record.completion is None


def test_the_digest_is_of_what_was_read(write):
    path = write("\ufeff" + LINE.format("a") + "\r\n" + LINE.format("é"))
    for read in (read_jsonl, read_text):
        digest = hashlib.sha256()
        read(path, digest)
        assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


def test_mark_blank_lines_and_carriage_returns_change_nothing(write):
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}\r\n')
    assert [(r.messages[0]["content"], r.source) for r in read_jsonl(path)] == [
        ("a", f"{path}:1"),
        ("b\u2028c", f"{path}:4"),
    ]


def _user(content) -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a",}', ":2:16: bad JSON: "),
        ("{prompt: 1}", ":2:2: bad JSON: "),
        ("[" * 200_000, ":2:1: bad JSON: nested too deeply"),
        ('["a"]', ":2: expected a JSON object, got a list"),
        ("[", "Where the file is one array, jq -c '.[]' makes such lines of it."),
        ('{"prompt": "a", "answers": "b"}', "'answers'; did you mean 'answer'?"),
        ('{"prompt": "a", "System": "b"}', "'System'; did you mean 'system'?"),
        ('{"prompt": "a", "prompt": "b"}', ":2: field 'prompt' appears twice"),
        ('{"id": 3}', ":2: give 'prompt' or 'messages'; the line has neither ('id')"),
        ('{"prompt": "a", "messages": []}', ":2: give 'prompt' or 'messages'; the line has both"),
        ('{"promt": "a"}', ":2: unknown field 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "a", "Completion": "b"}', "'Completion'; did you mean 'completion'?"),
        ('{"prompt": "NaN", "x": NaN}', ":2:24: bad JSON: NaN is no JSON value"),
        ('{"prompt": "a", "x": [-Infinity]}', ":2:23: bad JSON: -Infinity is no JSON value"),
        ('{"prompt": "a", "contect": "b"}', "'contect'; did you mean 'context'?"),
        ('{"prompt": 3}', ":2: 'prompt' must be a string or a list of messages, got a number"),
        ('{"prompt": []}', "'prompt' must be a string or a list of messages, got an empty list"),
        ('{"prompt": " "}', ":2: 'prompt' is empty"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty; leave it out"),
        ('{"prompt": "a", "completion": true}', "'completion' must be a string, got a boolean"),
        ('{"prompt": "a", "context": ["b"]}', "'context' must be a string, got a list"),
        ('{"prompt": ["a"]}', "'prompt[0]' must be an object, got a string"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "'messages[0].role' must be one of"),
        (_user(None), "'messages[0].content' must be a string, got null"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "'messages' has no user message"),
        (_user("a")[:-1] + ', "completion": []}', "'completion' must be a string or a list"),
        (
            '{"prompt": "a", "response": "b", "answer": "c"}',
            "the line has 'response' and 'answ",
        ),
        ('{"instruction": "a", "output": "b", "response": "c"}', "'output' and another answer"),
        ('{"instruction": ["a"], "output": "b"}', "'instruction' must be a string, got a list"),
        ('{"instruction": "", "output": "b"}', ":2: 'prompt' is empty"),
        ('{"question": "a", "answer": "b"}', "the field 'question' is not read"),
        ('{"conversations": "a"}', "'conversations' must be a list of turns, got a string"),
        ('{"conversations": ["a"]}', "'conversations[0]' must be an object, got a string"),
        ('{"conversations": [{"from": "me", "value": "a"}]}', "'conversations[0].from' must be o"),
        ('{"system": 3, "prompt": "a"}', "'system' must be a string, got a number"),
        (_user([{"type": "image_url"}]), "'messages[0].content[0]' is 'image_url', and only part"),
        (_user([]), "'messages[0].content' must be a string, got a list"),
        ('{"prompt": "\\ud800"}', "'prompt' has half of a surrogate pair at character 0"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_line_is_named(write, line, message):
    path = write('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2")) as caught:
        read_jsonl(path)
    assert message in str(caught.value)


def test_two_answers_in_one_line_are_refused(write):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(json.dumps({"messages": messages, "completion": "c"}))
    with pytest.raises(ValueError, match="ends with an assistant message, and there is a 'compl"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_refused(write, content):
    path = write(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: no records")):
        read_jsonl(path)


def test_not_utf8_gives_the_offset_in_the_file(write):
    path = write(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xff at offset 28"):
        read_jsonl(path)
    for read in (read_jsonl, read_text):  # each byte of it is UTF-8 as well
        with pytest.raises(ValueError, match=r"byte 0x00 at offset 1, which no text holds"):
            read(write('{"prompt": "a"}'.encode("utf-16-le")))


def test_a_giant_line_stops_at_the_cap(write, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 40)
    assert len(read_jsonl(write(LINE.format("a" * 25)))) == 1
    with pytest.raises(ValueError, match=r":2: the line is longer than 40 bytes"):
        read_jsonl(write(LINE.format("a") + LINE.format("a" * 26)))


ROWS = [{"prompt": "a", "completion": None, "id": 1}, {"prompt": "é", "completion": "b", "id": 2}]


def test_packed_files_are_read(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    plain, packed, table = (tmp_path / name for name in ("plain", "packed", "table"))
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    expected = [(record.messages, record.completion) for record in read_jsonl(plain)]
    assert expected[1][1] == "b"
    for path in (packed, table):
        records = read_jsonl(path)
        assert [(record.messages, record.completion) for record in records] == expected
        assert records[1].source == f"{path}:2"
    assert read_text(packed) == text.strip()
    packed.write_bytes(gzip.compress(table.read_bytes()))
    assert len(read_jsonl(packed)) == 2
    packed.write_bytes(gzip.compress(b"%PDF"))
    with pytest.raises(ValueError, match=re.escape(f"{packed} is a PDF")):
        read_jsonl(packed)
    packed.write_bytes(gzip.compress(text.encode()))
    digests = [hashlib.sha256() for _ in range(2)]
    for path, digest in zip((plain, packed), digests, strict=True):
        read_jsonl(path, digest)
    assert digests[0].digest() == digests[1].digest()
    with pytest.raises(ValueError, match="is a Parquet file; a context is text"):
        read_text(table)


@pytest.mark.parametrize("change", [lambda raw: raw[:-9], lambda raw: raw[:30] + b"?" + raw[31:]])
@pytest.mark.parametrize("pack", [gzip.compress, None], ids=["gzip", "parquet"])
def test_a_damaged_packed_file_is_named(tmp_path, pack, change):
    path = tmp_path / "queries"
    if pack is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 50), path)
    else:
        path.write_bytes(pack((json.dumps(ROWS[0]) + "\n").encode() * 50))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path}")):
        read_jsonl(path)


def test_a_date_beyond_pythons_is_named(tmp_path):
    path = tmp_path / "queries"
    dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "at": dates}), path)
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as Parquet: ")):
        read_jsonl(path)


def test_parquet_without_its_reader_is_named(tmp_path, monkeypatch):
    path = tmp_path / "queries"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="is a Parquet file: pip install pyarrow, or write it as"):
        read_jsonl(path)


@pytest.mark.parametrize("signature", NO_TEXT)
def test_what_is_no_text_is_named(write, signature):
    path = write(signature + bytes(20))
    for read in (read_jsonl, read_text):
        with pytest.raises(ValueError, match=re.escape(f"{path} is {NO_TEXT[signature]}.")):
            read(path)


def test_context_text(write):
    assert read_text(write(b"\xef\xbb\xbf\n Rules \r\n")) == "Rules"
    with pytest.raises(ValueError, match="the file is empty; a context needs text"):
        read_text(write(" \n"))
    with pytest.raises(ValueError, match="not UTF-8: byte 0xe9 at offset 1"):
        read_text(write(b"h\xe9"))


def test_system_and_a_system_message_are_refused(write):
    path = write(json.dumps({"system": "s", "messages": [SYSTEM, USER]}))
    with pytest.raises(ValueError, match="'system' and a system message in 'messages'; keep one"):
        read_jsonl(path)


def test_an_answer_of_tool_calls_is_refused(write):
    called = {"role": "assistant", "tool_calls": [CALL]}
    path = write(json.dumps({"messages": [USER, called]}))
    with pytest.raises(ValueError, match="'messages' ends with tool calls"):
        read_jsonl(path)


def test_which_characters_a_query_is_about(write):
    path = write(json.dumps({"prompt": "Hi", "context_span": [3, 9]}))
    assert read_jsonl(path)[0].context_span == (3, 9)
    for wrong in ([3], [9, 3], [-1, 3], [1.0, 2], [True, 2], "3:9", {"start": 3}):
        path = write(json.dumps({"prompt": "Hi", "context_span": wrong}))
        with pytest.raises(ValueError, match="'context_span' must be the numbers of two char"):
            read_jsonl(path)
