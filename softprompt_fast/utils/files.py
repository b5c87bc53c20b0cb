"""Files that are whole or absent: written beside their name, forced to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What torch.save makes of a full disk: a plain RuntimeError, and no error number.
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error")


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Replace ``path`` by these bytes; a process killed on the way leaves the old file.

    Raises OSError naming ``path`` and how much was to be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        problem = f"cannot write {sum(map(len, parts))} bytes: {error.strerror}"
        raise OSError(error.errno, problem, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def leftovers(directory: Path, names: Iterable[str]) -> list[Path]:
    """What ``write_bytes`` left beside these names where it was killed."""
    return [path for name in names for path in directory.glob(f".{name}.*.tmp")]


def make_writable(name: str, path: Path) -> None:
    """Raises OSError naming the option ``name`` if ``path`` cannot be made, or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {name} {path}: {error.strerror}") from error


@contextmanager
def new_directory(name: str, path: str) -> Iterator[Path]:
    """A directory to fill. At the end of the block it is ``path``; with an error, nothing is there.

    Raises ValueError if ``path``, the value of the option ``name``, is a file or holds something;
    OSError naming both if it cannot be made.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"{name} {path} is occupied: nothing there is replaced. Choose a new directory."
        )
    filling = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        filling.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write to {name} {path}: {error.strerror}") from error
    try:
        yield filling
        os.replace(filling, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


@contextmanager
def named_failures(path: str | os.PathLike[str]) -> Iterator[None]:
    """Other libraries do not say where a write failed: such an error gets the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, f"cannot write to it: {error.strerror}", str(path)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in FAILED_WRITES):
            raise
        problem = (
            f"cannot write a checkpoint to it: is the disk full? ({str(error).splitlines()[0]})"
        )
        raise OSError(None, problem, str(path)) from error


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file if it is not one JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}.")
    return value


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file that another library wrote are on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_pickle(path: Path) -> None:
    """Raises ValueError if the content of ``path`` is not in the safetensors format.

    Only the first bytes are read: unpickling a file runs whatever code it holds.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file is the length of its header (8 bytes), then the header's JSON object.
    if head[8:9] == b"{":
        return
    is_pickle = head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"
    found = "a pickle (torch.save), which is never opened here" if is_pickle else "something else"
    raise ValueError(f"{path} must be a safetensors file: its content is {found}.")


def read_utf8(path) -> str:
    """The whole file, without a byte order mark. Raises ValueError naming the first bad byte."""
    return decode_utf8(Path(path).read_bytes(), path, 0)


def decode_utf8(raw: bytes, path, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}. "
            "Save the file as UTF-8."
        ) from None
    if "\0" in text:  # as in UTF-16, whose plain English is ASCII with such bytes between
        raise ValueError(
            f"{path}: byte 0x00 at offset {offset + raw.index(0)}, which no text holds. "
            "Save the file as UTF-8."
        )
    return text.removeprefix("\ufeff" if offset == 0 else "")
