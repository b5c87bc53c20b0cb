"""A toy model in a directory, toy data, and the command that trains on them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from toy import make_model, make_tokenizer

CONTEXT = "Open at 10, closed on Monday. The cat is called Spanner."
QUESTIONS = ["When?", "May I feed the cat after four?", "Hi", "Are you open?", "Who is Spanner?"]
HELD_OUT = ["Which day is free?", "Cat?", "Are you open at eleven?"]
NEW_TOKENS = 7


def save_toy_model(directory: Path) -> Path:
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_lines(path: Path, questions: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return path


def train_flags(folder: Path, output: str = "run", **changes: object) -> list[str]:
    """Makes what is missing in ``folder``; the arguments of ``softprompt-fast train``."""
    if not (folder / "model").exists():
        save_toy_model(folder / "model")
        (folder / "context.txt").write_text(CONTEXT)
        write_lines(folder / "train.jsonl", QUESTIONS)
        write_lines(folder / "heldout.jsonl", HELD_OUT)
    flags = {
        "model": folder / "model",
        "context_file": folder / "context.txt",
        "train_file": folder / "train.jsonl",
        "eval_file": folder / "heldout.jsonl",
        "output_dir": folder / output,
        "num_virtual_tokens": 4,
        "max_new_tokens": NEW_TOKENS,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 3,
        "disable_tqdm": True,
        **changes,
    }
    return ["train", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    """The command in a process of its own, so that it can be sent signals."""
    return spawn(*launcher, "-m", "softprompt_fast", *arguments)


def spawn(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the file is there; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        time.sleep(0.005)
