"""Handle interrupts, losses that are not finite, and running out of memory, with messages that say what to do."""

import math
import os
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from torch import Tensor

from fastpref.data.example import Example
from fastpref.errors import UserError
from fastpref.memory.fit import MARGIN, Count, OversizedStep, Proposal, first_change, propose
from fastpref.memory.step import PARTS
from fastpref.model.precision import is_finite
from fastpref.run.resume import may_change
from fastpref.sizes import in_words
from fastpref.step.objective import Objective

SKIPS_IN_ROW = 10  # a run stops after this many skipped steps in a row


def _signals() -> list[int]:
    """Return the signals that ask a run to stop: Ctrl-C, SIGTERM, and a terminal that is closed, unless by nohup."""
    closed: int | None = getattr(signal, "SIGHUP", None)  # which Windows does not have
    if closed is None or signal.getsignal(closed) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, closed]


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal to stop, of which the run says what is left."""


@contextmanager
def interrupts(tell: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect signals that ask a run to stop in a list, so that it finishes its step. A second one stops it at once.

    `tell` is called in the handler of the first one, so it must not write to a stream.
    """
    signals: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
            if signals:  # a closed terminal sends several
                return
        if signals:
            warnings.simplefilter("ignore")  # whatever a call that ends half way says of it
            raise StoppedAtOnce
        signals.append(number)
        tell()

    in_main = threading.current_thread() is threading.main_thread()  # only there can signals be handled
    before = {number: signal.signal(number, collect) for number in _signals() if in_main}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Let output go nowhere where the terminal it went to is gone, so that a checkpoint can still be written."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


class NotFinite(UserError):
    """A loss or gradient that is not finite. No weight has been updated with it."""


def not_finite(step: int, loss: float, norm: float, examples: Sequence[Example], objective: Objective) -> str:
    """Return a message that names the step, its rows, and the cause. Call it before the gradients are cleared."""
    message = f"step {step}: loss {loss}, gradient norm {norm}"
    parameters = dict(objective.policy.named_parameters())
    if weights := _not_finite_weights(parameters, math.isfinite(loss)):
        return f"{message}; the weights themselves are not finite: {_some(weights)}; its rows are {_places(examples)}"
    if not math.isfinite(loss):  # by one forward pass for each example, without dropout
        objective.policy.eval()
        alone = [e for e in examples if not math.isfinite(objective.evaluate([e], 1).result()["loss"])]
        objective.policy.train()
        if alone:
            return f"{message}; of its {len(examples)} rows these give such a loss by themselves: {_places(alone)}"
    trained = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    gradients = [name for name, gradient in trained.items() if not is_finite(gradient)]
    if 0 < len(gradients) < len(trained):  # clipping by a norm that is NaN makes all of them NaN
        message += f"; the gradients that are not finite are of {_some(gradients)}"
    return f"{message}; its rows are {_places(examples)}"


def _not_finite_weights(parameters: Mapping[str, Tensor], loss_is_finite: bool) -> list[str]:
    """Return the names of weights that are not finite: trained ones, or else frozen ones, which training cannot spoil.

    With a finite loss no frozen weight is spoilt. So the overflows by which float16 finds its loss scale read none.
    """
    trained = [name for name, p in parameters.items() if p.requires_grad and not is_finite(p)]
    if trained or loss_is_finite:
        return trained
    return [name for name, p in parameters.items() if not p.requires_grad and not is_finite(p)]


def _places(examples: Sequence[Example]) -> str:
    return "; ".join(dict.fromkeys(str(example.row.place) for example in examples))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def out_of_memory(after: int, step: OversizedStep, count: Count | None) -> tuple[str, list[str]]:
    """Return a message on what a run holds that ran out of memory, and the proposed overrides that resuming accepts."""
    parts = {name: size for name, size in step.memory.parts().items() if size}
    held = ", ".join(f"{PARTS[name]} {in_words(size)}" for name, size in parts.items())
    proposal = _proposal(step, count)
    lasting = [override for override in proposal.overrides if may_change(override.partition("=")[0])]
    message = (
        f"out of memory after step {after}: the run holds {held} of {in_words(step.capacity)}, besides the activations "
        f"of a micro-batch of {step.microbatch.tokens:,} tokens. {_advice(proposal, lasting)}"
    )
    return message, lasting


def _proposal(step: OversizedStep, count: Count | None) -> Proposal:
    """Return the changes to propose, by a rule of thumb if the step cannot be counted.

    The step must become smaller than its own count, however large the device is, because other programs may use it.
    """
    proposal = None
    if count is not None:
        with suppress(Exception):  # a model's code may read the values of tensors, which fake tensors lack
            proposal = propose(step, count, int(min(count(()).total, step.capacity) * (1 - MARGIN)))
    return proposal if proposal is not None and proposal.overrides else first_change(step)


def _advice(proposal: Proposal, lasting: Sequence[str]) -> str:
    if not proposal.overrides:
        return "No change that is known here takes less: take a smaller model"
    counted = "" if proposal.memory is None else f" (a step is counted at {in_words(proposal.memory.total)})"
    verdict = "would most likely fit" if proposal.fits else "takes least, and will hardly fit either"
    lost = [override for override in proposal.overrides if override not in lasting]
    anew = f"; a run cannot be resumed with {' '.join(lost)}, so start a new one" if lost else ""
    return f"What {verdict}{counted}: {' '.join(proposal.overrides)}{anew}"
