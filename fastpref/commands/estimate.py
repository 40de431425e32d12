"""`fastpref estimate`: an estimate as a table, or as JSON."""

import json
import shlex
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fastpref.commands.screen import Screen
from fastpref.data.longest import Microbatch
from fastpref.errors import UserError
from fastpref.memory.estimate import CARDS, CardFit, Estimator, fit, proposal, usable
from fastpref.memory.largest import Largest, largest_microbatch, longest_rows
from fastpref.memory.process import Card, Verdict, process
from fastpref.memory.step import PARTS, StepMemory
from fastpref.memory.trl import VERSION as TRL
from fastpref.memory.unsloth import VERSION as UNSLOTH
from fastpref.sizes import GIB, in_words
from fastpref.step.reference import summary


def estimate(
    estimator: Estimator, *, card: float | None, compare: bool = False, largest: bool = False, as_json: bool = False
) -> None:
    """Count a step, and print each result as soon as it is known, or all of them as JSON at the end.

    Args:
        card: GiB of the GPU that the run is meant for; by default this machine's GPU, or 24.
        compare: whether to count the step of other trainers too.
        largest: whether to search for the longest rows and the largest micro-batch that fit the GPU.

    Raises UserError for a model that does not exist, for a comparison of a loss that others do not have, and for
    `largest` on a CPU.
    """
    if compare and estimator.config.loss.listwise:
        raise UserError(f"--compare: TRL has no loss of lists such as {estimator.config.loss.type}; leave it out")
    if largest and estimator.device.type == "cpu":
        raise UserError("--largest: it searches for what fits a GPU; leave out --cpu")
    with Screen(quiet=as_json) as screen:
        estimator.counted = lambda what: screen.wait(f"counting {what}")
        numbers = _numbers(estimator, screen)
        if estimator.device.type == "cuda":
            gpu = (Card.present() or Card.named(24.0)) if card is None else Card.named(card)
            numbers |= _gpus(estimator, gpu, screen)
            if largest:
                numbers["largest"] = _largest(estimator, gpu, screen)
        if compare:
            numbers |= _others(estimator, screen)
    if as_json:
        print(json.dumps(numbers, indent=2))


def _numbers(estimator: Estimator, screen: Screen) -> dict[str, Any]:
    least = estimator.take()
    config, microbatch = estimator.config, estimator.microbatch(estimator.config)
    for note in estimator.notes:
        screen.say(note)
    screen.say(_head(estimator, microbatch))
    screen.say(_table({_checkpointing(least): least}))
    if estimator.device.type == "cuda":
        screen.say(_process(least))
    return {
        "model": config.model.name,
        "loss": config.loss.type,
        "device": estimator.device.type,
        "quantised": estimator.quantised,
        "reference": summary(config),
        "notes": estimator.notes,
        "microbatch": {
            "examples": len(microbatch.examples), "tokens": microbatch.tokens, "source": microbatch.source
        },
        "step": _bytes(least),
    }  # fmt: skip


def _others(estimator: Estimator, screen: Screen) -> dict[str, Any]:
    ours, trl, unsloth = estimator.take(), estimator.take_as_trl(), estimator.take_as_unsloth()
    screen.say(_table({f"TRL {TRL}": trl, f"Unsloth {UNSLOTH}": unsloth, "fastpref": ours}))
    computed = [memory.activations + memory.head for memory in (ours, trl, unsloth)]
    screen.say(
        f"The others' steps are models of their sources' layout and head, with the same weights and optimizer and with "
        f"gradient checkpointing, their default; Unsloth's keeps the inputs of layers in host memory. fastpref / TRL: "
        f"{ours.total / trl.total:.2f} in all, {computed[0] / max(1, computed[1]):.2f} for activations and head alone. "
        f"fastpref / Unsloth: {ours.total / unsloth.total:.2f} and {computed[0] / max(1, computed[2]):.2f}."
    )
    return {"trl": _bytes(trl), "unsloth": _bytes(unsloth)}


def _gpus(estimator: Estimator, card: Card, screen: Screen) -> dict[str, Any]:
    least = estimator.take()
    most = estimator.take(layers=0) if estimator.checkpoints else least
    if most is not least:
        screen.say(f"{_checkpointing(most)}: {in_words(most.total)}")
    cards = [*map(Card.named, CARDS), card]
    missing = least.streamed or any(
        least.total > usable(gpu.size) or gpu.verdict(process(least)) is not Verdict.FITS for gpu in cards
    )
    stream = estimator.take_streamed() if missing else None
    *gpus, own = (fit(most, least, gpu, stream) for gpu in cards)
    if stream is not None:
        screen.say(_streaming(stream.least))
    screen.say("")
    for gpu in gpus:
        screen.say(_fit(gpu, most is not least, least.layers))
    numbers: dict[str, Any] = {
        "uncheckpointed": _bytes(most) if most is not least else None,
        "streamed": _bytes(stream.least) if stream is not None else None,
        "cards": [_card(gpu) for gpu in gpus],
        "card": card.size,
        "fit": _card(own),
        "changes": None,
    }
    if own.verdict is not Verdict.FITS:
        if own.card not in CARDS:
            screen.say(_fit(own, most is not least, least.layers))
        numbers["changes"] = _changes(estimator, card, own, screen)
    return numbers


