"""Checkpoints that can be trusted: a manifest, written last, holds the digest of every file."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path

from .files import read_json, sha256, sync_directory, sync_file, write_json

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
# Without one of these a run cannot go on as if it had never stopped.
NEEDED_TO_RESUME = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state",
)


def write_manifest(checkpoint: Path) -> None:
    """Make a checkpoint durable: first its files, then the manifest that vouches for them."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST_FILE)
    for path in files:
        sync_file(path)
    sync_directory(checkpoint)
    digests = {path.name: sha256(path) for path in files}
    write_json(checkpoint / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": digests})


def verify_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Raises ValueError naming what is missing or damaged in a checkpoint."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / MANIFEST_FILE).is_file():
        raise ValueError(f"{checkpoint} is incomplete: it has no {MANIFEST_FILE}.")
    manifest = read_json(checkpoint / MANIFEST_FILE)
    digests = manifest.get("files")
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(digests, dict):
        raise ValueError(
            f"{checkpoint / MANIFEST_FILE} must have format_version {FORMAT_VERSION} and files: "
            f"got {manifest.get('format_version')!r} and {', '.join(sorted(manifest))}."
        )
    for needed in NEEDED_TO_RESUME:
        if not any(name.startswith(needed) for name in digests):
            raise ValueError(f"{checkpoint} cannot be resumed: it was saved without {needed}.")
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} is damaged: {name} is missing.")
        if sha256(path) != digest:
            raise ValueError(f"{checkpoint} is damaged: {name} is not the file that was saved.")


def last_good_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of a run; each newer one that is not whole gets a warning."""
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        try:
            verify_checkpoint(checkpoint)
        except ValueError as error:
            warnings.warn(f"Checkpoint skipped: {error}", stacklevel=2)
        else:
            return checkpoint
    return None


def rotate_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``, never the newest nor ``best``."""
    if limit is None or limit < 1:
        return
    kept_anyway = None if best is None else Path(best).resolve()
    checkpoints = _checkpoints(output_dir)
    surplus = len(checkpoints) - limit
    for checkpoint in checkpoints[:-1]:
        if surplus > 0 and checkpoint.resolve() != kept_anyway:
            shutil.rmtree(checkpoint)
            surplus -= 1


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, by step."""
    if not output_dir.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in output_dir.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps)]
