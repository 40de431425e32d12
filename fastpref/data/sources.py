"""Read the rows of a config, convert them to pairs or single responses, repeat them by weight, and split them.

A row is converted each time it is read; memory holds only its place.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fastpref.config import Config, DataConfig
from fastpref.data.opening import open_records
from fastpref.data.records import Records
from fastpref.data.rows.auto import KNOWN, AutoFormat, detect
from fastpref.data.rows.columns import MISSING_COLUMN
from fastpref.data.rows.content import Paired, RowError, Unpaired, unpair
from fastpref.data.rows.formats import explained, find_format
from fastpref.data.rows.parts import text_of
from fastpref.data.rows.reading import Format
from fastpref.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = '; mend the row, or leave such rows out with on_error = "drop"'
_LOOKED_AT = 100  # the format is detected in at most this many first rows


@dataclass(frozen=True)
class Place:
    """The place of a row in its source. As text it is `file:line`, or `file, row N` counted from 0."""

    records: Records
    at: int

    def __str__(self) -> str:
        return self.records.place(self.at)


@dataclass(frozen=True)
class SourceRow:
    """A row, converted to a pair or a single response, with its place for messages."""

    content: Paired | Unpaired
    place: str | Place
    droppable: bool = False
    """Whether a mistake found later drops the row (on_error = "drop") instead of raising an error."""

    @property
    def question(self) -> str:
        """The text of the prompt, or of its last turn."""
        prompt = self.content.prompt
        return prompt if isinstance(prompt, str) else text_of(prompt[-1])


@dataclass(frozen=True)
class Source:
    """Records, and the format that reads them."""

    data: DataConfig
    records: Records
    form: Format
    unpaired: bool  # whether the method takes single responses

    @property
    def name(self) -> str:
        return Path(self.data.path).name

    def contents(self, at: int) -> tuple[Paired | Unpaired, ...]:
        """Read a row: one content, or for KTO the two responses of a pair. Raises RowError if it does not fit."""
        raw = self.records[at]
        content = self.form.read(raw)
        if isinstance(content, Paired) and self.unpaired:
            return unpair(content)
        if isinstance(content, Unpaired) and not self.unpaired:
            raise UserError(
                f"{self.records.place(at)}: this loss compares a chosen with a rejected response, and there is only "
                f'one here (the columns are {", ".join(map(str, raw))}); use loss.type = "kto", or data with chosen '
                "and rejected"
            )
        return (content,)


class Rows(Sequence[SourceRow]):
    """Rows of one or several sources, converted each time they are read."""

    def __init__(self, sources: Sequence[Source] = ()):
        self.sources = tuple(sources)
        self._source, self._at, self._part = array("i"), array("q"), array("b")

    def add(self, source: int, at: int, part: int) -> None:
        self._source.append(source)
        self._at.append(at)
        self._part.append(part)

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> SourceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceRow]: ...
    def __getitem__(self, index: int | slice) -> SourceRow | list[SourceRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, at = self.sources[self._source[index]], self._at[index]
        content = source.contents(at)[self._part[index]]
        return SourceRow(content, Place(source.records, at), source.data.on_error == "drop")


@dataclass
class Prepared:
    train: Rows = field(default_factory=Rows)
    heldout: Rows = field(default_factory=Rows)
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    duplicates: int = 0  # rows left out because they repeat another
    left_out: int = 0  # rows left out because they are broken


def prepare(config: Config) -> Prepared:
    """Open the training and held-out rows of a config, as the pairs or single responses that its loss needs.

    Every row is read once, so that mistakes are found here. Raises UserError, naming the file, the columns or the row.
    """
    prepared, fraction = Prepared(), config.eval.fraction
    train, heldout = _gather(config.data, config, prepared, fraction or 0.0)
    if fraction is None:
        heldout, _ = _gather(config.eval.data, config, prepared, 0.0)
    elif not heldout or not train:
        raise UserError(
            f"eval.fraction holds prompts out, and all {len(train)} rows have the same one; name other rows to "
            "evaluate on, [[eval.data]], or leave eval.fraction out"
        )
    prepared.train, prepared.heldout = train, heldout
    return prepared


def notes_on_text(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return notes on sources that `auto` reads as plain text although the model has a chat template."""
    if not tokenizer.chat_template:
        return []
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {str(tokenizer.eos_token)}
    notes = []
    for source in prepared.train.sources:
        form = source.form
        if not isinstance(form, AutoFormat) or form.chat:
            continue
        if any(token in _first_prompt(source) for token in special):  # the rows contain the turn markers already
            continue
        field = "field_prompt" if "completion" in form.name else "field_messages"
        notes.append(
            f"{source.name}: these rows are plain text, and the model has a chat template, which does not write them; "
            f'to train chats, set format = {{ type = "chat_template.default", {field} = "prompt" }}'
        )
    return notes


