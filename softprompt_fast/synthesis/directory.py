"""The output directory of ``synthesize``: who owns it, by which options, and what is done.

synthesis.json                the options, "writing" or "finished"; at the end the counts
queries.partial.jsonl         what the model has written so far, one batch a line
train.jsonl, heldout.jsonl    the result
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..teacher.facts import differing_facts
from ..utils.files import (
    check_free,
    leftovers,
    locked,
    make_writable,
    named_failures,
    read_json,
    sync_directory,
    write_bytes,
    write_json,
)

STATE_FILE = "synthesis.json"
JOURNAL_FILE = "queries.partial.jsonl"
TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
LOCK_FILE = ".lock"
FORMAT_VERSION = 1


class SynthesisDirectory:
    """Made before the model loads: whatever is wrong with the directory is said at once."""

    def __init__(self, path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        """options: JSON values, all that the result depends on besides the model's content.

        Raises OSError if the directory cannot be written to.
        """
        self.path = Path(path)
        self.options = options
        self.entries: list[dict[str, Any]] = []
        """What the journal holds."""
        make_writable("output_dir", self.path)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Raises ValueError if the directory is in use, or holds something else."""
        self._check_free()
        with locked(self.path / LOCK_FILE, wait=False) as is_ours:
            if not is_ours:
                raise ValueError(
                    f"output_dir {self.path} is in use: another process writes queries there"
                )
            self._check_same("options", self.options)
            yield

    @property
    def is_finished(self) -> bool:
        state = self._state()
        files = (self.path / str(name) for name in state.get("files", []))
        return state.get("status") == "finished" and all(file.is_file() for file in files)

    def start(self, facts: dict[str, Any]) -> None:
        """Take the directory, and read what is there. facts: what the model and its answers are.

        Raises ValueError if what is there was written by another model, or is damaged.
        """
        self._check_same("model", facts)
        names = (STATE_FILE, TRAIN_FILE, HELDOUT_FILE)
        for temporary in leftovers(self.path, names):
            temporary.unlink()
        self._write("writing", model=facts)
        self._read_journal()

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a batch; it is on the disk when this returns."""
        file = self.path / JOURNAL_FILE
        is_new = not file.exists()
        with named_failures(file), open(file, "ab") as journal:
            journal.write(_sealed(entry))
            journal.flush()
            os.fsync(journal.fileno())
        if is_new:
            sync_directory(self.path)
        self.entries.append(entry)

    def check_entry(self, fits: bool) -> None:
        """Raises ValueError unless what was read from the journal ``fits``."""
        if not fits:
            raise ValueError(
                f"{self.path / JOURNAL_FILE} is not of this run. Delete {self.path} to start anew."
            )

    def finish(
        self,
        files: Mapping[str, Sequence[dict[str, Any]]],
        facts: dict[str, Any],
        **counts: Any,
    ) -> None:
        """The result, then the note that it is whole, and only then the journal goes.

        files: JSON values by the name of the file, one for each line.
        """
        for name, records in files.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_bytes(self.path / name, "".join(lines).encode())
        self._write("finished", model=facts, files=sorted(files), **counts)
        self.clear()

    def clear(self) -> None:
        """Nobody needs the journal of a result that is whole."""
        (self.path / JOURNAL_FILE).unlink(missing_ok=True)

    def _check_free(self) -> None:
        ours = [LOCK_FILE, *(path.name for path in leftovers(self.path, [STATE_FILE]))]
        check_free(self.path, ours=ours, mark=STATE_FILE, what="of softprompt-fast synthesize")

    def _check_same(self, name: str, now: dict[str, Any]) -> None:
        differing = differing_facts(self._state().get(name, now), now)
        if differing:
            what = {"options": "with other options", "model": "by another model"}[name]
            raise ValueError(
                f"output_dir {self.path} holds queries {what}: {'; '.join(differing)}. "
                "Choose another directory, or delete this one."
            )

    def _state(self) -> dict[str, Any]:
        file = self.path / STATE_FILE
        state = read_json(file) if file.is_file() else {}
        for name, kind in (("options", dict), ("model", dict), ("files", list)):
            if not isinstance(state.get(name, kind()), kind):
                raise ValueError(f"{file} is damaged: {name} must be of type {kind.__name__}.")
        return state

    def _write(self, status: str, **facts: Any) -> None:
        state = {"format_version": FORMAT_VERSION, "status": status, "options": self.options}
        write_json(self.path / STATE_FILE, {**state, **facts})

    def _read_journal(self) -> None:
        """A last line that is not whole was being written when the process died: it goes."""
        file = self.path / JOURNAL_FILE
        if not file.exists():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(file, sum(map(len, lines[:-1])))
            lines.pop()
        for number, line in enumerate(lines, 1):
            entry = _unsealed(line)
            if entry is None:
                raise ValueError(f"{file}:{number} is damaged. Delete {self.path} to start anew.")
            self.entries.append(entry)


def _sealed(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry)
    return json.dumps({"sha256": _sha256(text), "entry": text}).encode() + b"\n"


def _unsealed(line: bytes) -> dict[str, Any] | None:
    """None if this is not what was written."""
    try:
        sealed = json.loads(line)
        entry = json.loads(sealed["entry"])
        return entry if sealed["sha256"] == _sha256(sealed["entry"]) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
