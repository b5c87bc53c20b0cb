"""Flipped bits and cut files: a cache must see each of them."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from toy_cache import CachedToy, contents

from softprompt_fast.teacher.cache import FACTS_FILE
from softprompt_fast.teacher.cache_files import read_shard
from softprompt_fast.utils.sealed import DamagedFile, read_sealed_json


def flip_bits(
    toy: CachedToy, directory: Path, flips: int, rng: random.Random, report: Callable[[str], None]
) -> list[str]:
    """Flip a bit anywhere in the cache, and ask it: what is damaged is set aside and made again."""
    facts = toy.facts
    toy.answers(directory, facts)
    whole = contents(directory)
    problems = []
    for number in range(1, flips + 1):
        (name,) = rng.choices(list(whole), weights=list(map(len, whole.values())))
        data = bytearray(whole[name])
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        _replace(directory / name, bytes(data))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            toy.answers(directory, facts)
        right = whole | {f"{name}.damaged": bytes(data)}
        if contents(directory) != right or not _names(directory / name, place, said.getvalue()):
            problems.append(f"{name}, byte {place}, bit {bit}: {said.getvalue()!r}")
            _replace(directory / name, whole[name])
        (directory / f"{name}.damaged").unlink(missing_ok=True)
        if number % 250 == 0:
            report(f"{number} of {flips} bits flipped, {len(problems)} problems")
    return problems


def _names(path: Path, place: int, message: str) -> bool:
    """Whether the message says which file is damaged, and about where."""
    ranges = re.findall(r"(?:bytes|its bytes,) (\d+) to (\d+)", message)
    within = all(int(first) <= place < int(last) for first, last in ranges)
    return message.startswith(f"{path} ") and within


def cut(toy: CachedToy, directory: Path) -> tuple[int, list[str]]:
    """Cut each file of the cache to every length; how many lengths, and what was unseen."""
    toy.answers(directory)
    lengths, problems = 0, []
    for path in directory.iterdir():
        if path.name == FACTS_FILE:
            read = read_sealed_json
        else:
            (digest,) = (digest for digest in toy.digests if digest[:32] in path.name)
            read = partial(read_shard, queries=digest, check_facts=lambda facts: None)
        whole = path.read_bytes()
        read(path)
        for length in reversed(range(len(whole))):
            lengths += 1
            os.truncate(path, length)
            try:
                read(path)
                problems.append(f"{path.name}, cut to {length} of {len(whole)} bytes: unseen")
            except DamagedFile as error:
                if not str(error).startswith(f"{path} "):
                    problems.append(f"{path.name}, cut to {length} bytes: {error}")
        _replace(path, whole)
    return lengths, problems


def _replace(path: Path, data: bytes) -> None:
    """By another file: the old one may be mapped into memory."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


class Evil:
    """Its pickle runs code where it is opened: it makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("evil",)
