"""Read a run for its report: from its folder, or from TRL's trainer_state.json. Nothing here imports torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fastpref.config import load_config
from fastpref.config.losses import LOSSES, LossOptions
from fastpref.errors import UserError, one_line
from fastpref.health import Health, Known, examine, known_of, passed_of
from fastpref.run.history import HELDOUT, METRICS, History, read_facts, read_rows
from fastpref.run.lock import RunLock

TRL_STATE = "trainer_state.json"
GOING_ON = "going on"  # how a run that has not ended "ended", in run.json


@dataclass(frozen=True)
class Run:
    """A run, with the values that its report shows."""

    name: str
    folder: Path
    history: History
    known: Known
    config: str | None = None  # TOML
    model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    going_on: bool = False  # whether a process is training it now

    @cached_property
    def health(self) -> Health:
        """What the rules say, and which of their verdicts during the run have passed."""
        return examine(self.history, self.known).after(passed_of(self.facts))


def read_run(path: Path, loss: str | None = None, beta: float | None = None) -> Run:
    """Read the folder of a run, a folder of TRL, or its trainer_state.json. Raises UserError.

    `loss` and `beta` describe a run of TRL, which does not record its loss.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such folder")
    if is_run(path):
        if loss is not None or beta is not None:
            raise UserError(f"{path}: its config.toml names its loss; leave --loss and --beta out")
        config, facts = load_config(path / "config.toml", trains=False), read_facts(path)
        return Run(
            name=path.resolve().name,
            folder=path,
            history=History(read_rows(path / METRICS)),
            known=known_of(config, facts),
            config=(path / "config.toml").read_text(encoding="utf-8"),
            model=config.model.name,
            facts=facts,
            going_on=facts.get("ended") == GOING_ON and RunLock(path).held,
        )
    state = _trl_state(path)
    if state is None:
        raise UserError(f"{path}: not a run's folder: it has neither {METRICS} with config.toml nor {TRL_STATE}")
    return _of_trl(state, path if path.is_dir() else path.parent, loss, beta)


def is_run(path: Path) -> bool:
    """Return whether a path is a folder of a run of fastpref's."""
    return (path / METRICS).is_file() and (path / "config.toml").is_file()


def is_trl_run(path: Path) -> bool:
    """Return whether a path is a folder of a run of TRL's, or its trainer_state.json."""
    return not is_run(path) and _trl_state(path) is not None


# --- TRL ------------------------------------------------------------------------------------------------------------


def _trl_state(path: Path) -> Path | None:
    """Return the file itself, or the file of a folder or of its newest checkpoint."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    if (path / TRL_STATE).is_file():
        return path / TRL_STATE
    checkpoints = [p for p in path.glob(f"checkpoint-*/{TRL_STATE}") if p.parent.name[11:].isdecimal()]
    return max(checkpoints, key=lambda p: int(p.parent.name[11:]), default=None)


def _of_trl(state: Path, folder: Path, loss: str | None, beta: float | None) -> Run:
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        log = [entry for entry in content["log_history"] if isinstance(entry.get("step"), int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{state}: not a trainer_state.json: {one_line(error, named=True)}") from None
    history = History(filter(None, map(trl_row, log)))
    if not history.rows:
        raise UserError(f"{state}: its log_history has no row with a loss; logging_steps sets how often one is written")
    options, note = _method(history, loss, beta)
    rates = history["learning_rate"]
    known = Known(
        loss=options,
        steps=steps if isinstance(steps := content.get("max_steps"), int) and steps > 0 else None,
        learning_rate=float(rates.values.max()) if len(rates) else None,
    )
    return Run(folder.resolve().name, folder, history, known, notes=(note,))


def trl_row(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row of TRL's log under fastpref's names (`eval_…` differs), or None for the summary at the end."""
    if "loss" not in entry and "eval_loss" not in entry:
        return None
    row = {re.sub(r"^eval_", HELDOUT, name): value for name, value in entry.items()}
    return {name: value for name, value in row.items() if not re.search(r"runtime|_per_second$", name)}


def _method(history: History, loss: str | None, beta: float | None) -> tuple[LossOptions, str]:
    """Return the loss that is given, or else the one that the logged names and numbers fit."""
    if loss is not None and loss not in LOSSES:
        raise UserError(f"--loss {loss}: not one of {', '.join(LOSSES)}")
    if beta is not None and beta <= 0:
        raise UserError(f"--beta {beta}: must be above 0")
    name = loss or _guess(history)
    if beta is not None and LOSSES[name].supervised:
        raise UserError(f"--beta {beta}: {name} has no β; leave it out")
    options: LossOptions = TypeAdapter(LOSSES[name]).validate_python({} if beta is None else {"beta": beta})
    note = options.title if options.supervised else f"{options.title} with β {options.beta:g}"
    if loss is None:
        note = f"TRL's log does not name its loss, and fits {note}; set --loss and --beta if that is wrong"
    return options, note


def _guess(history: History) -> str:
    names = history.names()
    if "log_odds_ratio" in names:
        return "orpo"
    if "kl" in names:
        return "kto"
    if not any(name.removeprefix(HELDOUT).startswith("rewards/") for name in names):
        return "sft"
    rewards, logps = history["rewards/chosen"].values, history["logps/chosen"].values
    if len(rewards) == len(logps) > 1 and np.all(logps):
        ratios = rewards / logps  # β itself if there is no reference
        if ratios.min() > 0 and np.ptp(ratios) < 0.02 * ratios.mean():
            return "simpo" if ratios.mean() >= 1 else "cpo"
    return "ipo" if history["loss"].values[0] > 3 else "dpo"
