"""Read every row of a source once: find mistakes and repetitions, and note what a user should know."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpref.data.rows.columns import MARGIN, WEIGHT
from fastpref.data.rows.content import Paired, Ranked, RowContent, RowError
from fastpref.data.source import Made, Source, remedy, row_error
from fastpref.errors import UserError


@dataclass
class Survey:
    """The usable rows of a source: their numbers, how many examples each makes, how many pairs it leaves out, the
    `share` of their prompts, and the range of the numbers in each column of numbers.
    """

    at: array = field(default_factory=lambda: array("q"))
    parts: array = field(default_factory=lambda: array("i"))
    tied: array = field(default_factory=lambda: array("i"))
    close: array = field(default_factory=lambda: array("i"))
    share: array = field(default_factory=lambda: array("d"))
    ranked: int = 0  # rows with a list of completions
    pairs: int = 0  # rows with a pair
    first: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # weight or margin → first row, range
    duplicates: int = 0  # rows left out because they repeat another
    left_out: int = 0  # rows left out because they are broken
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    without: dict[str, int] = field(default_factory=dict)  # weight or margin → the first row without it

    def add(self, at: int, made: Made, fraction: float) -> None:
        self.at.append(at)
        self.parts.append(len(made.contents))
        self.tied.append(made.tied)
        self.close.append(made.close)
        self.share.append(share(made.row.prompt) if fraction else 0.0)
        self.ranked += isinstance(made.row, Ranked)
        self.pairs += isinstance(made.row, Paired)
        for name in (WEIGHT, MARGIN):
            number = getattr(made.row, name, None)
            if number is None:
                self.without.setdefault(name, at)
            else:
                first, least, most = self.first.get(name, (at, number, number))
                self.first[name] = first, min(least, number), max(most, number)


def survey(source: Source, fraction: float, seen: set[bytes] | None) -> Survey:
    """Read every row of a source once. `seen` are the digests of rows that later ones must not repeat, or None.

    Raises UserError for a broken row if the source does not drop them, and if none can be used.
    """
    count = min(source.data.rows or len(source.records), len(source.records))
    kept = Survey(notes=[*source.records.notes, f"{source.name}: {count} rows of {source.form.name}"])
    notes = kept.notes
    dropped: dict[str, tuple[int, str]] = {}  # kind of mistake → how many, and the first of them
    remarks: dict[str, tuple[int, str]] = {}  # remark → the same for the rows that are used
    for at in range(count):
        try:
            made = source.read(at)
        except RowError as error:
            if source.data.on_error == "error":
                raise UserError(row_error(source, at, error) + remedy(error, after=len(kept.at))) from None
            many, first = dropped.get(error.kind, (0, ""))
            dropped[error.kind] = many + 1, first or row_error(source, at, error)
            continue
        if seen is not None and made.contents:
            digest = _digest(made.contents)
            if digest in seen:
                kept.duplicates += 1
                continue
            seen.add(digest)
        for remark in made.row.remarks:
            many, first = remarks.get(remark, (0, ""))
            remarks[remark] = many + 1, first or source.records.place(at)
        kept.add(at, made, fraction)
    if dropped:
        total = sum(many for many, _ in dropped.values())
        kinds = "; ".join(f"{many} {kind} (the first: {first})" for kind, (many, first) in dropped.items())
        if total == count:
            raise UserError(f"{source.data.path}: none of the {count} rows can be used: {kinds}")
        kept.left_out = total
        notes.append(f"{source.name}: {total} of {count} rows left out: {kinds}")
    notes += [
        f"{source.name}: {many} of {count} rows: {what} (the first: {first})" for what, (many, first) in remarks.items()
    ]
    if kept.duplicates:
        notes.append(f"{source.name}: {kept.duplicates} exact duplicates left out")
    notes += _notes_on_lists(source, kept) + _notes_on_numbers(source, kept)
    if source.loss.supervised:
        notes += _notes_on_imitation(source, kept)
    elif source.unpaired and 2 in kept.parts:
        pair = "the best and the worst completion of a row count" if kept.ranked else "each pair counts"
        notes.append(f"{source.name}: KTO takes single completions, so {pair} as one good and one bad completion")
    return kept


def _notes_on_imitation(source: Source, kept: Survey) -> list[str]:
    """Return notes on what supervised training takes of rows of another kind. Raises UserError if it takes nothing."""
    loss, bad = source.loss.type, sum(count == 0 for count in kept.parts)
    if bad and bad == len(kept.at):
        raise UserError(
            f"{source.data.path}: all {bad} rows are labelled false, and {loss} imitates those labelled true"
        )
    taken = {
        f"the chosen completion of {kept.pairs} pairs": kept.pairs,
        f"the best completion of {kept.ranked} lists": kept.ranked,
        f"the rows labelled true, and leaves out {bad} labelled false": bad,
    }
    return [f"{source.name}: {loss} takes {words}" for words, count in taken.items() if count]


def _notes_on_lists(source: Source, kept: Survey) -> list[str]:
    """Return a note on the pairs that are made of lists. Raises UserError if the keys for them have nothing to do."""
    data = source.data
    if kept.at and not kept.ranked and (data.pairs != "best-worst" or data.min_difference):
        key = "pairs" if data.pairs != "best-worst" else "min_difference"
        raise UserError(
            f"{data.path}: {key} makes pairs of rows with a list of scored completions, and no row has one; "
            f"remove data.{key}"
        )
    if not kept.ranked or source.unpaired or source.loss.listwise:
        return []
    made = f'{sum(kept.parts)} pairs of {len(kept.at)} rows (pairs = "{data.pairs}")'
    left = {"of equal scores": sum(kept.tied), f"of scores closer than {data.min_difference:g}": sum(kept.close)}
    lost = [f"{many} {words}" for words, many in left.items() if many]
    return [f"{source.name}: {made}" + (f"; {' and '.join(lost)} dropped" if lost else "")]


def _notes_on_numbers(source: Source, kept: Survey) -> list[str]:
    """Return notes on the weights and margins of the rows. Raises UserError if only some of the rows have them."""
    notes = []
    for name, (at, least, most) in kept.first.items():
        column = getattr(source.form, name)
        if name == MARGIN and source.loss.supervised:
            notes.append(
                f"{source.name}: the column {column} is that of pairs, and {source.loss.type} has no use for it"
            )
            continue
        if name in kept.without:
            raise UserError(
                f"{source.records.place(at)}: the row has a {name}, and {source.records.place(kept.without[name])} has "
                f"none; give every row of {source.data.path} one, or remove the column {column}"
            )
        use = "multiplies the loss" if name == WEIGHT else "sets the margin"
        notes.append(f"{source.name}: the column {column} {use} of each row, {least:g} to {most:g}")
    return notes


def _digest(contents: Iterable[RowContent]) -> bytes:
    """Hash the contents of a row: prompt, completions, label, scores, weight, margin, tools and keywords."""
    numbers = ("label", "scores", WEIGHT, MARGIN)
    values = [
        [c.prompt, c.by_name, [getattr(c, n, None) for n in numbers], c.writing.tools, c.writing.template_kwargs]
        for c in contents
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).digest()[:16]


def share(prompt: Any) -> float:
    """Return a number in [0, 1) from a hash of a prompt. Prompts whose number is below `eval.fraction` are held out."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def check_margins(surveys: Sequence[tuple[Source, Survey]]) -> None:
    """Raise UserError if some sources have margins and some have none, as their pairs share the batches."""
    places = {MARGIN in kept.first: source.name for source, kept in surveys if kept.at and source.loss.paired}
    if len(places) == 2:
        raise UserError(
            f"{places[True]} has margins and {places[False]} has none, and their pairs are compared in the same "
            f"batches; give every pair one, such as 0, or remove the column {MARGIN}"
        )
