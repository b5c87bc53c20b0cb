"""Prints the section of CHANGELOG.md that belongs to a tag.

    python .github/release_notes.py v0.1.0

Exit code 1 if the tag is not the version of the package, or if the section is missing or undated.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def release_notes(tag: str, version: str, changelog: str) -> str:
    """The text below ``## VERSION, YYYY-MM-DD``. Raises ValueError if there is no such release."""
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, the version of the package: got {tag}")
    heading = rf"^## {re.escape(version)}, \d{{4}}-\d\d-\d\d\n"
    section = re.search(rf"{heading}(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if not section:
        raise ValueError(f"CHANGELOG.md must have a section '## {version}, YYYY-MM-DD'")
    return section[1].strip() + "\n"


def main(tag: str) -> None:
    source = (ROOT / "softprompt_fast/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        print(release_notes(tag, version, changelog), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