def _changes(estimator: Estimator, card: Card, own: CardFit, screen: Screen) -> dict[str, Any] | None:
    change = proposal(estimator, card)
    sure = own.verdict is Verdict.UNCERTAIN
    if change.memory is None or not change.fits:
        none = "No known change makes that certain." if sure else "No known change makes it fit for certain."
        screen.say(f"{card.size:g} GB: {none} Take a smaller model.")
        return None
    words = " ".join(map(shlex.quote, change.overrides))
    host = f", and {in_words(change.memory.host)} of host memory" if change.memory.host else ""
    aim = "To be sure that it fits" if sure else "To fit"
    screen.say(f"{aim} {card.size:g} GB ({in_words(process(change.memory).likely)}{host}), add\n  {words}")
    return {"overrides": list(change.overrides)} | _bytes(change.memory)


def _largest(estimator: Estimator, card: Card, screen: Screen) -> dict[str, Any]:
    rows, microbatch = longest_rows(estimator, card), largest_microbatch(estimator, card)
    config, size = estimator.config, f"{card.size:g} GB"
    if rows is None:
        screen.say(f"\nNo row fits {size} for certain, however short.")
    else:
        limit = ", which is what the model was made for" if rows.limited else ""
        screen.say(
            f"\nThe longest rows that fit {size} for certain: {rows.amount:,} tokens{limit}, one {config.loss.unit} at "
            f"once ({in_words(process(rows.memory).likely)})\n  {' '.join(rows.overrides)}"
        )
    length = f"rows of {config.tokens.max_length:,} tokens"
    if microbatch is None:
        screen.say(f"Of {length} not even one {config.loss.unit} fits {size} for certain.")
    else:
        plural = "s" if microbatch.amount > 1 else ""
        limit = ", which is train.batch" if microbatch.limited else ""
        screen.say(
            f"The largest micro-batch of {length}: {microbatch.amount} {config.loss.unit}{plural}{limit} "
            f"({in_words(process(microbatch.memory).likely)})\n  {' '.join(microbatch.overrides)}"
        )
    return {"max_length": _found(rows), "microbatch": _found(microbatch)}


def _found(largest: Largest | None) -> dict[str, Any] | None:
    if largest is None:
        return None
    return {"amount": largest.amount, "overrides": list(largest.overrides)} | _bytes(largest.memory)


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
        f"{config.loss.title} on {config.model.name}{bits}, {training}, on {where}\n{told}"
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


def _process(memory: StepMemory) -> str:
    needed = process(memory)
    return (
        f"the process: about {in_words(needed.likely)}, from {in_words(needed.low)} to {in_words(needed.high)}; "
        f"{in_words(memory.gaps)} of it lie between the allocator's blocks (simulated)"
    )


def _fit(gpu: CardFit, decides: bool, layers: int) -> str:
    streamed = f" with {gpu.streamed} streamed layers, and {in_words(gpu.host)} of host memory" if gpu.streamed else ""
    if gpu.verdict is Verdict.DOES_NOT:
        verdict = "does not fit"
    elif gpu.verdict is Verdict.UNCERTAIN:
        how = streamed or (f" with gradient checkpointing of all {layers} layers" if decides else "")
        verdict = f"uncertain: may fit{how}"
    elif streamed or not decides:
        verdict = f"fits{streamed}"
    elif gpu.checkpointed == 0:
        verdict = "fits without gradient checkpointing"
    else:
        number = "all" if gpu.checkpointed == layers else f"about {gpu.checkpointed} of"
        verdict = f"fits with gradient checkpointing of {number} {layers} layers"
    return f"{gpu.card:>4g} GB  {verdict}"


def _card(gpu: CardFit) -> dict[str, Any]:
    return asdict(gpu) | {"fits": gpu.fits}


def _bytes(memory: StepMemory) -> dict[str, Any]:
    numbers = {"layers": memory.layers, "checkpointed": memory.checkpointed, "streamed": memory.streamed}
    sizes = {"total": memory.total, "host": memory.host, "copied": memory.copied}
    return numbers | {"bytes": memory.parts()} | sizes | {"process": asdict(process(memory))}
