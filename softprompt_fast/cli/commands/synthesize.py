"""The command ``synthesize``: queries about a context, written and answered by the model."""

from __future__ import annotations

import hashlib
import time

from ...data.records import read_text
from ...synthesis.directory import SynthesisDirectory
from ...synthesis.options import SynthesizeOptions, decisive_options
from ...synthesis.run import run_synthesis
from ...utils.console import say
from ..command import Command, Invocation


def synthesize(options: SynthesizeOptions, invocation: Invocation) -> int:
    """Raises ValueError or OSError, before the model loads wherever that can be known."""
    started = time.perf_counter()
    digest = hashlib.sha256()
    context = read_text(options.context_file, digest)
    decisive = decisive_options(options, digest.hexdigest())
    with SynthesisDirectory(options.output_dir, decisive).owned() as directory:
        if directory.is_finished:
            directory.clear()
            say(f"{directory.path} holds these queries: nothing is left to write.")
        else:
            run_synthesis(options, context, directory)
            say(f"This took {time.perf_counter() - started:.0f} s.")
    return 0


COMMAND = Command(
    description="Write queries about a context, and the model's answers to them.",
    options=(SynthesizeOptions,),
    run=synthesize,
)
