"""Health end to end: quickstart runs with one mistake are diagnosed, and a healthy one has no verdict."""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

import fastpref
from fastpref.errors import UserError
from fastpref.health import diagnose
from fastpref.report import read_run
from tests.support.paths import QUICKSTART
from tests.support.runs import LORA

SHORT = ["train.steps=12", "train.batch=8", "eval.data.0.rows=24", "eval.samples=0", "output.dir=out"]


def relabelled(folder: Path, name: str, count: int, share: float) -> str:
    """Write the first rows of a quickstart file, with this share of them swapped, and return the path."""
    lines = (QUICKSTART.parent / "quickstart" / f"{name}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    for row in Random(0).sample(rows, round(share * count)):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    out = folder / f"relabelled_{name}.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(out)


def test_a_healthy_run_is_left_alone(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    """A healthy run has no verdict, writes run.json and a report, and reading the run back gives no verdict either."""
    result = fastpref.train(QUICKSTART, [*SHORT, "train.learning_rate=2e-3", "eval.samples=1"])
    assert result.verdicts == ()
    printed = capsys.readouterr().out
    assert "rules found nothing wrong" in printed
    assert f"report: {Path('out/report.html')}" in printed
    page = Path("out/report.html").read_text()
    assert "finished" in page
    assert all(f'id="{part}"' in page for part in ("heldout", "answers", "data", "speed", "environment", "config"))
    facts = json.loads(Path("out/run.json").read_text())
    assert len(facts["heldout"]["chosen"]) == len(facts["heldout"]["rejected"]) == 24
    assert facts["samples"][0]["asked"] == "What is four plus five?"
    assert facts["samples"][0]["after"]
    assert facts["rows"]["train"]["kept"] == 246
    assert facts["seconds"] > 0
    margins = [a - b for a, b in zip(facts["heldout"]["chosen"], facts["heldout"]["rejected"])]
    assert sum(margins) / 24 == pytest.approx(result.eval_metrics["eval/rewards/margins"], rel=1e-4)
    run = read_run(Path("out"))
    assert diagnose(run.history, run.known) == []


def test_a_learning_rate_a_hundred_times_too_high(elsewhere: Path):
    result = fastpref.train(QUICKSTART, [*SHORT, "train.learning_rate=8e-2"])
    assert [v.rule for v in result.verdicts] == ["learning_rate_high"]


def test_chosen_and_rejected_swapped(elsewhere: Path):
    """Swapped training rows are diagnosed by right held-out rows."""
    swapped = relabelled(elsewhere, "train", 246, 1.0)
    result = fastpref.train(QUICKSTART, [*SHORT, "train.learning_rate=2e-3", f"data.0.path={swapped}"])
    assert result.verdicts[0].rule == "swapped"


def test_labels_shuffled(elsewhere: Path):
    """Shuffled labels in training and held-out rows are diagnosed: a few rows are memorised, without generalising."""
    training, heldout = relabelled(elsewhere, "train", 24, 0.5), relabelled(elsewhere, "heldout", 40, 0.5)
    data = [f"data.0.path={training}", f"eval.data.0.path={heldout}", "eval.data.0.rows=40"]
    result = fastpref.train(QUICKSTART, [*SHORT, *data, "train.steps=40", "train.learning_rate=4e-3"])
    assert result.verdicts[0].rule == "labels_shuffled"


def test_verdicts_are_printed_while_it_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]):
    """The warning about cut rows is printed once before the first step, and again at the end."""
    fastpref.train(QUICKSTART, [*SHORT, "train.steps=2", "tokens.max_length=36"])
    printed = capsys.readouterr().out
    warning = "% of the training rows were cut"
    assert printed.count(warning) == 2
    assert printed.index(warning) < printed.index("step 2/2") < printed.rindex(warning)


def test_a_resumed_run_is_seen_whole(config: Path, capsys: pytest.CaptureFixture[str]):
    """After a resume, health and report cover all rows, times add up, and a verdict is not repeated."""
    first = fastpref.train(config, [LORA, "tokens.max_length=36"])
    assert "truncation" in [v.rule for v in first.verdicts]
    before = json.loads(Path("out/run.json").read_text())
    shutil.rmtree("out/checkpoints/step-10")
    capsys.readouterr()
    again = fastpref.train(config, [LORA, "tokens.max_length=36"], resume=True)
    printed = capsys.readouterr().out
    assert printed.count("of the training rows were cut") == 1
    assert [v.rule for v in again.verdicts] == [v.rule for v in first.verdicts]
    after = json.loads(Path("out/run.json").read_text())
    assert after["seconds"] > before["seconds"]
    assert after["heldout"] == before["heldout"]
    assert len(read_run(Path("out")).history["loss"]) == 10


def test_a_stopped_run_has_a_report(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """After Ctrl-C, the report covers the steps so far, with the answers before training."""
    from fastpref.training import loop

    original = loop.TrainingRun._step

    def stopping(self: Any, step: int, examples: Any) -> None:
        original(self, step, examples)
        if step == 3:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(loop.TrainingRun, "_step", stopping)
    result = fastpref.train(QUICKSTART, [*SHORT, "train.steps=9", "eval.samples=1"])
    assert result.interrupted
    page = Path("out/report.html").read_text()
    assert "3 of 9 steps; stopped" in page
    assert "not yet: the run was stopped" in page


def test_a_fault_leaves_a_report(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A run that ends in an error has a report, and a failing report is said and does not hide the error."""
    from fastpref.step import objective as step
    from fastpref.training import record
    from fastpref.training.faults import NotFinite

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise NotFinite("step 1: loss nan")

    monkeypatch.setattr(step.Objective, "step", fails)
    with pytest.raises(UserError, match="loss nan"):
        fastpref.train(QUICKSTART, SHORT)
    assert "ended by a fault" in Path("out/report.html").read_text()
    monkeypatch.setattr(record, "write_report", lambda folder: 1 / 0)
    with pytest.raises(UserError, match="loss nan"):
        fastpref.train(QUICKSTART, SHORT, force=True)
    assert not Path("out/report.html").exists()
    assert capsys.readouterr().out.count("no report before the end: ZeroDivisionError") == 1
