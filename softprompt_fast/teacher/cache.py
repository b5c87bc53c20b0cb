"""The teacher's work in a directory: killed, shared or damaged, only what is missing is redone.

teacher_cache.json          the facts of the teacher, by which a stale cache is known
shard-DIGEST.safetensors    the answers to some queries, named by what the teacher reads
shard-....damaged           what was found to be damaged; never read
.shard-....lock             who computes a shard; the system lets it go for a process that dies

No file's content names another file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base_model.fsdp import any_process_has, in_lockstep, is_sharded
from ..data.queries import Query
from ..utils.console import progress
from ..utils.files import leftovers, sync_directory
from ..utils.owned_directory import OwnedDirectory, locked
from ..utils.sealed import DamagedFile
from .answers import Answer, SketchOptions
from .cache_files import read_shard, write_shard
from .facts import queries_sha256
from .teacher import Reading, Teacher

FACTS_FILE = "teacher_cache.json"
POLL_SECONDS = 0.1


@dataclass(kw_only=True)
class _Shard:
    path: Path
    digest: str
    queries: Sequence[Query]
    given: Sequence[list[int] | None]
    answers: list[Answer] = field(default_factory=list)

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")


class TeacherCache(OwnedDirectory):
    """May be shared by any number of processes at once; together they compute each shard once.

    A process owns it while it compares the facts. Each shard has a lock of its own.
    """

    option = "teacher_cache"
    what = "a teacher cache"
    use = "works"
    state_file = FACTS_FILE
    is_sealed = True
    early = r"\.?(teacher_cache\.json|shard-).*"
    lock_file = f".{FACTS_FILE}.lock"

    def answers(
        self,
        teacher: Teacher,
        queries: Sequence[Query],
        given: Sequence[list[int] | None],
        facts: dict[str, Any],
        *,
        record_hidden: bool = False,
        sketch: SketchOptions | None = None,
    ) -> list[Answer]:
        """What ``teacher.answer`` returns, bit for bit, and mapped into memory.

        facts: ``teacher_facts`` of the teacher. A damaged file is set aside, and its work done
        again. Raises ValueError with the differing facts if the cache is that of another teacher,
        OSError naming the file if there is no space; and what ``teacher.answer`` raises.
        """
        self._claim(facts)
        shards = [self._shard(queries[part], given[part]) for part in teacher.shards(len(queries))]
        form: dict[str, Any] = {"record_hidden": record_hidden, "sketch": sketch}
        with teacher.one_reading(len(queries)) as reading:
            left, wait = shards, False
            # First what nobody else is at, then what they have done meanwhile, or died of.
            while any_process_has(left, teacher.model):
                with in_lockstep(teacher.model):
                    for shard in left:
                        self._settle(shard, teacher, reading, facts, form, wait=wait)
                left = [shard for shard in shards if not shard.answers]
                # Who waits for a lock cannot take part in the calls of the process that holds it.
                wait = not is_sharded(teacher.model)
                time.sleep(0 if wait else POLL_SECONDS)
        return [answer for shard in shards for answer in shard.answers]

    def read_facts(self) -> dict[str, Any]:
        """By which teacher it was filled; empty where there is none, or what says so is damaged."""
        try:
            return self.read_state()["facts"]
        except (DamagedFile, FileNotFoundError):
            return {}

    def _shard(self, queries: Sequence[Query], given: Sequence[list[int] | None]) -> _Shard:
        digest = queries_sha256(queries, given)
        path = self.path / f"shard-{digest[:32]}.safetensors"
        return _Shard(path=path, digest=digest, queries=queries, given=given)

    def _settle(
        self,
        shard: _Shard,
        teacher: Teacher,
        reading: Reading,
        facts: dict[str, Any],
        form: dict[str, Any],
        *,
        wait: bool,
    ) -> None:
        """Read the shard, or else compute it; leave it open if another process is at it."""
        if shard.path.exists() and not shard.lock.exists():
            try:
                return self._read(shard, reading, facts)
            except (DamagedFile, FileNotFoundError):
                pass  # who holds the lock says so, and sets it aside
        with locked(shard.lock, wait=wait) as is_ours:
            if not is_ours:
                return None
            for temporary in leftovers(self.path, [shard.path.name]):
                temporary.unlink()
            if os.path.lexists(shard.path):
                try:
                    return self._read(shard, reading, facts)
                except DamagedFile as error:
                    self._set_aside(shard.path, error)
            answers = teacher.answer(shard.queries, shard.given, reading=reading, **form)
            write_shard(shard.path, answers, shard.digest, facts)
            # From the file, so that memory holds no more than what is in use.
            shard.answers = self._open(shard, facts)
            return None

    def _read(self, shard: _Shard, reading: Reading, facts: dict[str, Any]) -> None:
        shard.answers = self._open(shard, facts)
        reading.bar.update(len(shard.answers))

    def _open(self, shard: _Shard, facts: dict[str, Any]) -> list[Answer]:
        return read_shard(
            shard.path, shard.digest, lambda there: self._check_facts(shard.path, there, facts)
        )

    def _claim(self, facts: dict[str, Any]) -> None:
        """Raises ValueError if the directory is another teacher's; else makes it this one's."""
        path = self.path / FACTS_FILE
        with self.owned(wait=True):
            self.remove_leftovers()
            if os.path.lexists(path):
                try:
                    return self._check_facts(path, self.read_state()["facts"], facts)
                except DamagedFile as error:
                    self._set_aside(path, error)
            return self.write_state({"facts": facts})

    def _check_facts(self, path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
        self.check_same(there, now, f"is stale: {path.name} was made with")

    def _set_aside(self, path: Path, error: DamagedFile) -> None:
        aside = path.with_name(f"{path.name}.damaged")
        count = 1
        while os.path.lexists(aside):
            count += 1
            aside = path.with_name(f"{path.name}.{count}.damaged")
        os.rename(path, aside)
        sync_directory(self.path)
        progress(f"{error}. It is kept as {aside.name}, and made again.")
