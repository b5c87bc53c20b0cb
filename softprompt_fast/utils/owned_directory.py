"""A directory that one process at a time fills, and a file in it that says what it is."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .files import leftovers, make_writable, read_json, write_json
from .sealed import read_sealed_json, write_sealed_json

if TYPE_CHECKING:
    from typing_extensions import Self


class OwnedDirectory:
    """Made before the model loads, and owned while there is something to write:

        with RunDirectory(path, ...).owned() as directory: ...

    so whatever is wrong with the directory is said at once. A subclass says what it holds.
    """

    option: ClassVar[str] = "output_dir"
    """The option whose value it is, for messages."""

    what: ClassVar[str]
    """What it holds, after "it is not"."""

    holds: ClassVar[str]
    """What it is that has options."""

    use: ClassVar[str]
    """What its owner does, after "another process"."""

    state_file: ClassVar[str]
    """The JSON file by which the directory is known. It is written whole or not at all."""

    is_sealed: ClassVar[bool] = False
    """Whether the state vouches for its own bytes."""

    files: ClassVar[tuple[str, ...]] = ()
    """Names, or patterns of them, of what else is written whole or not at all by the owner."""

    early: ClassVar[str] = ""
    """A regular expression: names that may be there before the state file is."""

    lock_file: ClassVar[str] = ".lock"

    absent: ClassVar[Any] = None
    """What a field is where there is none."""

    remedy: ClassVar[str] = "delete this one"
    """What to do with what cannot be continued."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: dict[str, Any] | None = None,
        *,
        is_owner: bool = True,
    ) -> None:
        """options: JSON values, on which depends what is written; the state has them.
        is_owner: False in all processes of a run but one; they read, and write nothing.

        Raises OSError if the directory cannot be made or written to, and ValueError if it holds
        something else.
        """
        self.path = Path(path)
        self.options = options
        self.is_owner = is_owner
        if is_owner:
            make_writable(self.option, self.path)
            self._check_free()

    @contextmanager
    def owned(self, *, wait: bool = False) -> Iterator[Self]:
        """wait: for another owner to be done.

        Raises ValueError if another process owns the directory, or if what it holds was begun with
        other options, and OSError if its lock is a symbolic link.
        """
        lock = locked(self.path / self.lock_file, wait=wait) if self.is_owner else nullcontext(True)
        with lock as is_ours:
            if not is_ours:
                raise ValueError(
                    f"{self.option} {self.path} is in use: another process {self.use} there"
                )
            if self.options is not None:
                there = self.read_state().get("options", self.options)
                self.check_same(there, self.options, f"holds {self.holds} with other options:")
            yield self

    def remove_leftovers(self) -> None:
        """What an owner that was killed had not written to its end."""
        for file in leftovers(self.path, (self.state_file, *self.files)):
            file.unlink()

    def read_state(self) -> dict[str, Any]:
        """Empty where there is none, unless it is sealed. Raises ValueError if it is damaged."""
        file = self.path / self.state_file
        return read_sealed_json(file) if self.is_sealed else read_state(file)

    def write_state(self, state: dict[str, Any]) -> None:
        write = write_sealed_json if self.is_sealed else write_json
        write(self.path / self.state_file, state)

    def check_same(self, there: Mapping[str, Any], now: Mapping[str, Any], problem: str) -> None:
        """Raises ValueError with the problem and the fields that differ."""
        differing = [
            f"{name}: {self._shown(name, there)} there, {self._shown(name, now)} now"
            for name in sorted(there.keys() | now.keys())
            if there.get(name) != now.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.option} {self.path} {problem} {'; '.join(differing)}. "
                f"Choose another directory, or {self.remedy}."
            )

    def _shown(self, name: str, values: Mapping[str, Any]) -> str:
        """Of a digest, what tells it apart."""
        value = values.get(name, self.absent)
        return repr(value[:12] if isinstance(value, str) and len(value) == 64 else value)

    def _check_free(self) -> None:
        names = sorted(file.name for file in self.path.iterdir())
        unwritten = (file.name for file in leftovers(self.path, [self.state_file]))
        ours = {self.lock_file, *unwritten}
        others = [name for name in names if name not in ours and not re.fullmatch(self.early, name)]
        if others and self.state_file not in names:
            raise ValueError(
                f"{self.option} {self.path} is occupied: it holds {others[0]!r} and no "
                f"{self.state_file}, so it is not {self.what}. Choose another directory."
            )


def read_state(file: Path, **kinds: type) -> dict[str, Any]:
    """Empty where there is no file. kinds: of some fields, by name.

    Raises ValueError naming what is damaged.
    """
    state = read_json(file) if file.is_file() else {}
    for name, kind in kinds.items():
        if name in state:
            check_kind(file, name, state[name], kind)
    return state


def check_kind(file: Path, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"{file} is damaged: {name} must be of type {kind.__name__}, got {value!r}."
        )


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds the lock ``path``, which it lets go at the end of the block.

    The system lets it go for a process that dies. The file goes with the lock.
    Raises OSError if ``path`` is a symbolic link.
    """
    while True:
        # Neither what a link leads to nor what lies here is touched.
        with open(path, "a", opener=_follow_no_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # Its last owner may have deleted it while we waited: then it keeps nobody out.
            if _lies_at(path, file.fileno()):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return


def _follow_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, mode=0o666)


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
