"""`fastpref estimate`: an estimate as a table, or as JSON."""

import json
import shlex
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fastpref.data.longest import Microbatch
from fastpref.errors import UserError
from fastpref.memory.estimate import CARDS, CardFit, Estimator, fits, present_card, proposal, usable
from fastpref.memory.fit import MARGIN
from fastpref.memory.step import PARTS, StepMemory
from fastpref.memory.trl import VERSION
from fastpref.sizes import GIB, in_words
from fastpref.step.reference import summary


def estimate(estimator: Estimator, *, card: float | None, compare: bool, as_json: bool) -> None:
    """Count a step, and print each result as soon as it is known, or all of them as JSON at the end.

    Args:
        card: GiB of the GPU that the run is meant for; by default this machine's GPU, or 24.
        compare: whether to count the step of TRL too.

    Raises UserError for a model that does not exist, and for a comparison with TRL of a loss without one.
    """
    if compare and estimator.config.loss.listwise:
        raise UserError(f"--compare: TRL has no loss of lists such as {estimator.config.loss.type}; leave it out")
    if compare and estimator.config.loss.supervised:
        raise UserError(
            f"--compare: TRL's step is known for losses of preferences, not for {estimator.config.loss.type}"
        )
    with Screen(quiet=as_json) as screen:
        estimator.counted = lambda what: screen.wait(f"counting {what}")
        numbers = _numbers(estimator, card, compare, screen)
    if as_json:
        print(json.dumps(numbers, indent=2))


def _numbers(estimator: Estimator, card: float | None, compare: bool, screen: Console) -> dict[str, Any]:
    least = estimator.take()
    config, largest = estimator.config, estimator.microbatch(estimator.config)
    for note in estimator.notes:
        screen.print(note, markup=False, soft_wrap=True)
    screen.print(_head(estimator, largest), markup=False, soft_wrap=True)
    screen.print(_table({_checkpointing(least): least}))
    numbers: dict[str, Any] = {
        "model": config.model.name,
        "loss": config.loss.type,
        "device": estimator.device.type,
        "quantised": estimator.quantised,
        "reference": summary(config),
        "notes": estimator.notes,
        "microbatch": {"examples": len(largest.examples), "tokens": largest.tokens, "source": largest.source},
        "step": _bytes(least),
    }
    if estimator.device.type == "cuda":
        numbers |= _gpus(estimator, least, card or present_card() or 24.0, screen)
    if compare:
        theirs = estimator.take_as_trl()
        numbers["trl"] = _bytes(theirs)
        screen.print(_table({f"TRL {VERSION}": theirs, "fastpref": least}))
        computed = [memory.activations + memory.head for memory in (least, theirs)]
        screen.print(
            f"TRL's step is a model of its source's layout and head, with the same weights and optimizer. "
            f"fastpref / TRL: {least.total / theirs.total:.2f} in all, {computed[0] / max(1, computed[1]):.2f} for "
            "activations and head alone.",
            soft_wrap=True,
        )
    return numbers


def _gpus(estimator: Estimator, least: StepMemory, card: float, screen: Console) -> dict[str, Any]:
    most = estimator.take(layers=0) if estimator.checkpoints else least
    if most is not least:
        screen.print(f"{_checkpointing(most)}: {in_words(most.total)}", soft_wrap=True)
    missing = least.streamed or least.total > usable(min(*CARDS, card))
    stream = estimator.take_streamed() if missing else None
    *gpus, own = fits(most, least, [*CARDS, card], stream)
    if stream is not None:
        screen.print(_streaming(stream.least), soft_wrap=True)
    screen.print(f"\nA run can use {1 - MARGIN:.0%} of a GPU's memory.", soft_wrap=True)
    for gpu in gpus:
        screen.print(_fit(gpu, most is not least, least.layers), highlight=False, soft_wrap=True)
    numbers: dict[str, Any] = {
        "uncheckpointed": _bytes(most) if most is not least else None,
        "streamed": _bytes(stream.least) if stream is not None else None,
        "cards": [asdict(gpu) for gpu in gpus],
        "card": card,
        "changes": None,
    }
    if not own.fits:
        change = proposal(estimator, card)
        message = f"No known change makes it fit {card:g} GB. Take a smaller model."
        if change.fits and change.memory is not None:
            numbers["changes"] = {"overrides": list(change.overrides)} | _bytes(change.memory)
            words = " ".join(map(shlex.quote, change.overrides))
            host = f", and {in_words(change.memory.host)} of host memory" if change.memory.host else ""
            message = f"To fit {card:g} GB ({in_words(change.memory.total)}{host}), add\n  {words}"
        screen.print(message, markup=False, soft_wrap=True)
    return numbers


