"""One [[data]] source: open its records, find the format that reads them, and convert each row to what a loss takes."""

from dataclasses import dataclass, replace
from itertools import chain

from fastpref.config import DataConfig
from fastpref.config.losses import LossOptions
from fastpref.data.found import name_of
from fastpref.data.opening import open_records
from fastpref.data.records import Records
from fastpref.data.rows.auto import KNOWN, KNOWN_IMITATED, AutoFormat, detect
from fastpref.data.rows.columns import MISSING_COLUMN, column
from fastpref.data.rows.content import Paired, Ranked, RowContent, RowError, Unpaired, imitated, unpair
from fastpref.data.rows.formats import explained, find_format
from fastpref.data.rows.ranking import as_pair, make_pairs
from fastpref.data.rows.reading import Format
from fastpref.errors import UserError

LOOKED_AT = 100  # the format is detected in at most this many first rows
REMEDY = '; mend the row, or leave such rows out with on_error = "drop"'


@dataclass(frozen=True)
class Made:
    """What a row becomes: examples, and how many pairs of its completions were left out."""

    row: RowContent
    contents: tuple[RowContent, ...]
    tied: int = 0
    close: int = 0


@dataclass(frozen=True)
class Source:
    """Records, and the format that reads them."""

    data: DataConfig
    records: Records
    form: Format
    loss: LossOptions

    @property
    def name(self) -> str:
        return name_of(self.data)

    @property
    def unpaired(self) -> bool:
        """Whether the loss takes single completions."""
        return not self.loss.paired

    def read(self, at: int) -> Made:
        """Read a row and convert it to what the loss takes. Raises RowError if it does not fit, UserError if the loss
        has no use for such rows.
        """
        raw = self.records[at]
        content = self.form.read(raw)
        if self.loss.supervised:
            completion = imitated(content)
            return Made(content, () if completion is None else (completion,))
        if isinstance(content, Unpaired) and not self.unpaired:
            raise UserError(
                f"{self.records.place(at)}: this loss compares a chosen with a rejected completion, and there is only "
                f'one here (the columns are {", ".join(map(str, raw))}); use loss.type = "kto", or data with chosen '
                "and rejected"
            )
        if isinstance(content, Unpaired) and content.label is None:
            column(raw, self.form.label)  # which raises RowError, because it is not there
        if isinstance(content, Paired) and content.margin is not None and self.loss.unit != "pair":
            raise UserError(
                f"{self.records.place(at)}: the row has a margin, which is one of a pair, and {self.loss.type} takes "
                f"{self.loss.unit}s; remove or rename the column {self.form.margin}, or use a loss of pairs"
            )
        made = Made(content, (content,))
        if isinstance(content, Ranked) and not self.loss.listwise:
            pairs = make_pairs(content.scores, self.data.pairs, self.data.min_difference)
            made = Made(content, tuple(as_pair(content, *pair) for pair in pairs.of), pairs.tied, pairs.close)
        if not self.unpaired:
            return made
        singles = (unpair(part) if isinstance(part, Paired) else (part,) for part in made.contents)
        return replace(made, contents=tuple(chain.from_iterable(singles)))


def open_source(data: DataConfig, loss: LossOptions) -> Source:
    """Open a source for a loss. Raises UserError if it cannot be read, or has no rows of a known format."""
    return find_source(data, open_records(data), loss)


def find_source(data: DataConfig, records: Records, loss: LossOptions) -> Source:
    """Return the source of records that are open. Raises UserError if they have no rows of a known format."""
    try:
        form = find_format(data.format, unpaired=not loss.paired, supervised=loss.supervised, chat=data.chat)
        form = form or _detected(records, data, loss)
    except ValueError as error:
        raise UserError(f"{data.path}: format: {error}") from None
    return Source(data, records, form, loss)


def _detected(records: Records, data: DataConfig, loss: LossOptions) -> Format:
    """Return the format of the first chat among the first rows, or else of the first row with a known format.

    Raises UserError if no row has a known format.
    """
    broken: RowError | None = None
    columns: dict[str, None] = {}
    form: AutoFormat | None = None
    for at in range(min(LOOKED_AT, data.rows or len(records), len(records))):
        try:
            row = records[at]
            own = detect(row, supervised=loss.supervised, chat=data.chat)
        except RowError as error:
            if form is None and data.on_error == "error":
                raise UserError(_at(records, at, error) + REMEDY) from None
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
    known = f"{KNOWN}; {KNOWN_IMITATED}" if loss.supervised else KNOWN
    message = f"{data.path}: the columns {', '.join(columns)} are of no format that auto knows, which are {known}"
    if not loss.supervised and _has_completions(records):
        message += '; single completions without a label, as these are, are read by loss.type = "sft"'
    raise UserError(explained(message, columns, unpaired=not loss.paired, supervised=loss.supervised))


def _has_completions(records: Records) -> bool:
    """Return whether supervised training could read the first row."""
    try:
        return detect(records[0], supervised=True) is not None
    except RowError:
        return False


def row_error(source: Source, at: int, error: RowError) -> str:
    """Return the message about a mistake in a row, with its place and, of a missing column, the formats that fit."""
    message = _at(source.records, at, error)
    if error.kind != MISSING_COLUMN:
        return message
    auto = not isinstance(source.form, AutoFormat)
    supervised = source.loss.supervised
    return explained(message, source.records[at], unpaired=source.unpaired, supervised=supervised, auto=auto)


def remedy(error: RowError, *, after: int) -> str:
    """Return what to do about a mistake in a row that `after` good ones come before, as the end of its message.

    The format is the mistake if the first row has not its columns.
    """
    if error.kind != MISSING_COLUMN:
        return REMEDY
    return '; rows without it are left out with on_error = "drop"' if after else ""


def _at(records: Records, at: int, error: RowError | None) -> str:
    return f"{records.place(at)}: {error}"
