"""Where rows come from: files and hub data sets, read, put into one form, and split."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from fastpref.config import Config, DataConfig
from fastpref.data.formats import Format, Paired, Unpaired, detect, unpair
from fastpref.errors import UserError

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXT = ("prompt", "chosen", "rejected", "completion")
# Of the readers of `datasets`. In the text columns of a CSV file "None" and "42" are words like any other.
_OPTIONS: dict[str, Any] = {"csv": {"converters": dict.fromkeys(_TEXT, str), "keep_default_na": False}}


@dataclass(frozen=True)
class SourceRow:
    """A row in the form its method needs, and its place for messages: `file, row 12` (counted from 0)."""

    content: Paired | Unpaired
    place: str

    @property
    def question(self) -> str:
        """The prompt as a person would ask it: its text, or its last turn."""
        prompt = self.content.prompt
        return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


@dataclass(frozen=True)
class Prepared:
    train: list[SourceRow]
    heldout: list[SourceRow]
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each


def prepare(config: Config) -> Prepared:
    """Read the training and the held-out rows of a config, paired or unpaired as its loss needs them.

    Raises UserError, naming the file, the columns or the row.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read, our message says
    notes: list[str] = []
    unpaired = config.loss.type == "kto"
    train = [row for data in config.data for row in _read(data, unpaired, notes)]
    heldout = [row for data in config.eval.data for row in _read(data, unpaired, notes)]
    if config.eval.fraction is not None:
        train, heldout = split_by_prompt(train, config.eval.fraction)
        if not heldout or not train:
            raise UserError(
                f"eval.fraction = {config.eval.fraction} leaves {len(train)} rows to train on and {len(heldout)} to "
                "evaluate on; choose another fraction, or more data"
            )
    return Prepared(train, heldout, notes)


def split_by_prompt(rows: Iterable[SourceRow], fraction: float) -> tuple[list[SourceRow], list[SourceRow]]:
    """Hold out about `fraction` of the prompts, chosen by a hash: a prompt is never on both sides."""
    train, heldout = [], []
    for row in rows:
        digest = hashlib.sha256(json.dumps(row.content.prompt, sort_keys=True, default=str).encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (heldout if share < fraction else train).append(row)
    return train, heldout


def _read(data: DataConfig, unpaired: bool, notes: list[str]) -> list[SourceRow]:
    table = _load(data)
    if data.rows is not None:
        table = table.select(range(min(data.rows, len(table))))
    if not len(table):
        raise UserError(f"{data.path}: there are no rows")
    form = _detect(table, data)
    notes.append(f"{_short(data)}: {len(table)} rows of {form.name}")
    rows = [
        row for at, raw in enumerate(table) for row in _convert(raw, f"{data.path}, row {at}", form, unpaired, table)
    ]
    if len(rows) > len(table):
        notes.append(
            f"{_short(data)}: KTO takes single responses, so each pair counts as one good and one bad response"
        )
    return rows


def _convert(raw: Any, place: str, form: Format, unpaired: bool, table: datasets.Dataset) -> list[SourceRow]:
    try:
        content = form.read(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: {error}") from None
    if isinstance(content, Paired) and unpaired:
        return [SourceRow(half, place) for half in unpair(content)]
    if isinstance(content, Unpaired) and not unpaired:
        raise UserError(
            f"{place}: this loss compares a chosen with a rejected response, and there is only one here (the columns "
            f'are {", ".join(table.column_names)}); use loss.type = "kto", or data with chosen and rejected'
        )
    return [SourceRow(content, place)]


def _detect(table: datasets.Dataset, data: DataConfig) -> Format:
    first = table[0]
    form = detect(first)
    if form is None:
        raise UserError(
            f"{data.path}: the columns {', '.join(table.column_names)} are of no known format; known are prompt, "
            "chosen and rejected; chosen and rejected conversations; conversations, chosen and rejected; prompt, "
            "completion and label; messages and label"
        )
    return form


def _load(data: DataConfig) -> datasets.Dataset:
    try:
        path = Path(data.path).expanduser()
    except RuntimeError:  # ~name, and nobody of that name
        raise UserError(f"{data.path}: there is no such file") from None
    if path.is_dir():
        raise UserError(f"{data.path}: this is a folder; name a .json, .jsonl, .parquet or .csv file in it")
    if not path.is_file():
        if path.suffix in _LOADERS or data.path.startswith(("/", ".", "~")):
            raise UserError(f"{data.path}: there is no such file")
        return _load_from_hub(data)
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise UserError(f"{data.path}: files of kind {path.suffix!r} are not read; known are {', '.join(_LOADERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{data.path}: the file is empty")
    try:
        loaded = datasets.load_dataset(loader, data_files=str(path), split="train", **_OPTIONS.get(loader, {}))
    except Exception as error:  # datasets raises whatever its reader raises
        if "corresponds to no data" in str(error):
            raise UserError(f"{data.path}: there are no rows") from None
        raise UserError(f"{data.path}: cannot be read as {loader}: {_cause(error)}") from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _load_from_hub(data: DataConfig) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(data.path, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub, the network, the split, the configuration: each has its own kind
        raise UserError(
            f"{data.path}: neither a file here nor a data set that the hub gives us: {_cause(error)}"
        ) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _cause(error: BaseException) -> str:
    """The innermost reason, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _short(data: DataConfig) -> str:
    return Path(data.path).name
