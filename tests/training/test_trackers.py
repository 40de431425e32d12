"""Metrics also go to trackers; a run continues if a tracker fails."""

from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, LoggerType

import fastpref
from fastpref.errors import UserError
from tests.support.runs import LORA, rows

SETTINGS = [LORA, "train.steps=2", "output.save_every=1"]


@pytest.fixture
def config(config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
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
