"""Ctrl-C ends ``softprompt-fast`` with exit code 130 and without a traceback, at any moment.

Any moment after ``main`` has begun: while the interpreter starts and imports it, Ctrl-C is
Python's own.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest
from toy_run import save_toy_model, start

from softprompt_fast.base_model.loading import load_model
from softprompt_fast.cli.main import main
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig

COMMANDS = {
    "--help": ["--help"],
    "train": ["train", "--help"],
    "generate": ["generate", "--prompt_dir=prompt", "--max_new_tokens=100", "Hi"],
}
FEW, MANY = (0.3, pytest.param(0.9, marks=pytest.mark.slow)), 20
each_command = pytest.mark.parametrize(
    "command", ["--help", pytest.param("train", marks=pytest.mark.slow), "generate"]
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory: of a model, and of a prompt that nothing has trained."""
    folder = tmp_path_factory.mktemp("interrupt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base, tokenizer = load_model(str(save_toy_model(folder / "model")))
        config = SoftPromptConfig(num_virtual_tokens=4, prompt_tuning_init="random")
        SoftPrompt.from_model(base, tokenizer, config).save_pretrained(folder / "prompt")
        yield folder


def begin(command: str) -> tuple[subprocess.Popen[str], bool]:
    """The process, as soon as it has taken over the signals; False if it ended without doing so.

    Python catches SIGINT from its start on, and SIGTERM not before a program asks for it.
    """
    process = start(COMMANDS[command])
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        if caught is not None and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return process, True
        time.sleep(0.0005)
    return process, False


@cache
def seconds_of(command: str) -> float:
    process, took_over = begin(command)
    began = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert took_over and process.returncode == 0, err
    return time.monotonic() - began


def interrupt(command: str, fraction: float) -> None:
    """After that fraction of the time that the command takes."""
    delay = fraction * seconds_of(command)
    process, _ = begin(command)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err, f"{delay:.2f} s after the start:\n{err}"
    # Once Python has begun to end, the signal ends it itself; a shell calls that 130 too.
    assert process.returncode in (0, 130, -signal.SIGINT), err


@each_command
@pytest.mark.parametrize("fraction", FEW)
def test_ctrl_c_shows_no_traceback(command, fraction):
    interrupt(command, fraction)


@pytest.mark.slow
@each_command
def test_ctrl_c_shows_no_traceback_at_many_moments(command):
    for step in range(MANY):
        interrupt(command, 1.05 * step / MANY)


def test_a_program_that_calls_main_keeps_its_signals(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--help"]) == 0
    assert main(["generate", "--prompt_dir=prompt", "--max_new_tokens=1", "Hi"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
