"""Rows that a program has in memory: written to the disk once, where a config can name them.

    $FASTPREF_CACHE (~/.cache/fastpref) / rows / NAME-HASH / the files of save_to_disk

The hash is one of the contents, so equal rows have one folder, and a run that is resumed, evaluated or started again
finds the rows that it was trained on. `datasets` is not imported here: where nothing has imported it, there is no
Dataset.
"""

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from filelock import FileLock

from fastpref.atomic import WriteError, write_folder
from fastpref.config import DataConfig
from fastpref.data.cache import cache_folder
from fastpref.errors import UserError

if TYPE_CHECKING:
    import datasets

_BLOCK = 1000  # rows that are hashed at once
_REMEDIES = {
    "DatasetDict": "name one of its splits, such as splits['train']",
    "IterableDataset": "its rows have no number; load it without streaming=True, or make a Dataset of it with "
    "datasets.Dataset.from_generator",
    "IterableDatasetDict": "name one of its splits, and load it without streaming=True",
    "DataFrame": "make a Dataset of it with datasets.Dataset.from_pandas",
}


def sources(given: Any, argument: str) -> list[Any]:
    """Return the tables of [[data]] for what a program gives in their place.

    That is a `datasets.Dataset`, a path or a name on the hub, a table with one of these as its path, or a list of
    these. A Dataset is written to the cache folder. `argument` names the place in messages. Raises UserError.
    """
    entries = given if isinstance(given, list | tuple) else [given]
    return [_source(entry, f"{argument}[{at}]" if entries is given else argument) for at, entry in enumerate(entries)]


def is_dataset(value: Any) -> "TypeGuard[datasets.Dataset]":
    """Return whether a value is a `datasets.Dataset`."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(value, library.Dataset)


def _source(entry: Any, argument: str) -> Any:
    if isinstance(entry, DataConfig):
        return entry.model_dump(exclude_unset=True)
    if not isinstance(entry, Mapping) or _remedy(entry):
        return {"path": _path(entry, argument)}
    if "path" not in entry and {"prompt", "chosen", "completion", "messages"} & entry.keys():
        raise UserError(
            f"{argument}: this is a row, not a table with a path; make a Dataset of the rows with "
            "datasets.Dataset.from_list"
        )
    return {**entry, "path": _path(entry["path"], f"{argument}.path")} if "path" in entry else dict(entry)


def _path(given: Any, argument: str) -> str:
    if is_dataset(given):
        return str(keep(given, argument))
    if isinstance(given, str | Path):
        try:
            path = Path(given).expanduser()
            return str(path.resolve()) if path.exists() else str(given)
        except (OSError, RuntimeError):  # ~name of a user who does not exist
            return str(given)
    remedy = _remedy(given)
    raise UserError(
        f"{argument}: takes a datasets.Dataset, a path or a name on the hub, got {type(given).__name__}"
        + (f": {remedy}" if remedy else "")
    )


def _remedy(given: Any) -> str | None:
    """Return how to make a Dataset of a value of a kind that is often taken for one, or None."""
    return next((_REMEDIES[kind.__name__] for kind in type(given).__mro__ if kind.__name__ in _REMEDIES), None)


def keep(rows: "datasets.Dataset", argument: str) -> Path:
    """Write a Dataset to the cache folder unless it is there, and return its folder. Raises UserError."""
    if rows.format["type"] == "custom":
        raise UserError(
            f"{argument}: the Dataset has a transform (with_transform or set_transform), which is no part of its rows; "
            "apply it with Dataset.map, or remove it with with_format(None)"
        )
    if not len(rows):
        raise UserError(f"{argument}: the Dataset has no rows")
    rows = rows.with_format(None)
    name = re.sub(r"\W+", "-", "-".join(str(word) for word in (rows.info.dataset_name or "rows", rows.split) if word))
    place = cache_folder() / "rows" / f"{name}-{_digest(rows)[:16]}"
    sys.modules["datasets"].disable_progress_bars()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):  # other processes of the run write the same rows
            if not place.exists():
                write_folder(place, lambda folder: rows.save_to_disk(str(folder)))
    except (OSError, WriteError, NotImplementedError) as error:
        raise UserError(
            f"{argument}: the Dataset's rows cannot be written to {place.parent}, where the run's config would name "
            f"them: {error}; set FASTPREF_CACHE to a folder that can be written to"
        ) from None
    return place.resolve()


def _digest(rows: "datasets.Dataset") -> str:
    """Return a hash of the columns, their types and all values, in the order of the rows."""
    digest, tables = hashlib.sha256(), rows.with_format("arrow")
    for start in range(0, len(rows), _BLOCK):
        table: Any = tables[start : start + _BLOCK]
        table = table.combine_chunks().replace_schema_metadata(None)
        if not start:
            digest.update(table.schema.serialize())
        for batch in table.to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
