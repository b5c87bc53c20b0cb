"""What each of several processes does in test_processes.py; one start serves several jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from toy import make_model, make_tokenizer
from toy_trainer import CONTEXT, QUESTIONS, make_examples, make_trainer

from softprompt_fast.base_model.fsdp import shard_base
from softprompt_fast.base_model.output_head import decoder
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.teacher.answers import SketchOptions, pack
from softprompt_fast.teacher.distributed import answer_together
from softprompt_fast.teacher.teacher import Teacher


def train_all(commands: str) -> None:
    """The runs one after another; who wrote how many answers goes to wrote-PROCESS.json."""
    folder, wrote = Path(commands).parent, dict[str, int]()
    plain = Teacher.answer

    def counting(self, queries, answers=None, **options):
        wrote[name] += list(answers).count(None)
        return plain(self, queries, answers, **options)

    Teacher.answer = counting
    for name, arguments in json.loads(Path(commands).read_text()).items():
        wrote[name] = 0
        assert main(arguments) == 0, name
    (folder / f"wrote-{PartialState().process_index}.json").write_text(json.dumps(wrote))


def answer_alike(result: str) -> None:
    """Alone and together, by a whole base and by part of one: 5 shards, of which one is short."""
    process = PartialState(cpu=True)
    whole, part = make_model(), shard_base(make_model(), torch.device("cpu"))
    queries = [
        tokenize_query(make_tokenizer(), [{"role": "user", "content": f"{q}{i}"}], CONTEXT)
        for i, q in enumerate((QUESTIONS * 2)[:18])
    ]
    given = [[5, 6] if i % 3 == 0 else None for i in range(len(queries))]
    for form in (dict(record_hidden=True), dict(sketch=SketchOptions(top_k=3)), {}):
        alone = None
        for model in (whole, part):
            teacher = Teacher(
                model, make_tokenizer(), max_new_tokens=4, batch_size=1, show_progress=False
            )
            alone = alone or pack(teacher.answer(queries, given, **form))
            together = pack(answer_together(teacher, queries, given, **form))
            assert together.keys() == alone.keys()
            for name, values in alone.items():
                assert torch.equal(values, together[name]), (form, name)
    for layer, own in zip(decoder(whole).layers, decoder(part).layers, strict=True):
        held = sum(value.to_local().numel() for value in own.parameters())
        assert held * process.num_processes == sum(map(torch.Tensor.numel, layer.parameters()))
    Path(result).write_text("True")


def fail_in_one(output_dir: str) -> None:
    """The other one waits for its gradient."""
    model = make_model()
    examples = make_examples(model)
    examples[1].answer.hidden[0, 0] = torch.nan
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=2)
    make_trainer(output_dir, model=model, examples=examples, **options).train()


if __name__ == "__main__":
    for job, argument in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        globals()[job](argument)
    if dist.is_initialized():
        dist.destroy_process_group()
