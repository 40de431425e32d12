"""docs/data.md is true: every example is rendered, and every format and option is documented."""

import json
import re
import tomllib
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.config.formats import NAMES, options_of
from fastpref.data import render
from fastpref.data.template.named import KNOWN
from tests.support.paths import DOCS
from tests.support.toy_tokenizers import trained_chatml

PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(format = .*?)\n```\n```json\n(.*?)\n```\n```json\n(.*?)\n```\n", PAGE, re.DOTALL)


def format_of(example: tuple[str, str, str]) -> Any:
    return tomllib.loads(example[0])["format"]


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{at}" for at in range(len(EXAMPLES))])
def test_an_example_is_what_comes_out(example: tuple[str, str, str]):
    """The row of an example is rendered, with the format above it, to the text below it."""
    row, wanted = json.loads(example[1]), json.loads(example[2])
    options = {"unpaired": "label" in wanted, "supervised": set(wanted) == {"prompt", "completion"}}
    assert render(row, format_of(example), tokenizer=trained_chatml(), **options) == wanted


def test_every_block_of_json_is_in_an_example():
    """Every block of JSON on the page belongs to an example that is tested."""
    assert PAGE.count("```json\n") == 2 * len(EXAMPLES)
    assert PAGE.count("```toml\n") == len(EXAMPLES) + 1


def test_every_format_has_an_example():
    """Every format has an example with pairs, or with lists."""
    shown = {
        form if isinstance(form, str) else form.get("type", "table")
        for form, wanted in ((format_of(example), json.loads(example[2])) for example in EXAMPLES)
        if {"chosen", "completions"} & set(wanted)
    }
    assert shown == set(NAMES)


def test_every_option_is_named():
    """Options of formats, names of chat templates and keys of [[data]] are on the page."""
    for name in NAMES:
        assert all(f"`{option}`" in PAGE for option in options_of(name))
    assert all(f"`{name}`" in PAGE for name in KNOWN)
    source = next(block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[[data]]" in block)
    config = Config.model_validate({"model": {"name": "m"}} | tomllib.loads(source))
    keys = {key for table in tomllib.loads(source)["data"] for key in table}
    assert keys == set(type(config.data[0]).model_fields)
