"""The folder of a run and its files. A file appears in it only once it is complete."""

import errno
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.atomic import WriteError, refusals_named, sync, write_file, write_folder
from fastpref.config import Config
from fastpref.config.toml import to_toml
from fastpref.errors import UserError
from fastpref.run.history import FACTS, METRICS, REPORT, read_rows

if TYPE_CHECKING:
    from fastpref.run.state import Progress

BEST = "best.json"
_OURS = ("final", "stopped", "checkpoints", "trackers")  # folders that a new run replaces


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with config.toml (resolved), metrics.jsonl (a JSON object per row), run.json (facts for the
    report), report.html, checkpoints/ and final/ (an adapter or a model).
    """

    path: Path
    new: bool = False  # whether the folder did not exist yet when it was chosen

    @classmethod
    def choose(cls, config: Config, name: str, *, force: bool) -> "RunFolder":
        """Choose the folder of output.dir, or the next free default folder if output.dir is not set.

        Writes nothing yet. Raises UserError if output.dir is not empty, unless it is a run's folder and `force` is set.
        """
        if config.output.dir is None:
            return cls(next(p for p in default_folders(config, name) if not p.exists()), new=True)
        path = Path(config.output.dir).expanduser()
        if path.exists() and not path.is_dir():
            raise UserError(f"output.dir = {str(path)!r}: a file of that name is in the way")
        if path.is_dir() and any(path.iterdir()):
            is_run = (path / METRICS).exists() and (path / "config.toml").exists()
            if not force:
                raise UserError(
                    f"output.dir = {str(path)!r}: the folder is not empty; choose another"
                    + (", replace the run in it with --force, or go on with it with --resume" if is_run else "")
                )
            if not is_run:
                raise UserError(f"output.dir = {str(path)!r}: this is no run's folder, so --force will not empty it")
        return cls(path, new=not path.exists())

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def create(self, config: Config) -> None:
        """Begin a run in the folder and remove what an earlier run saved there. Raises UserError."""
        if self.new and self.metrics.exists():
            raise UserError(f"{self.path}: another run has begun in this folder meanwhile; start this one again")
        try:
            for old in _OURS:
                shutil.rmtree(self.path / old, ignore_errors=True)
            for old in (FACTS, REPORT):
                (self.path / old).unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / "config.toml", to_toml(config))
            self.metrics.write_text("", encoding="utf-8")
        except (OSError, WriteError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"output.dir = {str(self.path)!r}: cannot be written: {why}") from None

    def resume(self, config: Config, progress: "Progress") -> None:
        """Resume from a checkpoint: remove the rows and files that were written after it."""
        kept = [json.dumps(row) for row in self.rows() if _before(row, progress)]
        write_file(self.metrics, "".join(f"{line}\n" for line in kept))
        write_file(self.path / "config.toml", to_toml(config))
        for leftover in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for later in self.checkpoints():
            if step_of(later) > progress.step:
                shutil.rmtree(later, ignore_errors=True)
        shutil.rmtree(self.path / "stopped", ignore_errors=True)
        (self.path / "checkpoints" / BEST).unlink(missing_ok=True)
        if progress.best and self.checkpoint_of(int(progress.best["step"])).exists():
            self.mark_best(progress.best)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl."""
        return read_rows(self.metrics) if self.metrics.exists() else iter(())

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append a row to metrics.jsonl, with null for numbers that JSON cannot hold. A WriteError adds none."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = f"{json.dumps(finite)}\n".encode()
        with refusals_named(self.metrics), self.metrics.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    def record(self, facts: Mapping[str, Any]) -> None:
        """Replace run.json. Raises WriteError."""
        write_file(self.path / FACTS, json.dumps(facts, indent=1) + "\n")

    def checkpoint(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Save a checkpoint. If it raises WriteError, nothing has changed."""
        place = self.checkpoint_of(step)
        with refusals_named(self.metrics):
            sync(self.metrics)  # a checkpoint must not reach the disk before the rows that led to it
        write_folder(place, fill, manifest=True)
        return place

    def checkpoint_of(self, step: int) -> Path:
        """Return the place of a checkpoint after a step, whether there is one or not."""
        return self.path / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """List the run's checkpoints, including damaged ones, the newest first."""
        folders = [p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir() and is_checkpoint(p)]
        return sorted(folders, key=step_of, reverse=True)

    def mark_best(self, best: Mapping[str, float]) -> None:
        """Point checkpoints/best.json at the checkpoint of the best evaluation."""
        text = json.dumps({"checkpoint": f"step-{best['step']}", **best}, indent=1)
        write_file(self.path / "checkpoints" / BEST, text + "\n")

    def best(self) -> str | None:
        """Return the name of the best checkpoint, or None if none is known."""
        try:
            return json.loads((self.path / "checkpoints" / BEST).read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep` and the best."""
        best = self.best()
        for old in self.checkpoints()[keep:]:
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)

    def resume_command(self, checkpoint: Path, *overrides: str) -> str:
        """Return the command that resumes this run from a checkpoint."""
        return shlex.join(
            ["fastpref", "train", str(self.path / "config.toml"), "--resume", str(checkpoint), *overrides]
        )


def default_folders(config: Config, name: str) -> Iterator[Path]:
    """Yield runs/NAME-LOSS, runs/NAME-LOSS-2, … without end."""
    base = Path("runs") / f"{name}-{config.loss.type}"
    yield base
    for number in count(2):
        yield base.with_name(f"{base.name}-{number}")


def is_checkpoint(path: Path) -> bool:
    """Return whether a path has the form of a run's checkpoint, RUN/checkpoints/step-N."""
    return path.parent.name == "checkpoints" and path.name.removeprefix("step-").isdecimal()


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step-"))


def _before(row: dict[str, Any], progress: "Progress") -> bool:
    """Return whether a row precedes a checkpoint. One saved by an interrupt precedes its step's evaluation."""
    step = row["step"]
    if step > progress.step:
        return False
    return step < progress.step or "eval/loss" not in row or progress.evaluated_at == step
