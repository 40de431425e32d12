"""When a run evaluates, and when it saves a checkpoint."""

import math
import time

from fastpref.config import Config
from fastpref.step.schedule import every_so_many

SAVE_SECONDS = 1800.0  # what a run loses at most, if its process is killed and output.save_every is "auto"
EVALUATIONS = 10  # of a run, if eval.every is "auto"
FORWARD = 1 / 3  # the part of a training step that an evaluation of the same rows takes
EVALUATING = 0.25  # the time that evaluations may take, as a share of that of the training


def evaluation_steps(config: Config, steps: int, heldout: int) -> int | None:
    """Return the steps between two evaluations of `heldout` examples, or None if only the start and the end have one.

    With "auto" they depend on numbers of examples and not on the clock, so that a resumed run has the same ones.
    """
    every = config.eval.every
    if every == "end" or not heldout:
        return None
    if not isinstance(every, str):
        return every_so_many(every, steps)
    count = min(EVALUATIONS, math.floor(EVALUATING / FORWARD * steps * config.train.batch / heldout))
    if config.train.stop is not None:  # it has nothing else to decide by
        count = EVALUATIONS
    return math.ceil(steps / count) if count > 1 else None


class CheckpointTimer:
    """Says when a checkpoint is due. Every process has one, and they ask the first one's clock together."""

    def __init__(self, config: Config, steps: int):
        every = config.output.save_every
        self._by_clock, self._with_stop = every == "auto", config.train.stop is not None
        self._every = None if isinstance(every, str) else every_so_many(every, steps)
        self._saved = time.monotonic()

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint, or the start, was too long ago."""
        return self._by_clock and time.monotonic() - self._saved >= SAVE_SECONDS

    def is_due(self, step: int, *, improved: bool, overdue: bool) -> bool:
        """Return whether to save after a step whose evaluation is the best so far, or if the last one is `overdue`.

        With `train.stop` the best weights may be those before the training.
        """
        if self._with_stop and improved:
            return True
        if step == 0 or not (self._by_clock or self._every):
            return False
        return improved or overdue or (self._every is not None and step % self._every == 0)

    def saved(self) -> None:
        """Count the half hour from now on."""
        self._saved = time.monotonic()
