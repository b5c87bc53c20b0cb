"""The output directory of ``synthesize``: who owns it, by which options, and what is done.

synthesis.json                the options, "writing" or "finished"; at the end the counts
queries.partial.jsonl         what the model has written so far, one batch a line
train.jsonl, heldout.jsonl    the result
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.files import named_failures, sync_directory, write_bytes
from ..utils.owned_directory import OwnedDirectory, read_state

STATE_FILE = "synthesis.json"
JOURNAL_FILE = "queries.partial.jsonl"
TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
FORMAT_VERSION = 1


class SynthesisDirectory(OwnedDirectory):
    what = "of softprompt-fast synthesize"
    holds = "queries"
    use = "writes queries"
    state_file = STATE_FILE
    files = (TRAIN_FILE, HELDOUT_FILE)

    def __init__(self, path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        """options: JSON values, all that the result depends on besides the model's content."""
        super().__init__(path, options)
        self.entries: list[dict[str, Any]] = []
        """What the journal holds."""

    @property
    def is_finished(self) -> bool:
        state = self.read_state()
        files = (self.path / str(name) for name in state.get("files", []))
        return state.get("status") == "finished" and all(file.is_file() for file in files)

    def start(self, facts: dict[str, Any]) -> None:
        """Take the directory, and read what is there. facts: what the model and its answers are.

        Raises ValueError if what is there was written by another model, or is damaged.
        """
        self.check_same(
            self.read_state().get("model", facts), facts, "holds queries by another model:"
        )
        self.remove_leftovers()
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

    def read_state(self) -> dict[str, Any]:
        return read_state(self.path / STATE_FILE, options=dict, model=dict, files=list)

    def _write(self, status: str, **facts: Any) -> None:
        state = {"format_version": FORMAT_VERSION, "status": status, "options": self.options}
        self.write_state({**state, **facts})

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
