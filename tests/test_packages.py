"""The shape of the package: its layers, its faces, and what loading it costs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softprompt_fast

ROOT = Path(__file__).parents[1]
PACKAGE = Path(softprompt_fast.__file__).parent
FACE_LINES = 20
TOP_MODULES = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("utils.files", "data.records"),
        ("training.trainer", "evaluation.metrics"),
        ("losses.checks", "utils.text"),
        ("cli.commands.eval", "cli.commands.chat"),
    ],
    ids=["upward", "sideways", "a loss needs a tool", "a command needs another"],
)
def test_an_import_against_the_layers_is_seen(tmp_path, importer, imported):
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "softprompt_fast", tmp_path / "softprompt_fast")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert layers_of(tmp_path).returncode == 0
    module = tmp_path / "softprompt_fast" / f"{importer.replace('.', '/')}.py"
    with module.open("a") as file:
        file.write(f"\nimport softprompt_fast.{imported}\n")
    found = layers_of(tmp_path)
    assert found.returncode == 1
    assert f"softprompt_fast.{importer} -> softprompt_fast.{imported} (l." in found.stdout


def layers_of(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package in this folder."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import softprompt_fast"], ["-m", "softprompt_fast", "--help"]],
    ids=["import", "help"],
)
def test_torch_is_not_loaded_before_it_is_needed(tmp_path, arguments):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "softprompt_fast" in loaded
    assert not {"torch", "transformers"} & set(loaded)
    assert "--help" not in arguments or "synthesize" in done.stdout


def test_a_face_holds_names_only():
    faces = [PACKAGE / "__init__.py", *PACKAGE.glob("*/__init__.py")]
    assert len(faces) > 10
    for face in faces:
        assert len(face.read_text().splitlines()) <= FACE_LINES, face


def test_modules_live_in_packages():
    names = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert {"__init__.py", "__main__.py"} <= set(names)
    assert len(names) <= TOP_MODULES, names
