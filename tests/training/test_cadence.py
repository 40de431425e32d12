"""When a run evaluates and saves by default: often enough for the best checkpoint, and to lose half an hour at most."""

import json
import re
from pathlib import Path

import pytest

import fastpref
from fastpref.config import Config
from fastpref.run.folder import RunFolder
from fastpref.training import cadence
from fastpref.training.cadence import CheckpointTimer, evaluation_steps
from tests.support.runs import LORA


def config(**tables: dict) -> Config:
    return Config.model_validate(
        {"model": {"name": "m"}, "data": [{"path": "d"}], "eval": {"fraction": 0.1} | tables.pop("eval", {})} | tables
    )


CADENCES = {
    # (eval, train, steps, held-out rows): steps between evaluations
    ("auto", "{}", 1000, 100): 100,
    ("auto", "{}", 95, 100): 10,
    ("auto", "{}", 40, 80): 7,
    ("auto", "{}", 40, 200): 20,  # two evaluations take a quarter of the time
    ("auto", "{}", 40, 400): None,
    ("auto", "{}", 3, 2): 1,
    ("auto", "{}", 1000, 0): None,
    ("auto", '{"stop": {}}', 40, 400): 4,  # it has nothing else to decide by
    ("end", "{}", 1000, 100): None,
    (50, "{}", 1000, 10_000): 50,
    (0.25, "{}", 1000, 10_000): 250,
}


@pytest.mark.parametrize("of", CADENCES)
def test_the_steps_between_evaluations(of: tuple):
    every, train, steps, heldout = of
    assert evaluation_steps(config(eval={"every": every}, train=json.loads(train)), steps, heldout) == CADENCES[of]


@pytest.mark.parametrize(
    ("save", "due"),
    [("auto", (False, True, True)), ("stop", (False, False, False)), (4, (True, True, True)), (3, (False, True, True))],
)
def test_when_a_checkpoint_is_due(save: str | int, due: tuple):
    """Due after step 4 are: nothing in particular, the best evaluation, and more than half an hour since the last."""
    timer = CheckpointTimer(config(output={"save_every": save}), 12)
    given = [(False, False), (True, False), (False, timer.overdue)]
    assert not timer.overdue
    assert tuple(timer.is_due(4, improved=improved, overdue=late) for improved, late in given)[:2] == due[:2]
    assert timer.is_due(4, improved=False, overdue=True) == due[2]
    assert not timer.is_due(0, improved=True, overdue=True)


def test_half_an_hour_of_training_is_saved(config: Path, monkeypatch: pytest.MonkeyPatch):
    """By default every step is saved that is done half an hour after the last checkpoint, and the best evaluation."""
    monkeypatch.setattr(cadence, "SAVE_SECONDS", 0.0)
    text = re.sub(r"\[eval\]\nevery.*", "[eval]", config.read_text()).replace("save_every = 5\n", "keep = 99\n")
    config.write_text(text)
    fastpref.train(config, [LORA, "train.steps=3", "eval.samples=0"])
    out = Path("out")
    assert sorted(p.name for p in RunFolder(out).checkpoints()) == ["step-1", "step-2", "step-3"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 3]
    monkeypatch.setattr(cadence, "SAVE_SECONDS", 1800.0)
    fastpref.train(config, [LORA, "train.steps=3", "eval.samples=0"], force=True)
    saved = [p.name for p in RunFolder(out).checkpoints()]
    assert RunFolder(out).best() in saved
    assert "step-1" not in saved
