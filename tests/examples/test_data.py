"""The files of the examples are what their README says, and what the Makefile trains on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

import softprompt_fast as spf
from softprompt_fast.cli.commands import train
from softprompt_fast.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))

each_example = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def options(config, monkeypatch):
    """Of the model and the data, as the command line reads the config file."""
    seen = []
    idle = dataclasses.replace(train.COMMAND, run=lambda *given: seen.append(given[0]) or 0)
    monkeypatch.setattr(train, "COMMAND", idle)
    assert main(["train", "--config", str(config)]) == 0
    return seen[0]


@each_example
def test_no_held_out_query_is_trained_on(options):
    assert Path(options.context_file).is_file()
    trained, held_out = (
        {record.messages[-1]["content"] for record in spf.read_jsonl(file)}
        for file in (options.train_file, options.eval_file)
    )
    assert len(held_out) == 32
    assert trained.isdisjoint(held_out)


def test_the_gpl_is_copied_verbatim():
    """That of gnu.org and of each Debian machine, /usr/share/common-licenses/GPL-3."""
    digest = hashlib.sha256((EXAMPLES / "gpl-3.txt").read_bytes()).hexdigest()
    assert digest == "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"


def test_the_gpl_has_200_training_queries():
    assert len(spf.read_jsonl(EXAMPLES / "gpl_train.jsonl")) == 200


def test_the_gpl_is_long_and_fits_the_model(real_model):
    model, tokenizer = spf.load_model(str(real_model), device="cpu")
    context = (EXAMPLES / "gpl-3.txt").read_text()
    records = [spf.read_jsonl(EXAMPLES / f"gpl_{name}.jsonl") for name in ("train", "heldout")]
    queries = [
        spf.tokenize_query(tokenizer, record.messages, context)
        for part in records
        for record in part
    ]
    most = max(len(q.before + q.context + q.after) for q in queries) + 32
    assert len(queries[0].context) >= 6000
    assert most <= model.config.max_position_embeddings
