"""A damaged file is named, set aside and made again; nothing in it is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from damage import Evil
from toy_cache import bits, contents, shards

from softprompt_fast.teacher.cache import FACTS_FILE
from softprompt_fast.teacher.cache_files import ENTRY
from softprompt_fast.utils.sealed import UNSEALED, seal


def header(path) -> tuple[dict, int]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), start


def flip_in_a_tensor(path, tmp_path):
    facts, start = header(path)
    first, last = (start + offset for offset in facts["hidden"]["data_offsets"])
    data = bytearray(path.read_bytes())
    data[last - 1] ^= 1
    path.write_bytes(data)
    return f"tensor 'hidden', bytes {first} to {last}, is not as written"


def flip_in_the_header(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    return f"its header, bytes 0 to {header_end(path)}, is not as written"


def header_end(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def cut(path, tmp_path):
    size = path.stat().st_size
    os.truncate(path, size - 3)
    return f"it has {size - 3} bytes, and 3 are missing at byte {size}"


def lengthen(path, tmp_path):
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    return f"it has {size + 4} bytes, and 4 follow its end at byte {size}"


def claim_a_huge_header(path, tmp_path):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    return f"its header claims {2**60} bytes at byte 0"


def claim_a_huge_tensor(path, tmp_path):
    """With a seal that is right."""
    facts, _ = header(path)
    entry = json.loads(facts["__metadata__"][ENTRY])
    facts["__metadata__"][ENTRY] = json.dumps({**entry, "seal": UNSEALED})
    facts["hidden"] = dict(dtype="U8", shape=[2**60], data_offsets=[0, 2**60])
    text = json.dumps(facts).encode()
    path.write_bytes(seal(len(text).to_bytes(8, "little") + text))
    return "are missing at byte"


def empty(path, tmp_path):
    path.write_bytes(b"")
    return "its content is something else"


def offer_a_pickle(path, tmp_path):
    path.write_bytes(pickle.dumps(Evil()))
    return "its content is a pickle (torch.save), which is never opened here"


def offer_a_checkpoint(path, tmp_path):
    torch.save(Evil(), path)
    return "its content is a pickle (torch.save), which is never opened here"


def swap(path, tmp_path):
    shutil.copy(shards(path.parent)[1], path)
    return "it holds the answers to other queries"


def link_away(path, tmp_path):
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    return "it is not a plain file"


def link_to_nothing(path, tmp_path):
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    return "it is not a plain file"


def be_a_directory(path, tmp_path):
    path.unlink()
    path.mkdir()
    return "it is not a plain file"


def be_a_pipe(path, tmp_path):
    path.unlink()
    os.mkfifo(path)
    return "it is not a plain file"


def be_huge(path, tmp_path):
    os.truncate(path, 2**40)
    return f"{2**40}"


OF_A_SHARD = [
    *(flip_in_a_tensor, flip_in_the_header, cut, lengthen, claim_a_huge_header),
    *(claim_a_huge_tensor, empty, offer_a_pickle, offer_a_checkpoint, swap, be_huge),
    *(link_away, link_to_nothing, be_a_directory, be_a_pipe),
]
OF_THE_FACTS = [be_huge, link_away, link_to_nothing, be_a_directory, be_a_pipe]


@pytest.mark.parametrize(
    ("damage", "facts"),
    [*((damage, False) for damage in OF_A_SHARD), *((damage, True) for damage in OF_THE_FACTS)],
    ids=lambda value: value.__name__ if callable(value) else "facts" if value else "shard",
)
def test_damage_is_set_aside_and_made_again(
    toy, filled, directory, tmp_path, monkeypatch, capsys, damage, facts
):
    monkeypatch.chdir(tmp_path)
    path = directory / FACTS_FILE if facts else shards(directory)[0]
    others = {p: p.stat().st_ino for p in directory.iterdir() if p != path}
    what = damage(path, tmp_path)
    answers = toy.answers(directory)
    said = capsys.readouterr().err
    assert said.startswith(f"{path} ")
    assert what in said
    assert f"It is kept as {path.name}.damaged, and made again." in said
    assert os.path.lexists(f"{path}.damaged")
    assert bits(answers) == bits(toy.answers(filled))
    assert path.read_bytes() == (filled / path.name).read_bytes()
    assert {p: p.stat().st_ino for p in others} == others
    assert not (tmp_path / "evil").exists()


def test_what_was_set_aside_stays(toy, directory):
    shard = shards(directory)[0]
    for content in (b"one", b"two", b"three"):
        shard.write_bytes(content)
        toy.answers(directory)
    aside = {n.removeprefix(shard.name): data for n, data in contents(directory).items()}
    assert aside[".damaged"] == b"one"
    assert aside[".2.damaged"] == b"two"
    assert aside[".3.damaged"] == b"three"
