"""Read the rows of a config, convert them to what its loss takes, repeat them by weight, and split them.

A row is converted each time it is read; memory holds only its place.
"""

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from fastpref.config import Config, DataConfig
from fastpref.data.records import Records
from fastpref.data.rows.auto import AutoFormat
from fastpref.data.rows.content import Content, RowContent, RowError
from fastpref.data.rows.parts import text_of
from fastpref.data.rows.reading import Format
from fastpref.data.source import LOOKED_AT, Source, open_source
from fastpref.data.survey import Survey, check_margins, survey
from fastpref.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """The place of a row in its source. As text it is `file:line`, or `file, row N` counted from 0."""

    records: Records
    at: int

    def __str__(self) -> str:
        return self.records.place(self.at)


@dataclass(frozen=True)
class SourceRow:
    """A row, converted to a pair, a single completion or a list of them, with its place for messages."""

    content: RowContent
    place: str | Place
    droppable: bool = False
    """Whether a mistake found later drops the row (on_error = "drop") instead of raising an error."""

    @property
    def question(self) -> str:
        """The text of the prompt, or of its last turn."""
        prompt = self.content.prompt
        return prompt if isinstance(prompt, str) else text_of(prompt[-1])


class Rows(Sequence[SourceRow]):
    """Rows of one or several sources, converted each time they are read."""

    def __init__(self, sources: Sequence[Source] = ()):
        self.sources = tuple(sources)
        self._source, self._at, self._part = array("i"), array("q"), array("i")
        self.tied, self.close = 0, 0  # pairs that their rows leave out
        self._last: tuple[tuple[int, int], tuple[RowContent, ...]] | None = None  # a row makes several examples

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
        key = self._source[index], self._at[index]
        source, at = self.sources[key[0]], key[1]
        if self._last is None or self._last[0] != key:
            self._last = key, source.read(at).contents
        content = self._last[1][self._part[index]]
        return SourceRow(content, Place(source.records, at), source.data.on_error == "drop")


@dataclass
class Prepared:
    train: Rows = field(default_factory=Rows)
    heldout: Rows = field(default_factory=Rows)
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    duplicates: int = 0  # rows left out because they repeat another
    left_out: int = 0  # rows left out because they are broken


def prepare(config: Config) -> Prepared:
    """Open the training and held-out rows of a config, as the pairs or single completions that its loss needs.

    Every row is read once, so that mistakes are found here. Raises UserError, naming the file, the columns or the row.
    """
    prepared, fraction = Prepared(), config.eval.fraction
    train, heldout = _gather(config.data, config, prepared, fraction or 0.0)
    if fraction is None:
        heldout, _ = _gather(config.eval.data, config, prepared, 0.0)
    elif bool(heldout) != bool(train):
        raise UserError(
            f"eval.fraction holds prompts out, and all {len(train)} rows have the same one; name other rows to "
            "evaluate on, [[eval.data]], or leave eval.fraction out"
        )
    prepared.train, prepared.heldout = train, heldout
    return prepared


def notes_on_text(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return notes on sources whose rows are plain text although the model has a chat template and nobody decided."""
    if not tokenizer.chat_template:
        return []
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {str(tokenizer.eos_token)}
    notes: dict[str, None] = {}
    for table, rows in (("[[data]]", prepared.train), ("[[eval.data]]", prepared.heldout)):
        for source in rows.sources:
            prompt = _first_prompt(source)
            if source.data.chat != "auto" or not _leaves_text(source.form) or not isinstance(prompt, str):
                continue
            if any(token in prompt for token in special):  # the rows contain the turn markers already
                continue
            words = f"{source.name}: these rows are plain text, which the model's chat template does not write"
            if not any(note.startswith(words) for note in notes):
                notes[f"{words}; to train chats, set chat = true under {table} (false: the text is meant as it is)"] = (
                    None
                )
    return list(notes)


def _leaves_text(form: Format) -> bool:
    """Return whether a format leaves text as it is without having been told to."""
    if isinstance(form, AutoFormat):
        return not form.chat
    return form.whole_row or form.plain


def _first_prompt(source: Source) -> Content | None:
    for at in range(min(LOOKED_AT, len(source.records))):
        try:
            return source.read(at).row.prompt
        except RowError:
            continue
    return None


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
    opened = [open_source(data, config.loss) for data in sources]
    train, heldout = Rows(opened), Rows(opened)
    seen: set[bytes] | None = set() if config.tokens.duplicates == "drop" else None
    surveys: list[tuple[Survey, array[int]]] = []  # usable rows, and the indices that the weight selects
    for source in opened:
        kept = survey(source, fraction, seen)
        prepared.notes += kept.notes
        prepared.duplicates += kept.duplicates
        prepared.left_out += kept.left_out
        used = array("q", repeats(len(kept.at), source.data.weight))
        surveys.append((kept, used))
        if source.data.weight != 1:
            if not used:
                raise UserError(f"{source.data.path}: weight {source.data.weight:g} leaves no row; choose a larger one")
            many = sum(kept.parts[i] for i in used)
            prepared.notes.append(
                f"{source.name}: weight {source.data.weight:g} makes {many} rows of {sum(kept.parts)}"
            )
    check_margins([(source, kept) for source, (kept, _) in zip(opened, surveys)])
    shares = [kept.share[i] for kept, used in surveys for i in used if kept.parts[i]]
    bound = _bound(shares, fraction) if fraction else 0.0
    for number, (kept, used) in enumerate(surveys):
        for i in used:
            rows = heldout if kept.share[i] < bound else train
            for part in range(kept.parts[i]):
                rows.add(number, kept.at[i], part)
            rows.tied += kept.tied[i]
            rows.close += kept.close[i]
    if bound != fraction and train and heldout:
        prepared.notes.append(
            f"eval.fraction = {fraction} goes by hashes of the prompts, and these are few: each side "
            f"gets one at least, {len(train)} rows to train on, {len(heldout)} to evaluate on"
        )
    return train, heldout
