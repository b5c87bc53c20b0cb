"""Files that vouch for their own bytes: a digest in them, taken with the digest itself as zeros."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .files import write_bytes

UNSEALED = "0" * 64
SEAL = re.compile(rb'seal\\?": ?\\?"([0-9a-f]{64})\\?"')
# Ours take 3 kB: more than this is damage, whatever the size of the file.
MAX_SEALED = 2**20


class DamagedFile(ValueError):
    """A file is not what was written. The message begins with its path."""


def seal(data: bytes) -> bytes:
    """``data`` with its own digest in the place of the 64 zeros behind "seal"."""
    (place,) = SEAL.finditer(data)
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[: place.start(1)] + digest + data[place.end(1) :]


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` is what ``seal`` returned, to the bit."""
    place = SEAL.search(data)
    if place is None:
        return False
    unsealed = data[: place.start(1)] + UNSEALED.encode() + data[place.end(1) :]
    return hashlib.sha256(unsealed).hexdigest().encode() == place[1]


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """``write_json`` with one more entry, the seal."""
    text = json.dumps({**value, "seal": UNSEALED}, indent=2, sort_keys=True) + "\n"
    write_bytes(path, seal(text.encode()))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Raises DamagedFile if this is not what was written."""
    check_is_plain_file(path)
    with open(path, "rb") as file:
        data = file.read(MAX_SEALED)
    if not is_sealed(data):
        size = path.stat().st_size
        raise DamagedFile(f"{path} is damaged: its bytes, 0 to {size}, are not as written")
    return json.loads(data)


def check_is_plain_file(path: Path) -> None:
    """Raises DamagedFile, before a pipe is opened that nobody writes to."""
    if path.is_symlink() or not path.is_file():
        raise DamagedFile(f"{path} is damaged: it is not a plain file")
