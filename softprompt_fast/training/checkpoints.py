"""Checkpoints that can be trusted: a manifest, written last, holds the digest of every file."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
from transformers.trainer import safe_globals

from ..utils.files import leftovers, read_json, sha256, sync_directory, sync_file, write_json

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
    for temporary in leftovers(checkpoint, ["*"]):  # of a save that was killed
        temporary.unlink()
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST_FILE)
    for path in files:
        sync_file(path)
    sync_directory(checkpoint)
    digests = {path.name: sha256(path) for path in files}
    write_json(checkpoint / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": digests})


def verify_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Raises ValueError naming what is missing, damaged or not to be trusted in a checkpoint."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"checkpoint {checkpoint} does not exist, or is no directory.")
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
        if path.suffix in (".pt", ".pth"):
            _check_is_plain_data(path)


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
    """Delete what cannot be resumed, then the whole checkpoints that were written first.

    ``limit`` whole ones stay, among them the one written last; ``best`` is never deleted. By time
    and not by step: a run that went back to an earlier checkpoint writes lower steps than it finds.
    """
    if limit is None or limit < 1:
        return
    checkpoints = _checkpoints(output_dir)
    whole = [checkpoint for checkpoint in checkpoints if _is_whole(checkpoint)]
    if not whole:
        return
    whole.sort(key=lambda checkpoint: (checkpoint / MANIFEST_FILE).stat().st_mtime_ns)
    kept_anyway = None if best is None else Path(best).resolve()
    deletable = [path for path in checkpoints if path.resolve() != kept_anyway]
    broken = [path for path in deletable if path not in whole]
    oldest = [path for path in whole[:-1] if path in deletable]
    for checkpoint in [*broken, *oldest[: max(0, len(whole) - limit)]]:
        shutil.rmtree(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except ValueError:
        return False
    return True


def _check_is_plain_data(path: Path) -> None:
    """Raises ValueError naming a file that holds code or nonsense; nothing in it is run."""
    try:
        with safe_globals():  # the types that the Trainer itself allows
            torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is refused: it is not the plain data of a checkpoint, and a pickle of "
            "anything else is never opened here."
        ) from error


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
