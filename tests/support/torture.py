"""kill -9, flipped bits and cut files: nothing durable may be lost, and no damage go unseen.

``make torture`` does this at length, ``make test`` a little of it (teacher/test_cache_failures.py).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from damage import cut, flip_bits
from killing import Job, kill
from toy_cache import CachedToy
from toy_run import train_flags

from softprompt_fast.cli.main import main as softprompt_fast

say = partial(print, flush=True)


def build_cache(toy: CachedToy) -> Job:
    def job(directory: Path) -> None:
        toy.answers(directory / "cache")

    return job


def train(folder: Path) -> Job:
    """A training run that fills a cache, leaves many checkpoints and ends within an epoch."""
    options = dict(
        max_steps=10, save_steps=2, save_total_limit=2, teacher_batch_size=1, max_new_tokens=3
    )

    def job(directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        paths = dict(output_dir=directory / "run", teacher_cache=directory / "cache")
        code = softprompt_fast(train_flags(folder, **options, **paths))
        assert code == 0, f"exit code {code}"

    train_flags(folder)
    return job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, toy, started = random.Random(options.seed), CachedToy(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = options.kills // 2
        say("Killing processes that fill a cache")
        caching = kill(build_cache(toy), folder / "caching", options.kills - training, rng, say)
        say("Killing training runs")
        trained = kill(train(folder), folder / "training", training, rng, say)
        say("Flipping bits of a cache, one at a time")
        unseen = flip_bits(toy, folder / "cache", options.flips, rng, say)
        say("Cutting each file of a cache to every length")
        lengths, uncut = cut(toy, folder / "cache")
    for problem in (problems := [*caching.problems, *trained.problems, *unseen, *uncut]):
        say(problem)
    say(
        f"torture, seed {options.seed}: while caching {caching}; while training {trained}; "
        f"{options.flips} flipped bits, {len(unseen)} unseen; {lengths} cuts, {len(uncut)} unseen; "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
