"""A user's own functions, which a run calls after each step, after each evaluation, and at its end."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastpref.config import Config
from fastpref.errors import UserError, one_line
from fastpref.functions import import_function
from fastpref.run.state import rng_state, set_rng_state


@dataclass(frozen=True)
class RunEvent:
    """What a function of `train.callbacks` is told. It returns True to end the run, or None."""

    kind: Literal["step", "evaluation", "end"]
    """After an optimizer step, after an evaluation and its checkpoint, or after final/ is written."""
    step: int
    """The optimizer steps taken."""
    steps: int
    """Those that the run is planned to take."""
    metrics: Mapping[str, float]
    """Those of the step, as in metrics.jsonl; for the other kinds those of the evaluation, if there was one."""
    folder: Path
    """The folder of the run."""
    config: Config
    model: Any
    """The model in training, with its adapters: transformers' or PEFT's. None if it is sharded."""
    tokenizer: Any


class CallbackError(UserError):
    """A function of `train.callbacks` has failed."""


class Callbacks:
    """The functions of `train.callbacks`, in the first process. Random numbers that they draw do not change the run."""

    def __init__(self, names: Sequence[str] = ()):
        """Import the functions. Raises UserError."""
        self._functions = [(name, import_function(name, f"train.callbacks: {name!r}")) for name in names]
        self.asked_to_stop = False

    def tell(self, event: RunEvent) -> None:
        """Call every function. Raises CallbackError."""
        before = rng_state()
        try:
            for name, function in self._functions:
                self._call(name, function, event)
        finally:
            set_rng_state(before)

    def _call(self, name: str, function: Any, event: RunEvent) -> None:
        where = f"train.callbacks: {name}, called with the event {event.kind!r} after step {event.step}"
        try:
            answer = function(event)
        except Exception as error:  # a user's function may fail in any way
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = one_line(error, named=True)
            raise CallbackError(f"{where}, failed at {last.filename}:{last.lineno}: {what}") from error
        if answer is not None and not isinstance(answer, bool):
            raise CallbackError(f"{where}, returned {answer!r}; it may return True to end the run, or nothing")
        self.asked_to_stop |= answer is True
