"""Metrics for TensorBoard and other trackers, through Accelerate, in addition to metrics.jsonl."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, tracking

from fastpref.config import Config
from fastpref.errors import UserError, one_line

PROJECT = "fastpref"


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError for trackers whose package is not installed."""
    # Accelerate skips trackers that are not installed without a message.
    available = [str(name) for name in tracking.get_available_trackers()]
    if missing := [name for name in names if name not in available]:
        raise UserError(f"log.trackers: {', '.join(missing)} not installed; pip install {' '.join(missing)}")


class Trackers:
    """The trackers of a run, if it has any. If one fails, the run prints one note and continues without trackers."""

    def __init__(self, accelerator: Accelerator, note: Callable[[str], None]):
        self._accelerator, self._note, self._on = accelerator, note, False

    def start(self, config: Config, folder: Path, step: int) -> None:
        """Begin, or continue after a step. Local trackers write to trackers/ in the run's folder."""
        if not config.log.trackers:
            return
        place = (folder / "trackers").resolve()
        for variable, value in _variables(place, folder.name).items():
            os.environ.setdefault(variable, value)
        options: dict[str, dict[str, Any]] = {
            "aim": {"experiment": folder.name},
            "clearml": {"task_name": os.environ.get("CLEARML_TASK", folder.name)},
            "comet_ml": {},
            "dvclive": {
                "dir": str(place / "dvclive"), "dvcyaml": str(place / "dvclive" / "dvc.yaml"), "resume": bool(step),
                "save_dvc_exp": False,  # that would save the whole repository that the run is started in
            },
            "mlflow": {"run_name": folder.name, "logging_dir": (place / "mlflow").as_uri()},
            "swanlab": {"experiment_name": folder.name, "logdir": str(place / "swanlab")},
            "tensorboard": {"purge_step": step + 1} if step else {},
            "trackio": {"name": folder.name},
            "wandb": {"name": folder.name, "dir": str(place)},
        }  # fmt: skip
        self._on = True
        self._accelerator.project_configuration.logging_dir = str(place)
        self._accelerator.log_with = tracking.filter_trackers(list(config.log.trackers), str(place))
        self._try(lambda: place.mkdir(parents=True, exist_ok=True))
        chosen = {name: options[name] for name in config.log.trackers}
        self._try(lambda: self._accelerator.init_trackers(PROJECT, config=_settings(config), init_kwargs=chosen))

    def log(self, row: Mapping[str, float | int]) -> None:
        values = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
        self._try(lambda: self._accelerator.log(values, step=int(row["step"])))

    def end(self) -> None:
        self._try(self._accelerator.end_training)
        self._on = False

    def _try(self, call: Callable[[], Any]) -> None:
        if not self._on:
            return
        try:
            call()
        except Exception as error:  # a tracker's server, disk or login fails with errors of its own
            self._on = False
            self._note(f"log.trackers: no metrics go there any more: {one_line(error)}")


def _variables(place: Path, name: str) -> dict[str, str]:
    """Return settings of trackers that take no argument for them, as environment variables; those set already win."""
    return {
        "TRACKIO_DIR": str(place / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
        "COMET_OFFLINE_DIRECTORY": str(place / "comet_ml"),
        "COMET_START_EXPERIMENT_NAME": name,
    }


def _settings(config: Config) -> dict[str, str | int | float | bool]:
    """Return the config as plain values, which all trackers accept."""
    settings: dict[str, str | int | float | bool] = {}
    for table, content in config.model_dump(mode="json").items():
        for key, value in content.items() if isinstance(content, dict) else [("", content)]:
            if value is not None:
                plain = value if isinstance(value, str | int | float | bool) else str(value)
                settings[f"{table}.{key}".rstrip(".")] = plain
    return settings
