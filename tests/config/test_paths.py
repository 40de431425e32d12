"""A path in a config is marked in the schema, and everything that handles paths derives from the mark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Strict, ValidationError

from fastpref.config import Config, DataConfig, TokensConfig, make_config
from fastpref.config import load as loading
from fastpref.config.paths import ReadPath, WrittenPath, map_paths, path_marks
from fastpref.run import resume
from fastpref.run.card import model_card

SMALLEST: Mapping[str, Any] = {"model": {"name": "m"}, "data": [{"path": "d"}]}


class MoreData(DataConfig):
    prices: ReadPath | None = None
    """A planted path of an entry."""


class MoreTokens(TokensConfig):
    words: ReadPath = "w"
    """A planted path."""
    traces: WrittenPath | None = None
    """A planted folder that a run writes."""


class MoreConfig(Config):
    data: Annotated[tuple[MoreData, ...], Strict(False)]
    tokens: MoreTokens = MoreTokens()


def test_a_new_path_is_written_in_the_schema_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A marked key is looked up in the config's folder, left out of cards, and may change on a resume."""
    for name in ("prices.json", "w"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(loading, "Config", MoreConfig)
    monkeypatch.chdir(tmp_path)
    data: list[dict[str, Any]] = [{"path": "d"}, {"path": "d", "prices": "prices.json"}]
    config: Any = make_config({"model": {"name": "m"}, "data": data, "tokens": {"traces": "/home/me/traces"}})
    assert [entry.prices for entry in config.data] == [None, str(tmp_path / "prices.json")]
    assert (config.tokens.words, config.tokens.traces) == (str(tmp_path / "w"), "/home/me/traces")
    card = model_card(config, [], "0" * 64, 1)
    assert 'prices = "prices.json"' in card
    assert 'words = "w"' in card
    assert "traces" not in card
    marks = dict(path_marks(MoreConfig))
    assert set(marks) - set(dict(path_marks(Config))) == {"data.*.prices", "tokens.words", "tokens.traces"}
    assert marks["tokens.traces"].written
    places = (
        "model.name lora.from data.*.path data.*.prices eval.data.*.path tokens.chat_template tokens.words "
        "reference.name"
    )
    assert resume.places(MoreConfig) == tuple(places.split())


def test_every_path_is_mapped():
    """Names, templates and the files of functions are mapped; names of formats and keys without a value are not."""
    template = {"type": "chat_template.default", "chat_template": "t.jinja"}
    formats = {
        "d0": "auto",
        "d1": "mine.own:read",
        "d2": "/a/mine.py:read",
        "d3": template,
        "d4": {"field_prompt": "q"},
    }
    raw = {"model": {"name": "m"}, "data": [{"path": path, "format": form} for path, form in formats.items()]}
    config = make_config(raw | {"eval": {"data": [{"path": "h"}]}, "output": {"dir": "o"}})
    mapped = map_paths(config, lambda path: f"<{path}>", lambda path: f"[{path}]")
    assert mapped.model.name == "<m>"
    assert [data.path for data in mapped.data] == ["<d0>", "<d1>", "<d2>", "<d3>", "<d4>"]
    assert [data.format for data in mapped.data] == [
        "auto", "<mine/own.py>:read", "</a/mine.py>:read", template | {"chat_template": "<t.jinja>"},
        {"field_prompt": "q"},
    ]  # fmt: skip
    assert (mapped.eval.data[0].path, mapped.tokens.chat_template, mapped.output.dir) == ("<h>", None, "[o]")
    assert map_paths(config, lambda path: path) == config


# --- Config.but ------------------------------------------------------------------------------------------------------


def test_but_changes_keys_and_tables():
    """`but` changes dotted keys, whole tables, and keys of a table that the same call makes; the first config stays."""
    config = make_config(dict(SMALLEST))
    changed = config.but({"model.dtype": "float32", "lora": {}, "lora.rank": 4, "loss": {"type": "kto"}})
    assert (changed.model.dtype, changed.loss.type) == ("float32", "kto")
    assert changed.lora is not None
    assert (changed.lora.rank, changed.lora.alpha) == (4, 32.0)
    assert config == make_config(dict(SMALLEST))
    assert changed.but({"lora": None, "lora.dora": True}).lora == make_config({**SMALLEST, "lora": {"dora": True}}).lora
    assert config.but({"loss.variants": ["ipo", "sft"], "loss.weights": [1, 2]}).loss.beta == 0.1  # valid together
    assert config.but({"data": [{"path": "e"}], "eval": {}}).data == (DataConfig(path="e"),)


@pytest.mark.parametrize("changes", [
    {"model.dtyp": "float32"}, {"model.dtype": "float8"}, {"train.batch": 0}, {"loss.gamma": 1.0},
    {"loss.weights": [1, 2]}, {"data": []}, {"lora": {"rnk": 1}}, {"model": None},
], ids=str)  # fmt: skip
def test_but_validates(changes: dict[str, Any]):
    """`but` refuses what the schema refuses in a file; a table that does not exist is an error of another type."""
    with pytest.raises(ValidationError):
        make_config(dict(SMALLEST)).but(changes)
    with pytest.raises(KeyError):
        make_config(dict(SMALLEST)).but({"modl.name": "m"})
