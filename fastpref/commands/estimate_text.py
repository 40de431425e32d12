"""`fastpref estimate`: an estimate as a table, or as JSON."""

import json
import shlex
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fastpref.memory.estimate import CARDS, CardFit, Estimator, fits, present_card, proposal, usable
from fastpref.memory.fit import MARGIN, Proposal
from fastpref.memory.step import PARTS, StepMemory
from fastpref.memory.trl import VERSION
from fastpref.sizes import GIB, in_words


def estimate(
    estimator: Estimator, *, card: float | None = None, compare: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Count a step, print each result as soon as it is known, and return all of them as plain values.

    Args:
        card: GiB of the card that the run is meant for; by default this machine's GPU, or 24.
        compare: whether to count the step of TRL too.
        console: where to print; by default nothing is printed.

    Raises UserError for a model that does not exist.
    """
    console = console or Console(quiet=True)
    least = estimator.take()
    for note in estimator.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(_head(estimator), markup=False, soft_wrap=True)
    console.print(_table({_checkpointing(least): least}))
    numbers: dict[str, Any] = {
        "model": estimator.config.model.name,
        "loss": estimator.config.loss.type,
        "device": estimator.device.type,
        "quantised": estimator.quantised,
        "notes": estimator.notes,
        "microbatch": _microbatch(estimator),
        "step": _bytes(least),
    }
    if estimator.device.type == "cuda":
        numbers |= _cards(estimator, least, card, console)
    if compare:
        theirs = estimator.take_as_trl()
        numbers["trl"] = _bytes(theirs)
        console.print(_table({f"TRL {VERSION}": theirs, "fastpref": least}))
        console.print(
            f"TRL's step is a model of its source's layout and head, with the same weights and optimizer. "
            f"fastpref / TRL: {least.total / theirs.total:.2f} in all, "
            f"{_allocated(least) / max(1, _allocated(theirs)):.2f} for activations and head alone.",
            soft_wrap=True,
        )
    return numbers


def _cards(estimator: Estimator, least: StepMemory, card: float | None, console: Console) -> dict[str, Any]:
    most = estimator.take(layers=0) if estimator.checkpoints else least
    if most is not least:
        console.print(f"{_checkpointing(most)}: {in_words(most.total)}", soft_wrap=True)
    meant = card or present_card() or 24.0
    cards = fits(most, least, CARDS)
    console.print(f"\n{1 - MARGIN:.0%} of a card's memory count as usable.", soft_wrap=True)
    for fit in cards:
        console.print(_fit(fit, most is not least, least.layers), highlight=False, soft_wrap=True)
    numbers: dict[str, Any] = {
        "uncheckpointed": _bytes(most) if most is not least else None,
        "cards": [asdict(fit) for fit in cards],
        "card": meant,
        "changes": None,
    }
    if least.total > usable(meant):
        change = proposal(estimator, meant)
        console.print(_proposal(change, meant), markup=False, soft_wrap=True)
        if change.fits and change.memory is not None:
            numbers["changes"] = {"overrides": list(change.overrides)} | _bytes(change.memory)
    return numbers


def _head(estimator: Estimator) -> str:
    config, largest = estimator.config, estimator.microbatch(estimator.config)
    plural = "s" if len(largest.examples) > 1 else ""
    where = "a GPU" if estimator.device.type == "cuda" else "a CPU"
    training = "all weights" if config.lora is None else f"LoRA of rank {config.lora.rank}"
    bits = "" if config.model.quantization == "none" else f", {config.model.quantization}"
    if estimator.quantised is not None:
        bits = f", whose checkpoint is quantised ({estimator.quantised})"
    return (
        f"{config.loss.type.upper()} on {config.model.name}{bits}, {training}, on {where}\n"
        f"the largest micro-batch: {len(largest.examples)} {config.loss.unit}{plural}, {largest.tokens:,} tokens at "
        f"once (from {largest.source})"
    )


def _microbatch(estimator: Estimator) -> dict[str, Any]:
    largest = estimator.microbatch(estimator.config)
    return {"examples": len(largest.examples), "tokens": largest.tokens, "source": largest.source}


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
    return table


def _checkpointing(memory: StepMemory) -> str:
    count, layers = memory.checkpointed, memory.layers
    if count == 0:
        return "without gradient checkpointing"
    return f"gradient checkpointing of {'all' if count == layers else f'{count} of {layers}'} layers"


def _fit(fit: CardFit, decides: bool, layers: int) -> str:
    if not fit.fits:
        verdict = "does not fit"
    elif not decides:
        verdict = "fits"
    elif fit.checkpointed == 0:
        verdict = "fits without gradient checkpointing"
    else:
        number = "all" if fit.checkpointed == layers else f"about {fit.checkpointed} of"
        verdict = f"fits with gradient checkpointing of {number} {layers} layers"
    return f"{fit.card:>4g} GB  {verdict}"


def _proposal(proposal: Proposal, card: float) -> str:
    if not proposal.fits or proposal.memory is None:
        return f"No known change makes it fit {card:g} GB. Take a smaller model."
    words = " ".join(map(shlex.quote, proposal.overrides))
    return f"To fit {card:g} GB ({in_words(proposal.memory.total)}), add\n  {words}"


def _bytes(memory: StepMemory) -> dict[str, Any]:
    numbers = {"layers": memory.layers, "checkpointed": memory.checkpointed}
    return numbers | {"bytes": memory.parts(), "total": memory.total}


def _allocated(memory: StepMemory) -> int:
    return memory.activations + memory.head


def as_json(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, indent=2)
