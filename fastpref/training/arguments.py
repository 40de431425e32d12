"""The config of a run from the arguments of `fastpref.train`: a file, tables, or a Config, and rows in memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from pydantic import BaseModel

from fastpref.config import Config, load_config, make_config
from fastpref.config.toml import toml_value
from fastpref.data.given import is_dataset, sources
from fastpref.errors import UserError

if TYPE_CHECKING:
    import datasets

Rows = Union["datasets.Dataset", str, Path, Mapping[str, Any]]
"""A Dataset, a path or a name on the hub, or a table of [[data]] with one of these as its path."""


def config_of(
    given: Config | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    data: Rows | Sequence[Rows] | None = None,
    eval_data: Rows | Sequence[Rows] | None = None,
) -> Config:
    """Return the config that the arguments of `train` describe. Raises UserError."""
    words = _words(overrides)
    rows: dict[str, Any] = {}
    if data is not None:
        rows["data"] = sources(data, "data")
    if eval_data is not None:
        rows |= {"eval.data": sources(eval_data, "eval_data"), "eval.fraction": None}
    if isinstance(given, Config):
        if not words and not rows:
            return given
        return make_config(given.model_dump(exclude_unset=True), words, given=rows, source="the config")
    if isinstance(given, Mapping):
        tables = _plain(given)
        if "data" in given:
            tables["data"] = sources(given["data"], "data")
        held = given.get("eval")
        if isinstance(held, Mapping) and "data" in held:
            tables["eval"]["data"] = sources(held["data"], "eval.data")
        return make_config(tables, words, given=rows, source="the config")
    if isinstance(given, str | Path):
        return load_config(given, words, given=rows)
    raise UserError(
        f"train takes the path of a config, a dict of its tables or a fastpref.Config, got {type(given).__name__}"
        + ("; rows are its argument `data`" if is_dataset(given) else "")
    )


def _words(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as `key=value` strings. Raises UserError."""
    if isinstance(overrides, Mapping):
        return [f"{key}={toml_value(_plain(value))}" for key, value in overrides.items()]
    if isinstance(overrides, str) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f'overrides are a list of strings, such as ["train.steps=20"], or a dict, got {overrides!r}')
    return list(overrides)


def _plain(value: Any) -> Any:
    """Return tables with the types of a TOML file: paths are strings, tuples are lists, and tables are dicts."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # the options of a loss
        return _plain(dataclasses.asdict(value))
    return str(value) if isinstance(value, Path) else value
