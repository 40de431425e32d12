"""`fastpref estimate`: an estimate as a table, or as JSON."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fastpref.memory.activations import MARGIN
from fastpref.memory.estimate import CARDS, GIB, Change, Estimator, Fit, Taken, changes, fits, present_card, usable
from fastpref.memory.trl import VERSION

_ROWS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "head workspace",
    "reference": "reference",
    "overhead": "overhead, assumed",
}


def estimate(
    estimator: Estimator, *, card: float | None = None, compare: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Count what is asked for, and tell each part as soon as it is known; all of it as plain values.

    `card`: GiB of the card that the run is meant for; that which is here if None, or 24. Without a console nothing is
    printed. Raises UserError for a model that is not there.
    """
    console = console or Console(quiet=True)
    least = estimator.take()
    for note in estimator.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(_head(estimator), markup=False, soft_wrap=True)
    console.print(_table({_twice(least): least}))
    told: dict[str, Any] = {
        "model": estimator.config.model.name,
        "loss": estimator.config.loss.type,
        "device": estimator.device.type,
        "quantised": estimator.quantised,
        "notes": estimator.notes,
        "microbatch": _microbatch(estimator),
        "step": _bytes(least),
    }
    if estimator.device.type == "cuda":
        told |= _cards(estimator, least, card, console)
    if compare:
        theirs = estimator.take_as_trl()
        told["trl"] = _bytes(theirs)
        console.print(_table({f"TRL {VERSION}": theirs, "fastpref": least}))
        console.print(
            f"TRL's step is a model: its layout and its head as its source has them, the same weights and optimizer. "
            f"fastpref / TRL: {least.total / theirs.total:.2f} in all, "
            f"{_made(least) / max(1, _made(theirs)):.2f} of what the step itself makes.",
            soft_wrap=True,
        )
    return told


def _cards(estimator: Estimator, least: Taken, card: float | None, console: Console) -> dict[str, Any]:
    most = estimator.take(layers=0) if estimator.checkpoints else least
    if most is not least:
        console.print(f"{_twice(most)}: {_gib(most.total)}", soft_wrap=True)
    meant = card or present_card() or 24.0
    found = fits(most, least, CARDS)
    console.print(f"\nOf a card's memory {1 - MARGIN:.0%} count as usable.", soft_wrap=True)
    for fit in found:
        console.print(_fit(fit, most is not least, least.memory.layers), highlight=False, soft_wrap=True)
    told: dict[str, Any] = {
        "uncheckpointed": _bytes(most) if most is not least else None,
        "cards": [asdict(fit) for fit in found],
        "card": meant,
        "changes": None,
    }
    if least.total > usable(meant):
        change = changes(estimator, meant)
        console.print(_change(change, meant), markup=False, soft_wrap=True)
        told["changes"] = None if change is None else {"overrides": list(change.overrides)} | _bytes(change.taken)
    return told


def _head(estimator: Estimator) -> str:
    config, largest = estimator.config, estimator.microbatch(estimator.config)
    plural = "s" if len(largest.examples) > 1 else ""
    where = "a GPU" if estimator.device.type == "cuda" else "a CPU"
    training = "all weights" if config.lora is None else f"LoRA of rank {config.lora.rank}"
    bits = "" if config.model.quantization == "none" else f", {config.model.quantization}"
    if estimator.quantised is not None:
        bits = f", whose checkpoint lies quantised ({estimator.quantised})"
    return (
        f"{config.loss.type.upper()} on {config.model.name}{bits}, {training}, on {where}\n"
        f"the largest micro-batch: {len(largest.examples)} {config.loss.unit}{plural}, {largest.tokens:,} tokens at "
        f"once (from {largest.source})"
    )


def _microbatch(estimator: Estimator) -> dict[str, Any]:
    largest = estimator.microbatch(estimator.config)
    return {"examples": len(largest.examples), "tokens": largest.tokens, "source": largest.source}


def _table(columns: dict[str, Taken]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("GiB at the peak of a step")
    for name in columns:
        table.add_column(name, justify="right")
    for part, words in _ROWS.items():
        values = [taken.parts()[part] for taken in columns.values()]
        if any(values):
            table.add_row(words, *(f"{value / GIB:.2f}" for value in values))
    table.add_row("all", *(f"{taken.total / GIB:.2f}" for taken in columns.values()), style="bold")
    return table


def _twice(taken: Taken) -> str:
    count, layers = taken.memory.checkpointed, taken.memory.layers
    which = "no layer" if count == 0 else "all layers" if count == layers else f"{count} of {layers} layers"
    return f"{which} computed twice"


def _fit(fit: Fit, decides: bool, layers: int) -> str:
    said = f"{fit.card:>4g} GB  "
    if not fit.fits:
        return said + "does not fit"
    if not decides:
        return said + "fits"
    if fit.checkpointed == 0:
        return said + "fits, no layer computed twice"
    about = "all" if fit.checkpointed == layers else f"about {fit.checkpointed} of"
    return said + f"fits, with {about} {layers} layers computed twice"


def _change(change: Change | None, card: float) -> str:
    if change is None:
        return f"No change that is known here makes it fit {card:g} GB: take a smaller model."
    words = " ".join(f"'{override}'" for override in change.overrides)
    return f"To fit {card:g} GB ({_gib(change.taken.total)}), add\n  {words}"


def _bytes(taken: Taken) -> dict[str, Any]:
    memory = taken.memory
    return {"layers": memory.layers, "checkpointed": memory.checkpointed, "bytes": taken.parts(), "total": taken.total}


def _made(taken: Taken) -> int:
    return taken.memory.activations + taken.memory.head


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def as_json(told: dict[str, Any]) -> str:
    return json.dumps(told, indent=2)
