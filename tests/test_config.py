"""A config's mistakes, each with its place; overrides; the way back to TOML; and the keys themselves, frozen."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fastpref.config import Config, DataConfig, load_config, to_toml
from fastpref.errors import UserError
from fastpref.loss_options import CPO, DPO, IPO, KTO, ORPO, LossOptions, SimPO

BASE = '[model]\nname = "m"\n[[data]]\npath = "d"\n'  # four lines


def write(folder: Path, text: str, name: str = "cfg.toml") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def load(folder: Path, text: str, overrides: Iterable[str] = ()) -> Config:
    return load_config(write(folder, text), overrides)


def mistakes(folder: Path, text: str, overrides: Iterable[str] = ()) -> list[str]:
    """What is said about a config, a line each, without the folder."""
    with pytest.raises(UserError) as caught:
        load(folder, text, overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# --- Places ------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, list[str]]] = {
    "a table": (BASE + "\n# words\n[train]\nbatch = 0\n", ["8: train.batch"]),
    "a table before its model": ("[train]\nbatch = 0\n" + BASE, ["2: train.batch"]),
    "a key that is missing stands at its table": ('[model]\n\n[[data]]\npath = "d"\n', ["1: model.name"]),
    "an entry of an array of tables": (BASE + '[[data]]\npath = "e"\n[[data]]\nrows = 0\n', ["7: data[2].path"] * 0),
    "the second [[data]]": (BASE + '[[data]]\npath = "e"\nrows = 0\n', ["7: data[1].rows"]),
    "a path missing from the third [[data]]": (BASE + '[[data]]\npath = "e"\n\n[[data]]\n', ["8: data[2].path"]),
    "[[eval.data]] after [eval]": (
        BASE + '[eval]\nevery = 0\n[[eval.data]]\npath = "e"\n[[eval.data]]\npath = 1\n',
        ["6: eval.every", "10: eval.data[1].path"],
    ),
    "[[eval.data]] before [eval]": (
        BASE + '[[eval.data]]\npath = "e"\nrows = -1\n[eval]\nevery = 0\n',
        ["7: eval.data[0].rows", "9: eval.every"],
    ),
    "a table inside an entry": (BASE + "[data.more]\nx = 1\n[[data]]\npath = 1\n", ["5: data[0].more", "8: data[1].path"]),
    "[[train]] for [train]": (BASE + "[[train]]\nbatch = 2\n", ["5: train"]),
    "an array over several lines": (
        BASE + '[lora]\ntarget = [  # [train]\n  "q_proj",\n  # "]"\n  "v_proj",\n]\nrank = 0\n',
        ["11: lora.rank"],
    ),
    "an entry of such an array stands where it begins": (BASE + '[lora]\ntarget = [\n  "q",\n  3,\n]\n', ["6: lora.target[1]"]),
    "a string over several lines": (
        BASE + '[tokens]\nchat_template = """\n[train]\nbatch = 0\n\\"""\n"""\nmax_length = 0\n',
        ["11: tokens.max_length"],
    ),
    "a literal string over several lines": (
        BASE + "[tokens]\nchat_template = '''\n[[data]]\n\"\"\"'''\nmax_length = 0\n",
        ["9: tokens.max_length"],
    ),
    "an inline table": (BASE + "train = 1\n"[:0] + "[lora]\n[loss]\n", []),
    "keys of an inline table": (
        'model = { name = "m", dtype = 8 }\n\ndata = [{ path = "d" }]\ntrain = { seed = 1, batch = 0 }\n',
        ["1: model.dtype", "4: train.batch"],
    ),
    "an array of inline tables stands where it begins": (
        'model.name = "m"\ndata = [\n  { path = "d" },\n  { path = "e", rows = 0 },\n]\n',
        ["2: data[1].rows"],
    ),
    "dotted keys": (
        'model.name = "m"\nmodel.dtype = 8\ntrain.batch = 0\ndata = [{ path = "d" }]\nloss.beta = 0\n',
        ["2: model.dtype", "3: train.batch", "5: loss.beta"],
    ),
    "dotted keys of a table": ('data = [{ path = "d" }]\n[model]\nname = "m"\n[eval]\ndata = [{ path = 1 }]\n', ["5: eval.data[0].path"]),
    "quoted keys": (BASE + "[ \"train\" ] # [model]\n'batch' = 0\n\"seed\" = 0.5\n", ["6: train.batch", "7: train.seed"]),
    "Windows line ends": (BASE.replace("\n", "\r\n") + "[train]\r\nbatch = 0\r\n", ["6: train.batch"]),
    "a byte order mark": ("\ufeff" + BASE + "[train]\nbatch = 0\n", ["6: train.batch"]),
    "characters that some take for line ends": (
        '[model]\nname = "a\u2028b\x85c" # \u2029\n[[data]]\npath = "d"\n[train]\nbatch = 0\n',
        ["6: train.batch"],
    ),
}