def _first_prompt(source: Source) -> str:
    for at in range(min(_LOOKED_AT, len(source.records))):
        try:
            return str(source.contents(at)[0].prompt)
        except RowError:
            continue
    return ""


def share(prompt: Any) -> float:
    """Return a number in [0, 1) from a hash of a prompt. Prompts whose number is below `eval.fraction` are held out."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def repeats(count: int, weight: float) -> Iterable[int]:
    """Yield the indices that a weight selects of `count` rows: all ⌊weight⌋ times, then some chosen by their hash.

    The rows chosen for a smaller fraction are among those chosen for a larger one. Rows keep their order.
    """
    whole = math.floor(weight)
    for _ in range(whole):
        yield from range(count)
    extra = round((weight - whole) * count)
    if extra:
        yield from sorted(sorted(range(count), key=lambda at: hashlib.sha256(str(at).encode()).digest())[:extra])


def _bound(shares: Sequence[float], fraction: float) -> float:
    """Return `fraction`, moved so that both sides of the split have a prompt if there are two different ones."""
    if not shares:
        return fraction
    return min(max(fraction, math.nextafter(min(shares), 1.0)), max(shares))


def _gather(sources: Sequence[DataConfig], config: Config, prepared: Prepared, fraction: float) -> tuple[Rows, Rows]:
    """Read the rows of several sources one after another. Returns training rows and, by `fraction`, held-out rows."""
    opened = [_source(data, not config.loss.paired) for data in sources]
    train, heldout = Rows(opened), Rows(opened)
    seen: set[bytes] | None = set() if config.tokens.duplicates == "drop" else None
    surveys: list[tuple[_Kept, array[int]]] = []  # usable rows, and the indices that the weight selects
    for source in opened:
        kept = _survey(source, fraction, seen, prepared)
        used = array("q", repeats(len(kept.at), source.data.weight))
        surveys.append((kept, used))
        if source.data.weight != 1:
            if not used:
                raise UserError(f"{source.data.path}: weight {source.data.weight:g} leaves no row; choose a larger one")
            many = sum(kept.parts[i] for i in used)
            prepared.notes.append(
                f"{source.name}: weight {source.data.weight:g} makes {many} rows of {sum(kept.parts)}"
            )
    bound = _bound([kept.share[i] for kept, used in surveys for i in used], fraction) if fraction else 0.0
    for number, (kept, used) in enumerate(surveys):
        for i in used:
            rows = heldout if kept.share[i] < bound else train
            for part in range(kept.parts[i]):
                rows.add(number, kept.at[i], part)
    if bound != fraction and train and heldout:
        prepared.notes.append(
            f"eval.fraction = {fraction} goes by hashes of the prompts, and these are few: each side "
            f"gets one at least, {len(train)} rows to train on, {len(heldout)} to evaluate on"
        )
    return train, heldout


def _source(data: DataConfig, unpaired: bool) -> Source:
    records = open_records(data)
    try:
        form = find_format(data.format, unpaired=unpaired) or _detected(records, data, unpaired)
    except ValueError as error:
        raise UserError(f"{data.path}: format: {error}") from None
    return Source(data, records, form, unpaired)


def _detected(records: Records, data: DataConfig, unpaired: bool) -> Format:
    """Return the format of the first chat among the first rows, or else of the first row with a known format.

    Raises UserError if no row has a known format.
    """
    broken: RowError | None = None
    columns: dict[str, None] = {}
    form: AutoFormat | None = None
    for at in range(min(_LOOKED_AT, data.rows or len(records), len(records))):
        try:
            row = records[at]
            own = detect(row)
        except RowError as error:
            if form is None and data.on_error == "error":
                raise UserError(_at(records, at, error) + _REMEDY) from None
            broken = broken or error
            continue
        columns |= dict.fromkeys(map(str, row))
        if own and (form is None or own.chat):
            form = own
        if form and form.chat:
            return form
    if form:
        return form
    if not columns:
        raise UserError(f"{data.path}: no row can be read; the first: {_at(records, 0, broken)}")
    raise UserError(
        explained(
            f"{data.path}: the columns {', '.join(columns)} are of no format that auto knows, which are {KNOWN}",
            columns,
            unpaired=unpaired,
        )
    )


@dataclass
class _Kept:
    """The usable rows of a source: their numbers, how many examples each makes, and the `share` of their prompts."""

    at: array = field(default_factory=lambda: array("q"))
    parts: array = field(default_factory=lambda: array("b"))
    share: array = field(default_factory=lambda: array("d"))


def _survey(source: Source, fraction: float, seen: set[bytes] | None, prepared: Prepared) -> _Kept:
    """Read every row of a source once. Returns the usable rows, and adds notes and counts to `prepared`."""
    count = min(source.data.rows or len(source.records), len(source.records))
    notes = prepared.notes
    notes.append(f"{source.name}: {count} rows of {source.form.name}")
    kept, duplicates = _Kept(), 0
    dropped: dict[str, tuple[int, str]] = {}  # kind of mistake → how many, and the first of them
    remarks: dict[str, tuple[int, str]] = {}  # remark → the same for the rows that are used
    for at in range(count):
        try:
            contents = source.contents(at)
        except RowError as error:
            if source.data.on_error == "error":
                remedy = "" if error.kind == MISSING_COLUMN else _REMEDY
                raise UserError(_row_error(source, at, error) + remedy) from None
            many, first = dropped.get(error.kind, (0, ""))
            dropped[error.kind] = many + 1, first or _row_error(source, at, error)
            continue
        if seen is not None:
            digest = _digest(contents)
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
        for remark in contents[0].remarks:
            many, first = remarks.get(remark, (0, ""))
            remarks[remark] = many + 1, first or source.records.place(at)
        kept.at.append(at)
        kept.parts.append(len(contents))
        kept.share.append(share(contents[0].prompt) if fraction else 0.0)
    if dropped:
        total = sum(many for many, _ in dropped.values())
        kinds = "; ".join(f"{many} {kind} (the first: {first})" for kind, (many, first) in dropped.items())
        if total == count:
            raise UserError(f"{source.data.path}: none of the {count} rows can be used: {kinds}")
        prepared.left_out += total
        notes.append(f"{source.name}: {total} of {count} rows left out: {kinds}")
    notes += [
        f"{source.name}: {many} of {count} rows: {what} (the first: {first})" for what, (many, first) in remarks.items()
    ]
    prepared.duplicates += duplicates
    if duplicates:
        notes.append(f"{source.name}: {duplicates} exact duplicates left out")
    if 2 in kept.parts:
        notes.append(f"{source.name}: KTO takes single responses, so each pair counts as one good and one bad response")
    return kept


def _row_error(source: Source, at: int, error: RowError) -> str:
    message = _at(source.records, at, error)
    if error.kind != MISSING_COLUMN:
        return message
    auto = not isinstance(source.form, AutoFormat)
    return explained(message, source.records[at], unpaired=source.unpaired, auto=auto)


def _at(records: Records, at: int, error: RowError | None) -> str:
    return f"{records.place(at)}: {error}"


def _digest(contents: Iterable[Paired | Unpaired]) -> bytes:
    """Hash the contents of a row: prompt, responses, label, tools and keywords."""
    values = [
        [c.prompt, c.responses, getattr(c, "label", None), c.writing.tools, c.writing.template_kwargs] for c in contents
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).digest()[:16]
