"""One file of a teacher cache: answers, and what the teacher knew when it gave them.

A safetensors file whose header vouches for it. Its metadata has one entry, so that the same answers
always make the same bytes:

    softprompt_fast    JSON: facts, queries (digests), tensors (a digest for each), seal

``seal`` is the digest of the 8 + N bytes of the header, taken with the seal itself as zeros.

Legend: T tokens of the n answers, one after another; D hidden width, k entries of a sketch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..utils.files import refuse_pickle, write_bytes
from ..utils.sealed import MAX_SEALED, UNSEALED, DamagedFile, check_is_plain_file, is_sealed, seal
from .answers import Answer, pack, unpack
from .facts import tensor_bytes

ENTRY = "softprompt_fast"
BLOCK = 2**20


def write_shard(path: Path, answers: Sequence[Answer], queries: str, facts: dict[str, Any]) -> None:
    """queries: the digest of what was answered. Raises OSError naming ``path`` and its bytes."""
    tensors = pack(answers)
    digests = {name: hashlib.sha256(tensor_bytes(t)).hexdigest() for name, t in tensors.items()}
    entry = {"facts": facts, "queries": queries, "tensors": digests, "seal": UNSEALED}
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True)
    data = memoryview(save(tensors, {ENTRY: text}))
    start = 8 + int.from_bytes(data[:8], "little")
    write_bytes(path, seal(bytes(data[:start])), data[start:])


def read_shard(
    path: Path, queries: str, check_facts: Callable[[dict[str, Any]], None]
) -> list[Answer]:
    """The answers, mapped into memory: their bytes are read when they are needed.

    Before that the file is read once, in blocks, and compared with its digests.
    Raises DamagedFile, naming the tensor and its place, or what ``check_facts`` raises.
    """
    header, start = _header(path)
    entry = json.loads(header["__metadata__"][ENTRY])
    check_facts(entry["facts"])
    if entry["queries"] != queries:
        raise DamagedFile(f"{path} is damaged: it holds the answers to other queries")
    _check_tensors(path, header, entry["tensors"], start)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    return unpack(tensors, entry["facts"])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, known to be ours, and where the tensors start."""
    check_is_plain_file(path)
    try:
        refuse_pickle(path)
    except ValueError as error:
        raise DamagedFile(str(error).rstrip(".")) from error
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = file.read(8)
        start = 8 + int.from_bytes(length, "little")
        if start > min(size, 8 + MAX_SEALED):
            raise DamagedFile(
                f"{path} is damaged: its header claims {start - 8} bytes at byte 0, in a file of "
                f"{size}"
            )
        data = length + file.read(start - 8)
    if not is_sealed(data):
        raise DamagedFile(f"{path} is damaged: its header, bytes 0 to {start}, is not as written")
    header = json.loads(data[8:])
    end = start + max(t["data_offsets"][1] for name, t in header.items() if name[0] != "_")
    if end != size:
        problem = f"{end - size} are missing" if end > size else f"{size - end} follow its end"
        raise DamagedFile(f"{path} is damaged: it has {size} bytes, and {problem} at byte {end}")
    return header, start


def _check_tensors(path: Path, header: dict[str, Any], digests: dict[str, str], start: int) -> None:
    for name, expected in digests.items():
        first, last = (start + offset for offset in header[name]["data_offsets"])
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(first)
            for position in range(first, last, BLOCK):
                digest.update(file.read(min(BLOCK, last - position)))
        if digest.hexdigest() != expected:
            raise DamagedFile(
                f"{path} is damaged: tensor {name!r}, bytes {first} to {last}, is not as written"
            )
