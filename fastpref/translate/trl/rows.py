"""Translate the data of TRL's configs into [[data]] and [[eval.data]]."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastpref.errors import UserError
from fastpref.translate.fields import Fields, Left, Made, Setting, dotted, shown
from fastpref.translate.sources import files_of

KEYS = {  # key of an entry of `datasets` → its translation, in words for the documentation
    "path": "`path`; of a builder such as `json` or of a folder, the `data_files` are",
    "data_files": "a [[data]] a file, where `path` is a folder here or a builder; of a table, those of the split",
    "name": "`name`",
    "split": "`split`",
}
LEFT_OUT = {
    "data_dir": "a folder of a data set cannot be named; name its files, or the path of the folder here",
    "columns": "columns that no format reads do no harm",
    "fraction": "there are no shares of a mixture; rows and weight take a part of the data",
}


def train(config: Fields) -> Made:
    """Translate `datasets`, which TRL prefers, or `dataset_name`."""
    if not config.get("datasets"):
        yield from _named(config, ("data", 0), config.text("dataset_train_split", "train"), "dataset_train_split")
        return
    for field in ("dataset_name", "dataset_config", "dataset_train_split"):
        if field in config:
            yield Left(field, "datasets goes before it")
    yield from _mixture(config)


def _named(config: Fields, key: tuple[str | int, ...], split: str, field: str) -> Made:
    paths, lost = files_of(config.text("dataset_name"), None, "dataset_name: ", (config.file.parent,))
    yield Setting((*key, "path"), paths[0], ("dataset_name",))
    yield from (Left("dataset_name", left.reason) for left in lost)
    if "dataset_config" in config:
        yield Setting((*key, "name"), config.text("dataset_config"), ("dataset_config",))
    if split != "train":
        given = config.given(field)
        yield Setting((*key, "split"), split, given, "" if given else "TRL's default")


def _mixture(config: Fields) -> Made:
    listed = config.get("datasets")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(f"{config.file}: datasets: must be a list of tables, each with a path, got {shown(listed)}")
    at = 0
    for number, entry in enumerate(listed):
        place = f"datasets[{number}]"
        given = {str(key): value for key, value in entry.items() if value is not None}
        if not isinstance(given.get("path"), str):
            raise UserError(f"{config.file}: {place}: there is no path in it, which says where the rows are")
        files = given.get("data_files")
        split = str(given.get("split", "train"))
        if isinstance(files, dict):
            files = files.get(split)
        paths, lost = files_of(given["path"], files, f"{place}.", (config.file.parent,))
        yield from lost
        for path in paths:
            yield Setting(("data", at, "path"), path, (f"{place}.path",))
            for name in ("name", "split"):
                if name in given and not (name == "split" and path in _as_list(files)):
                    yield Setting(("data", at, name), given[name], (f"{place}.{name}",))
            at += 1
        yield from _lost(given, place)


def _as_list(files: Any) -> list[Any]:
    return files if isinstance(files, list) else [files]


def _lost(entry: Mapping[str, Any], place: str) -> Iterator[Left]:
    for name, value in entry.items():
        if name in LEFT_OUT and value not in (False, "", [], {}):
            yield Left(f"{place}.{name}", LEFT_OUT[name])
        elif name not in KEYS and name not in LEFT_OUT:
            yield Left(f"{place}.{name}", "unknown field")


def held_out(config: Fields) -> Made:
    """Translate the data that are evaluated: another split, or a share of the mixture."""
    evaluates = config.text("eval_strategy", "no") != "no"
    share = config.number("test_split_size", 0)
    if config.get("datasets"):
        if 0 < share < 1:
            words = "by a hash of the prompt" if evaluates else "held out, as in TRL, and evaluated at start and end"
            yield Setting(dotted("eval.fraction"), share, ("test_split_size",), words)
        elif share:
            yield Left("test_split_size", "a number of rows cannot be held out; set eval.fraction to a share below 1")
        elif evaluates:
            yield Left("eval_strategy", "no test_split_size holds out a part of the datasets")
        if "dataset_test_split" in config:
            yield Left("dataset_test_split", "datasets goes before it")
        return
    if share:
        yield Left("test_split_size", "it is for datasets; eval.fraction holds out a share")
    if evaluates:
        split = config.text("dataset_test_split", "test")
        yield from _named(config, ("eval", "data", 0), split, "dataset_test_split")
    elif "dataset_test_split" in config:
        yield Left("dataset_test_split", "eval_strategy is no")
