"""Rows that a program has in memory are written where a config can name them, once for each contents."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastpref.config import DataConfig
from fastpref.data.cache import cache_folder
from fastpref.data.given import keep, sources
from fastpref.data.opening import open_records
from fastpref.errors import UserError

ROWS: dict[str, list[Any]] = {
    "prompt": ["one", "two", "three"], "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "weight": [1, None, 2],
}  # fmt: skip
MADE = datasets.Dataset.from_dict(ROWS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))


def read(place: str | Path) -> list[dict[str, Any]]:
    records = open_records(DataConfig(path=str(place)))
    return [records[at] for at in range(len(records))]


SAME: dict[str, Callable[[], datasets.Dataset]] = {
    "made again": lambda: datasets.Dataset.from_dict(ROWS),
    "in two parts": lambda: datasets.concatenate_datasets([MADE.select([0]), MADE.select([1, 2])]),
    "put back in order": lambda: MADE.select([2, 1, 0]).select([2, 1, 0]),
    "read as arrays": lambda: MADE.with_format("numpy"),
    "mapped": lambda: MADE.map(lambda row: row),
    "with another description": lambda: datasets.Dataset.from_dict(ROWS, info=datasets.DatasetInfo(description="d")),
}
OTHERS: dict[str, Callable[[], datasets.Dataset]] = {
    "another order": lambda: MADE.select([1, 0, 2]),
    "fewer rows": lambda: MADE.select([0, 1]),
    "another name": lambda: MADE.rename_column("weight", "margin"),
    "another type": lambda: MADE.cast_column("weight", datasets.Value("float64")),
    "another value": lambda: datasets.Dataset.from_dict(ROWS | {"weight": [1, 0, 2]}),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_rows_have_one_place(name: str):
    """Rows of the same columns, types and values are written once, whatever made them, and are read back as given."""
    place = keep(MADE, "data")
    assert keep(SAME[name](), "data") == place
    assert read(place) == MADE.to_list()
    assert [path.name for path in (cache_folder() / "rows").iterdir() if path.is_dir()] == [place.name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_rows_have_another_place(name: str):
    other = keep(OTHERS[name](), "data")
    assert other != keep(MADE, "data")
    assert read(other) == OTHERS[name]().to_list()


def test_rows_that_cannot_be_written_leave_nothing(monkeypatch: pytest.MonkeyPatch):
    """A disk that is full is one message that names the folder, and a later call writes everything."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", full)
        with pytest.raises(UserError, match=r"^data: .* cannot be written to .*No space left.*FASTPREF_CACHE"):
            keep(MADE, "data")
    assert [path for path in (cache_folder() / "rows").iterdir() if path.is_dir()] == []
    assert read(keep(MADE, "data")) == MADE.to_list()


def test_a_list_mixes_all_kinds(elsewhere: Path):
    """Datasets, paths, names on the hub and tables stand beside each other; paths that exist become absolute."""
    Path("pairs.jsonl").write_text("{}\n")
    made = str(keep(MADE, "data"))
    table = {"path": MADE, "weight": 2.0}
    assert sources([MADE, "pairs.jsonl", Path("pairs.jsonl"), "me/pairs", table], "data") == [
        {"path": made}, {"path": str(elsewhere / "pairs.jsonl")}, {"path": str(elsewhere / "pairs.jsonl")},
        {"path": "me/pairs"}, {"path": made, "weight": 2.0},
    ]  # fmt: skip
    assert sources(table, "data") == [{"path": made, "weight": 2.0}]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "splits": (lambda: datasets.DatasetDict({"train": MADE}), r"got DatasetDict: name one of its splits"),
    "stream": (lambda: MADE.to_iterable_dataset(), r"got IterableDataset: its rows have no number"),
    "frame": (lambda: MADE.to_pandas(), r"got DataFrame: .*from_pandas"),
    "rows": (lambda: MADE.to_list(), r"data\[0\]: this is a row.*from_list"),
    "transform": (lambda: MADE.with_transform(lambda batch: batch), r"data: the Dataset has a transform"),
    "none": (lambda: MADE.select([]), r"data: the Dataset has no rows"),
    "number": (lambda: [MADE, 3], r"data\[1\]: takes a datasets.Dataset, a path or a name on the hub, got int"),
    "inside": (lambda: {"path": datasets.DatasetDict({"train": MADE})}, r"data.path: .*name one of its splits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_rows_are_refused(name: str):
    """The message says where, what was given, and how to make rows of it; nothing is written."""
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        sources(make(), "data")
