"""train.callbacks: functions of the user's own are told of steps, evaluations and the end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastpref
from fastpref.errors import UserError
from tests.support.runs import LORA, contents, rows

CODE = """
import json, random
import torch
import fastpref

def keep(event):
    assert isinstance(event, fastpref.RunEvent)
    trained = sum(p.numel() for p in event.model.parameters() if p.requires_grad)
    final, page = (event.folder / "final").is_dir(), event.folder / "report.html"
    row = {name: getattr(event, name) for name in ("kind", "step", "steps", "metrics")} | {"page": page.read_text()}
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(row | {"trained": trained, "final": final, "loss": event.config.loss.type}) + "\\n")

def draw(event):
    random.random()
    torch.rand(7)

def stop(event):
    return event.kind == "step" and event.step == 3

def stop_at_evaluation(event):
    return event.kind == "evaluation" and event.step == 4

def fails(event):
    if event.step == 3:
        raise ZeroDivisionError("no metrics today")

def fails_at_evaluation(event):
    if event.kind == "evaluation" and event.step == 4:
        return {}["rate"]

def fails_at_the_end(event):
    if event.kind == "end":
        raise ZeroDivisionError("no upload today")

def answers(event):
    return "stop"

wrong = 3
"""


@pytest.fixture
def mine(config: Path) -> Path:
    """Write a module beside the config, in a folder that is not the working directory, and return the config."""
    folder = config.parent / "elsewhere"
    folder.mkdir()
    (folder / "mine.py").write_text(CODE)
    shutil.move(config, folder / "cfg.toml")
    return folder / "cfg.toml"


def told() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]


def test_what_a_function_is_told(mine: Path):
    """A function gets every step, evaluation and the end once, with the metrics of metrics.jsonl; a module beside the
    config is found."""
    fastpref.train(mine, [LORA, "train.steps=5", 'train.callbacks=["mine:keep"]'])
    events = told()
    expected = [("evaluation", 0), *(("step", n) for n in (1, 2, 3, 4)), ("evaluation", 4), ("step", 5)]
    assert [(e["kind"], e["step"]) for e in events] == [*expected, ("evaluation", 5), ("end", 5)]
    assert [{name: value for name, value in e["metrics"].items() if "per_second" not in name} for e in events[:-1]] == [
        {name: value for name, value in row.items() if name != "step"} for row in rows(Path("out"))
    ]
    assert events[-1]["metrics"] == events[-2]["metrics"]
    for event in events:  # the report is written again at each evaluation, and reloads until the end
        if event["kind"] == "evaluation":
            assert f"{event['step']} of 5 steps; going on" in event["page"]
            assert 'http-equiv="refresh"' in event["page"]
    assert 'http-equiv="refresh"' not in Path("out/report.html").read_text()
    assert [e["final"] for e in events] == [False] * (len(events) - 1) + [True]
    assert all(e["trained"] > 0 and e["steps"] == 5 and e["loss"] == "dpo" for e in events)


def test_random_numbers_do_not_change_the_run(mine: Path):
    """A function that draws random numbers leaves the weights, and what a resumed run computes, as they are."""
    fastpref.train(mine, [LORA, "output.dir=plain"])
    settings = [LORA, 'train.callbacks=["mine:draw"]', "output.keep=9"]
    fastpref.train(mine, settings)
    fastpref.train(mine, settings, resume="out/checkpoints/step-5", force=True)
    assert rows(Path("out")) == rows(Path("plain"))
    name = "adapter_model.safetensors"
    assert contents(Path("out/final"))[name] == contents(Path("plain/final"))[name]


@pytest.mark.parametrize(("function", "last"), [("stop", 3), ("stop_at_evaluation", 4)])
def test_a_function_can_end_the_run(mine: Path, function: str, last: int):
    """A run that a function ends is evaluated at its end, and writes final/ and the report."""
    result = fastpref.train(mine, [LORA, f'train.callbacks=["mine:{function}"]'])
    logged = rows(Path("out"))
    assert logged[-1]["step"] == last
    assert "eval/loss" in logged[-1]
    assert not result.interrupted
    assert (result.output_dir / "final").is_dir()
    assert json.loads((result.output_dir / "run.json").read_text())["ended"] == "finished"


FAULTS = {
    "fails": ("event 'step' after step 3, failed at .*mine.py:26: ZeroDivisionError: no metrics today", 3),
    "fails_at_evaluation": ("event 'evaluation' after step 4, failed at .*mine.py:30: KeyError: 'rate'", 4),
    "fails_at_the_end": ("event 'end' after step 10, failed at .*mine.py:34: ZeroDivisionError: no upload today", 10),
    "answers": ("event 'evaluation' after step 0, returned 'stop'; it may return True to end the run, or nothing", 0),
}


@pytest.mark.parametrize(("function", "fault"), FAULTS.items(), ids=FAULTS)
def test_a_function_that_fails_loses_nothing(mine: Path, function: str, fault: tuple[str, int]):
    """One message names the function, the place and the error; the run is saved and goes on to the same weights."""
    message, step = fault
    fastpref.train(mine, [LORA, "output.dir=plain"])
    with pytest.raises(UserError, match=f"mine.py:{function}, called with the {message}") as error:
        fastpref.train(mine, [LORA, f'train.callbacks=["mine:{function}"]'])
    assert f"--resume out/checkpoints/step-{step}" in str(error.value)
    fastpref.train(mine, [LORA], resume=f"out/checkpoints/step-{step}")
    assert rows(Path("out")) == rows(Path("plain"))
    name = "adapter_model.safetensors"
    assert contents(Path("out/final"))[name] == contents(Path("plain/final"))[name]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ("mine:nothing", "has no function nothing"),
        ("mine:wrong", "has no function wrong"),
        ("absent_module:f", "absent_module cannot be imported: ModuleNotFoundError"),
        ("mine", r"train\.callbacks: 'mine' is not of the form \"module:function\""),
    ],
)
def test_a_function_that_is_not_there(mine: Path, callbacks: str, message: str):
    """A function that cannot be found is named before anything is written."""
    with pytest.raises(UserError, match=message):
        fastpref.train(mine, [f'train.callbacks=["{callbacks}"]'])
    assert not Path("out").exists()


def test_only_training_runs_the_code(mine: Path):
    """Reading a run's config imports nothing: what evaluates or loads a downloaded run does not run its code."""
    (mine.parent / "mine.py").write_text("raise SystemExit('executed')")
    config = fastpref.load_config(mine, ['train.callbacks=["mine:keep"]'])
    assert config.train.callbacks == (f"{mine.parent / 'mine.py'}:keep",)