def _head(estimator: Estimator, largest: Microbatch) -> str:
    config = estimator.config
    plural = "s" if len(largest.examples) > 1 else ""
    where = "a GPU" if estimator.device.type == "cuda" else "a CPU"
    training = "all weights" if config.lora is None else f"LoRA of {config.lora.ranks}"
    if config.lora is not None and config.lora.start is not None:
        training = f"{training} on top of" if config.lora.stack else "the adapter"
        training = f"{training} {config.lora.start}"
    bits = "" if config.model.quantization == "none" else f", {config.model.quantization}"
    if estimator.quantised is not None:
        bits = f", whose weights are stored quantised ({estimator.quantised})"
    reference = summary(config)
    told = f"reference: {reference}\n" if reference else ""
    return (
        f"{config.loss.type.upper()} on {config.model.name}{bits}, {training}, on {where}\n{told}"
        f"the largest micro-batch: {len(largest.examples)} {config.loss.unit}{plural}, {largest.tokens:,} tokens at "
        f"once (from {largest.source})"
    )


def _table(columns: dict[str, StepMemory]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("GiB at the peak of a step")
    for name in columns:
        table.add_column(name, justify="right")
    for part, words in PARTS.items():
        values = [memory.parts()[part] for memory in columns.values()]
        if any(values):
            table.add_row(words, *(f"{value / GIB:.2f}" for value in values))
    table.add_row("all", *(f"{memory.total / GIB:.2f}" for memory in columns.values()), style="bold")
    if any(memory.host for memory in columns.values()):
        table.add_row("in host memory", *(f"{memory.host / GIB:.2f}" for memory in columns.values()))
    return table


def _checkpointing(memory: StepMemory) -> str:
    count, layers = memory.checkpointed, memory.layers
    if memory.streamed:
        return f"{memory.streamed} layers streamed, {count} checkpointed"
    if count == 0:
        return "without gradient checkpointing"
    return f"gradient checkpointing of {'all' if count == layers else f'{count} of {layers}'} layers"


def _streaming(memory: StepMemory) -> str:
    return (
        f"all {memory.streamed} layers streamed: {in_words(memory.total)} and {in_words(memory.host)} of host memory, "
        f"of which a micro-batch copies {in_words(memory.copied)}"
    )


def _fit(fit: CardFit, decides: bool, layers: int) -> str:
    if not fit.fits:
        verdict = "does not fit"
    elif fit.streamed:
        verdict = f"fits with {fit.streamed} streamed layers, and {in_words(fit.host)} of host memory"
    elif not decides:
        verdict = "fits"
    elif fit.checkpointed == 0:
        verdict = "fits without gradient checkpointing"
    else:
        number = "all" if fit.checkpointed == layers else f"about {fit.checkpointed} of"
        verdict = f"fits with gradient checkpointing of {number} {layers} layers"
    return f"{fit.card:>4g} GB  {verdict}"


def _bytes(memory: StepMemory) -> dict[str, Any]:
    numbers = {"layers": memory.layers, "checkpointed": memory.checkpointed, "streamed": memory.streamed}
    return numbers | {"bytes": memory.parts(), "total": memory.total, "host": memory.host, "copied": memory.copied}
