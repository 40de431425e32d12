"""Metrics also go to trackers; a run continues if a tracker fails."""

import os
import sys
from pathlib import Path
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
from accelerate import tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, LoggerType

import fastpref
from fastpref.checks import machine
from fastpref.config.training import Tracker
from fastpref.errors import UserError
from tests.support.runs import LORA, rows

NEWER = ("aim", "clearml", "comet_ml", "dvclive", "swanlab")
SETTINGS = [LORA, "train.steps=2", "output.save_every=1"]


@pytest.fixture
def config(config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "COMET_OFFLINE_DIRECTORY", "COMET_START_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # so that pytest restores what a run sets
        monkeypatch.delenv(name)
    return config


def test_tensorboard_gets_every_row(config: Path):
    """TensorBoard gets the rows of metrics.jsonl, in the run's folder; rows of resumed steps appear once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [*SETTINGS, 'log.trackers=["tensorboard"]']
    fastpref.train(config, settings)
    fastpref.train(config, [*settings, "train.steps=3"], resume="out/checkpoints/step-1", force=True)
    assert {p.name for p in config.parent.iterdir()} == {"cfg.toml", "out"}
    events = accumulator.EventAccumulator("out/trackers/fastpref").Reload()
    logged = rows(Path("out"))
    for name in ("loss", "grad_norm", "eval/loss", "rewards/accuracies"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged if name in row]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected


class Kept(GeneralTracker):
    """A tracker that keeps its rows, under the name of one that is not installed."""

    name = "wandb"
    requires_logging_directory = False
    told: list[tuple[int | None, dict]] = []  # noqa: RUF012 (it is what the test reads)
    options: dict = {}  # noqa: RUF012
    ended = 0

    def __init__(self, run_name: str, **options):
        super().__init__()
        Kept.options = {"project": run_name} | options

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values: dict) -> None:
        Kept.options["config"] = values

    def log(self, values: dict, step: int | None = None, **_) -> None:
        if step == Kept.fails_at:
            raise ConnectionError("no route to host")
        Kept.told.append((step, values))

    def finish(self) -> None:
        Kept.ended += 1

    fails_at: int | None = None


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Kept)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(machine, "is_installed", lambda module: True)
    monkeypatch.setattr(Kept, "told", [])
    monkeypatch.setattr(Kept, "ended", 0)
    return Kept


def test_a_tracker_is_told_everything(config: Path, kept: type[Kept]):
    """A tracker gets the rows of metrics.jsonl, the config as plain values, the run's name and folder, and one end."""
    fastpref.train(config, [*SETTINGS, 'log.trackers=["wandb"]'])
    told = [({"step": step} | {k: v for k, v in row.items() if "per_second" not in k}) for step, row in kept.told]
    assert told == rows(Path("out"))
    assert kept.options["name"] == "out"
    assert Path(kept.options["dir"]) == Path("out/trackers").resolve()
    assert kept.options["config"]["loss.type"] == "dpo"
    assert kept.options["config"]["lora.rank"] == 4
    assert kept.ended == 1


def test_a_tracker_that_fails_is_left(
    config: Path, kept: type[Kept], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """If a tracker fails, one message says so, and the run and metrics.jsonl continue."""
    monkeypatch.setattr(Kept, "fails_at", 1)
    fastpref.train(config, [*SETTINGS, 'log.trackers=["wandb"]'])
    assert capsys.readouterr().out.count("no metrics go there any more: no route to host") == 1
    assert [step for step, _ in kept.told] == [0]
    assert [row["step"] for row in rows(Path("out"))] == [0, 1, 2, 2]


def test_a_tracker_that_is_not_installed(config: Path, monkeypatch: pytest.MonkeyPatch):
    """A missing tracker gives one message with the pip command, before anything is written."""
    monkeypatch.setattr(tracking, "_available_trackers", [])
    Path("wandb").mkdir()  # a folder that runs of wandb leave is not the package
    with pytest.raises(UserError, match=r"log\.trackers: wandb, trackio not installed; pip install wandb trackio"):
        fastpref.train(config, ['log.trackers=["wandb", "trackio"]'])
    assert not Path("out").exists()


def test_every_tracker_of_accelerate_is_known():
    """The names are those of Accelerate."""
    assert set(get_args(Tracker)) == {kind.value for kind in LoggerType} - {"all"}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, MagicMock]:
    """Put packages of trackers that record every call in the places of those that are not installed."""
    modules = {name: MagicMock(name=name) for name in (*NEWER, "dvclive.plots")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["clearml"].Task.current_task.return_value = None
    modules["comet_ml"].__version__ = "3.49.0"
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name) for name in NEWER])
    monkeypatch.setattr(machine, "is_installed", lambda module: True)
    monkeypatch.setattr(tracking, "is_comet_ml_available", lambda: True)
    return modules


def test_accelerate_takes_what_a_run_gives(config: Path, packages: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """Accelerate's own classes of the trackers take the run's options and rows: each gets its folder or name, every
    loss with its step, and one end."""
    fastpref.train(config, [*SETTINGS, f"log.trackers={list(NEWER)}"])
    assert "no metrics go there any more" not in capsys.readouterr().out
    losses = [(row["step"], row["loss"]) for row in rows(Path("out")) if "loss" in row]
    place = Path("out/trackers").resolve()

    aim = packages["aim"].Run
    assert aim.call_args.kwargs == {"repo": str(place), "experiment": "out"}
    tracked = aim.return_value.track.call_args_list
    assert [(call.kwargs["step"], call.args[0]) for call in tracked if call.kwargs["name"] == "loss"] == losses
    aim.return_value.close.assert_called_once()

    clearml = packages["clearml"].Task.init
    assert clearml.call_args.kwargs == {"project_name": "fastpref", "task_name": "out"}
    reported = clearml.return_value.get_logger.return_value.report_scalar.call_args_list
    scalars = [call.kwargs for call in reported if call.kwargs["title"] == "loss"]
    assert [(scalar["iteration"], scalar["value"]) for scalar in scalars] == losses
    clearml.return_value.close.assert_called_once()

    comet = packages["comet_ml"].start
    assert comet.call_args.kwargs == {"project_name": "fastpref"}
    assert os.environ["COMET_START_EXPERIMENT_NAME"] == "out"
    logged = comet.return_value.log_metric.call_args_list
    assert [(call.kwargs["step"], call.args[1]) for call in logged if call.args[0] == "loss"] == losses
    comet.return_value.end.assert_called_once()

    dvc = packages["dvclive"].Live
    assert dvc.call_args.kwargs == {
        "dir": str(place / "dvclive"), "dvcyaml": str(place / "dvclive" / "dvc.yaml"), "resume": False,
        "save_dvc_exp": False,
    }  # fmt: skip
    values = [call.args[1] for call in dvc.return_value.log_metric.call_args_list if call.args[0] == "loss"]
    assert values == [loss for _, loss in losses]
    dvc.return_value.end.assert_called_once()

    swan = packages["swanlab"].init
    assert swan.call_args.kwargs == {
        "project": "fastpref", "experiment_name": "out", "logdir": str(place / "swanlab"),
    }  # fmt: skip
    sent = [(call.kwargs["step"], call.args[0]["loss"]) for call in swan.return_value.log.call_args_list
            if "loss" in call.args[0]]  # fmt: skip
    assert sent == losses
    swan.return_value.finish.assert_called_once()
