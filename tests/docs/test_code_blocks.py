"""Every code block of README.md, CONTRIBUTING.md and docs/ does what a reader expects of it.

Python runs: the blocks of a page one after another, in one namespace. Shell commands are read by
the real command line, and name files, targets and packages that exist. JSON and YAML are read as
data and options. Blocks without a language show output, trees of files and drawings.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement

import softprompt_fast as spf
from softprompt_fast.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOOR = "## I want to compress a context"
MODEL = "models/smollm2-135m-instruct"

# What is not run, and why.
NOT_RUN = {
    "vllm": "starts vLLM's server, which has a test of its own",
    "curl": "asks vLLM's server",
}
NEED_NO_MODEL = ("README.md", "docs/losses.md")
# The door of the README as it stands takes minutes; flags that come later win.
SHORTER = {
    "synthesize": ["--num_queries=4", "--max_new_tokens=8"],
    "train": ["--max_steps=1", "--max_new_tokens=8", "--disable_tqdm=True"],
    "eval": ["--num_samples=0"],
    "generate": ["--max_new_tokens=4"],
}
INPUTS = ("--config", "--context_file", "--train_file", "--eval_file", "--query_file")
DIRECTORIES = ("--prompt_dir", "--model")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without comments; a pipe has several."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [part for line in words if line for part in _split(line, "|")]


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda b: f"{b.page}:{b.line}")


def test_every_block_has_a_language_that_is_tested():
    tested = {"python", "sh", "json", "yaml", "bibtex", ""}
    unknown = {b.language for b in BLOCKS if not b.language.startswith("{")} - tested
    assert not unknown  # {directives} are built by make site
    assert sum(block.language in ("python", "sh") for block in BLOCKS) > 20


# ---- Python


def python_pages(needs_model: bool) -> pytest.MarkDecorator:
    pages = defaultdict(list)
    for block in BLOCKS:
        if block.language == "python" and (block.page not in NEED_NO_MODEL) == needs_model:
            pages[block.page].append(block)
    return pytest.mark.parametrize("blocks", pages.values(), ids=list(pages))


def run_python(blocks: list[Block]) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        source = "\n" * (block.line - 1) + block.text  # a traceback names the line of the page
        exec(compile(source, ROOT / block.page, "exec"), namespace)


@python_pages(needs_model=False)
def test_python_runs(blocks):
    run_python(blocks)


@pytest.fixture(scope="module")
def workshop(real_model, tmp_path_factory):
    """What ``make demo`` and the commands of serving.md leave, of a few queries and one step."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "models").mkdir()
    (folder / MODEL).symlink_to(real_model, target_is_directory=True)
    shutil.copytree(ROOT / "examples", folder / "examples")
    for file in (folder / "examples").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config=examples/handbook.yaml", *SHORTER["train"]]) == 0
        export = ["export", "--prompt_dir=runs/handbook"]
        assert main([*export, "--to=peft", "--output_dir=exports/peft"]) == 0
        assert main([*export, "--to=safetensors", "--output_dir=exports/plain"]) == 0
    return folder


@pytest.mark.xdist_group("workshop")  # one worker makes it
@python_pages(needs_model=True)
def test_python_runs_with_the_real_model(blocks, workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    run_python(blocks)


# ---- Shell


OUTPUTS = {
    words[words.index("--output_dir") + 1]
    for block in BLOCKS
    if block.language == "sh"
    for words in block.commands()
    if "--output_dir" in words
}


@of("sh")
def test_shell_commands_are_right(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in block.commands():
        check_command(words, monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    if program in ("torchrun", "softprompt-fast"):
        if program == "torchrun":
            arguments = arguments[arguments.index("softprompt_fast") + 1 :]
        check_files(arguments)
        assert parsed(arguments, monkeypatch) == 0
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert targets
        assert set(targets) <= set(rules)
    elif program == "pip":
        assert arguments[0] == "install"
        for word in arguments[1:]:
            assert word in (".", "--no-build-isolation") or Requirement(word)
    elif program in ("python", ".venv/bin/pytest"):
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program == "printf" or program in NOT_RUN, f"{program}: neither checked nor excused"


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that is read and checked, and does nothing."""
    module = import_module(f"softprompt_fast.cli.commands.{arguments[0]}")
    idle = dataclasses.replace(module.COMMAND, run=lambda *_: 0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "COMMAND", idle)
        return main(arguments)


def check_files(arguments: list[str]) -> None:
    """Input files exist, or are what another command of the documentation writes."""
    demo = yaml.safe_load((ROOT / "examples/handbook.yaml").read_text())
    made = OUTPUTS | {demo["output_dir"].removeprefix("../"), demo["model"].removeprefix("../")}
    for name, value in pairwise(arguments):
        if name in INPUTS:
            assert (ROOT / value).is_file() or str(Path(value).parent) in made, value
        if name in (*DIRECTORIES, "doctor"):
            # Of a sweep, each run has a directory.
            assert made.intersection((value, str(Path(value).parent))), value


def test_the_model_of_the_documentation_is_that_of_the_demo():
    assert f"MODEL  := {MODEL}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.xdist_group("workshop")
def test_the_door_of_the_readme_opens(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    start = (ROOT / "README.md").read_text().partition(DOOR)[0].count("\n")
    block = next(b for b in blocks_of(ROOT / "README.md") if b.language == "sh" and b.line > start)
    commands = block.commands()
    assert [words[1] for words in commands] == ["synthesize", "train", "eval", "generate"]
    for _, name, *arguments in commands:
        argument = arguments.pop() if name == "generate" else None
        more = [argument] if argument else []
        assert main([name, *arguments, *SHORTER[name], *more]) == 0


# ---- Data


@of("json")
def test_json_is_data(block, tmp_path):
    file = tmp_path / "queries.jsonl"
    file.write_text(block.text, encoding="utf-8")
    assert len(spf.read_jsonl(file)) == len(block.text.splitlines())


@of("yaml")
def test_yaml_is_a_config_file(block, tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(block.text, encoding="utf-8")
    assert parsed(["train", "--config", str(file)], monkeypatch) == 0


@of("bibtex")
def test_bibtex_names_this_version(block):
    assert re.fullmatch(r"@software\{\w+,\n(  \w+ = \{.*\},?\n)+\}\n", block.text)
    assert f"version = {{{spf.__version__}}}" in block.text
