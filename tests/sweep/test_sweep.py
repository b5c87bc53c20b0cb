"""A sweep is what ``train`` and ``eval`` make one by one, with a single teacher for all."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from clock import TEMPLATE, set_day
from rich.console import Console
from toy_run import train_flags, write_lines

from softprompt_fast.cli.commands import eval as eval_command
from softprompt_fast.cli.commands import sweep as sweep_command
from softprompt_fast.cli.main import main
from softprompt_fast.sweep.plot import curve_picture
from softprompt_fast.sweep.table import curve_table
from softprompt_fast.teacher.teacher import Teacher
from softprompt_fast.training import setup as training_setup
from softprompt_fast.training.callbacks import StopOnSignal

RUNS = ["nll_P2", "kl_P2", "nll_P4", "kl_P4"]
STEPS = {"max_steps": 2, "save_steps": 1}
WEIGHTS = "adapter_model.safetensors"


def sweep_flags(folder: Path, output: str = "sweep", **changes: object) -> list[str]:
    flags = train_flags(folder, output, **{"num_virtual_tokens": None, **STEPS, **changes})
    return ["sweep", *flags[1:], "--num_virtual_tokens", "4", "2", "--objective", "nll", "kl"]


def weights(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name / WEIGHTS).read_bytes() for name in RUNS}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def without_seconds(curve: dict) -> dict:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in curve["rows"]]
    return {**curve, "rows": rows}


@pytest.fixture(scope="module")
def asked():
    """How often the teacher was asked to write answers, by the file of the queries."""
    counts: Counter[str] = Counter()
    answer = Teacher.answer

    def counted(self, queries, answers=None, **options):
        if answers is None or None in answers:
            counts[Path(queries[0].source.rpartition(":")[0]).name] += 1
        return answer(self, queries, answers, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "answer", counted)
        yield counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, asked):
    """With a finished sweep in it, not to be changed."""
    folder = tmp_path_factory.mktemp("toy")
    assert main(sweep_flags(folder)) == 0
    assert dict(asked) == {"train.jsonl": 1, "heldout.jsonl": 1}
    return folder


def test_a_run_is_what_train_alone_makes(folder, tmp_path, capsys):
    """Where the teacher keeps less: the sweep's has sketches for the other objective."""
    flags = train_flags(folder, "alone", num_virtual_tokens=4, objective="nll", **STEPS)
    directory = folder / "sweep/nll_P4"
    assert main([*flags, f"--output_dir={tmp_path}"]) == 0
    assert (tmp_path / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()
    assert main([*flags, f"--output_dir={directory}"]) == 0
    assert "nothing is left to train" in capsys.readouterr().out


def test_an_evaluation_is_that_of_eval(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_command, "pictures", lambda report: {})
    directory = shutil.copytree(folder / "sweep/kl_P2", tmp_path / "run")
    assert main(["eval", f"--prompt_dir={directory}", "--num_samples=0"]) == 0
    reports = [read(path / "evaluation.json") for path in (directory, folder / "sweep/kl_P2")]
    for report in reports:
        report.pop("seconds")
    assert reports[0] == reports[1]


def test_the_curve_is_that_of_the_evaluations(folder):
    curve = read(folder / "sweep/sweep.json")
    assert [row["run"] for row in curve["rows"]] == RUNS
    for row in curve["rows"]:
        report = read(folder / "sweep" / row["run"] / "evaluation.json")
        run = read(folder / "sweep" / row["run"] / "run.json")
        assert (row["steps"], row["seconds"]) == (2, run["seconds"])
        assert (row["objective"], row["num_virtual_tokens"]) == (
            report["objective"],
            report["num_virtual_tokens"],
        )
        points = {"soft prompt": row, "no context": curve["baselines"]["no context"]}
        for name in ("cut context", "pruned context"):
            points[name] = next(
                point
                for point in curve["baselines"][name]
                if point["num_virtual_tokens"] == row["num_virtual_tokens"]
            )
        for name, point in points.items():
            measured = report["conditions"][name]
            for figure in ("kl", "kl_standard_error", "kl_recovered", "top1_agreement"):
                assert point[figure] == measured[figure]
    assert (folder / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_stopped_anywhere_the_same_command_goes_on(folder, asked, tmp_path, capsys, monkeypatch):
    flags = [*sweep_flags(folder), f"--output_dir={tmp_path}"]
    asked.clear()
    on_step_end = StopOnSignal.on_step_end

    def killed(self, args, state, control, **kwargs):
        if args.output_dir.endswith("kl_P2") and state.global_step == 2:
            raise RuntimeError("killed")
        return on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", killed)
    with pytest.raises(RuntimeError, match="killed"):
        main(flags)
    assert [row["run"] for row in read(tmp_path / "sweep.json")["rows"]] == RUNS[:1]
    first = (tmp_path / "nll_P2" / WEIGHTS).stat().st_mtime_ns

    def stopped(self, args, state, control, **kwargs):
        if args.output_dir.endswith("nll_P4"):
            self.received = signal.SIGTERM
        return on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", stopped)
    assert main(flags) == 143
    out, err = capsys.readouterr()
    assert f"Going on from {tmp_path / 'kl_P2/checkpoint-1'}" in err
    assert "The sweep stops, with 2 of 4 runs measured." in out
    assert "The same command goes on with the others." in out

    monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)
    assert main(flags) == 0
    assert weights(tmp_path) == weights(folder / "sweep")
    assert (tmp_path / "nll_P2" / WEIGHTS).stat().st_mtime_ns == first
    curves = [read(path / "sweep.json") for path in (tmp_path, folder / "sweep")]
    assert without_seconds(curves[0]) == without_seconds(curves[1])
    assert asked["train.jsonl"] == 1


def test_only_what_is_missing_is_made_again(folder, asked, tmp_path):
    """The teacher's cache serves all objectives, also if those that need most of it are done."""
    directory = shutil.copytree(folder / "sweep", tmp_path / "sweep")
    shutil.rmtree(directory / "nll_P4")
    (directory / "nll_P2/evaluation.json").write_text("{damaged")
    trained = (directory / "nll_P2" / WEIGHTS).stat().st_mtime_ns
    asked.clear()
    assert main([*sweep_flags(folder), f"--output_dir={directory}"]) == 0
    assert weights(directory) == weights(folder / "sweep")
    curves = [read(path / "sweep.json") for path in (directory, folder / "sweep")]
    assert without_seconds(curves[0]) == without_seconds(curves[1])
    assert (directory / "nll_P2" / WEIGHTS).stat().st_mtime_ns == trained
    assert asked["train.jsonl"] == 0


def test_a_sweep_goes_on_with_the_template_and_the_day_it_began_with(
    folder, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(TEMPLATE)
    flags = [*sweep_flags(folder), f"--model={model}", f"--output_dir={tmp_path / 'sweep'}"]
    flags += ["--objective", "nll"]
    set_day(monkeypatch, "2026-11-27")
    assert main(flags) == 0
    before = {run: (tmp_path / "sweep" / run / WEIGHTS).read_bytes() for run in RUNS[::2]}
    set_day(monkeypatch, "2026-11-28")
    shutil.rmtree(tmp_path / "sweep/nll_P4")
    shutil.rmtree(tmp_path / "sweep/teacher_cache")
    assert main(flags) == 0
    assert before == {run: (tmp_path / "sweep" / run / WEIGHTS).read_bytes() for run in RUNS[::2]}
    (tmp_path / "sweep/nll_P2/evaluation.json").unlink()
    template.write_text(TEMPLATE.replace("assistant", "helper"))
    capsys.readouterr()
    assert main(flags) == 1
    assert "error: The soft prompt was trained with another chat temp" in capsys.readouterr().err


def test_a_finished_sweep_loads_no_model_unless_it_has_to_measure(folder, tmp_path, monkeypatch):
    def no_model(*args, **options):
        raise ValueError("the model was loaded")

    monkeypatch.setattr(training_setup, "load_model", no_model)
    directory = shutil.copytree(folder / "sweep", tmp_path / "sweep")
    flags = [*sweep_flags(folder), f"--output_dir={directory}"]
    assert main(flags) == 0
    assert read(directory / "sweep.json") == read(folder / "sweep/sweep.json")
    others = write_lines(tmp_path / "others.jsonl", ["Another?"])
    assert main([*flags, f"--eval_file={others}"]) == 1
    assert read(directory / "sweep.json") == read(folder / "sweep/sweep.json")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--eval_file=", 2, "--eval_file is empty"),
        ("--objective kl kll", 2, "argument --objective: invalid choice: 'kll'"),
        ("--objective", 2, "argument --objective: expected at least one argument"),
        ("--num_virtual_tokens 4 0", 2, "num_virtual_tokens must be >= 1: got 0"),
        ("--num_virtual_tokens 4 8 4", 2, "num_virtual_tokens holds 4 2 times"),
        ("--objective kl nll kl", 2, "objective holds kl 2 times"),
        ("--resume_from_checkpoint=x", 2, "resume_from_checkpoint is of one run"),
        ("--learning_rate=0.5", 1, "nll_P2 holds a run with other options: learning_rate"),
        ("--output_dir={folder}", 1, "is occupied: it holds 'context.txt' and no sweep.json"),
        ("--output_dir={folder}/sweep/kl_P2", 1, "is occupied: it holds"),
        ("--num_virtual_tokens 4 600", 1, "600 virtual tokens, the query's"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_changes(folder, capsys, flags, code, message):
    before = read(folder / "sweep/sweep.json")
    given = flags.format(folder=folder).split()
    assert main([*sweep_flags(folder), *given]) == code
    assert message in capsys.readouterr().err
    assert read(folder / "sweep/sweep.json") == before


def test_a_sweep_needs_held_out_queries(folder, capsys):
    assert main(sweep_flags(folder, eval_file=None)) == 2
    assert "pass --eval_file" in capsys.readouterr().err


def test_a_config_file_may_hold_lists_and_flags_win(folder, tmp_path, monkeypatch):
    found = []
    command = sweep_command.COMMAND
    monkeypatch.setattr(
        sweep_command, "COMMAND", type(command)(**{**vars(command), "run": found.extend})
    )
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\ntrain_file: t\neval_file: e\noutput_dir: o\n"
        "num_virtual_tokens: [8, 4]\nobjective: kl\n"
    )
    main(["sweep", f"--config={config}", "--objective", "mix", "nll"])
    runs = [(config.num_virtual_tokens, args.objective) for _, config, args, _ in found]
    assert runs == [(4, "mix"), (4, "nll"), (8, "mix"), (8, "nll")]
    assert [args.output_dir for *_, args, _ in found][:2] == [
        f"{tmp_path}/o/mix_P4",
        f"{tmp_path}/o/nll_P4",
    ]


def test_a_curve_of_one_point_and_one_query_is_drawn(folder):
    curve = read(folder / "sweep/sweep.json")
    curve["rows"] = [{**curve["rows"][0], "kl_standard_error": None, "kl_recovered": None}]
    for name in ("cut context", "pruned context"):
        curve["baselines"][name] = curve["baselines"][name][:1]
    assert curve_picture(curve).startswith(b"\x89PNG")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(curve_table(curve))
    kl = f"{curve['rows'][0]['kl']:.3f}"
    assert kl in console.export_text()
