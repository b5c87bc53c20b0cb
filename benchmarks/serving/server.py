"""vLLM's server for as long as it is needed: ``make vllm`` installs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]
START_SECONDS = 900  # two minutes on two free cores
STOP_SECONDS = 30
ANSWER_SECONDS = 900  # to read thousands of tokens takes minutes on a busy machine
# It neither asks the Hub for what is here nor reports what it is used for.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

Ask = Callable[[str, bytes | None], dict[str, Any]]


def vllm_command() -> str | None:
    """SOFTPROMPT_FAST_VLLM, else what ``make vllm`` has left, else None."""
    made = ROOT / ".venv-vllm"
    own = str(made / "bin" / "vllm") if (made / "installed").exists() else None
    return os.environ.get("SOFTPROMPT_FAST_VLLM") or own


@contextmanager
def serving(command: str, model: str | Path, *flags: str, log: Path) -> Iterator[Ask]:
    """``ask(path, body)`` posts a body to the server, or gets where it is None; what it answers.

    Raises RuntimeError, with the end of the log, if the server does not start or refuses a request.
    """
    port = _free_port()
    words = [command, "serve", str(model), f"--port={port}", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | QUIET
    with log.open("wb") as file:
        # Its workers share its process group, and so its end.
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(process, f"http://localhost:{port}/health", log)

        def ask(path: str, body: bytes | None) -> dict[str, Any]:
            header = {"Content-Type": "application/json"}
            request = Request(f"http://localhost:{port}{path}", body, header)
            try:
                with urlopen(request, timeout=ANSWER_SECONDS) as answer:
                    return json.load(answer)
            except HTTPError as error:
                said = error.read().decode()
                raise RuntimeError(f"{error.code} {said}\n{_end_of(log)}") from error

        yield ask
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{_end_of(log)}")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM does not answer after {START_SECONDS} s:\n{_end_of(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # whatever is left of the group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-60:])
