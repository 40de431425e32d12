"""`fastpref.train` takes a file, tables or a Config, and rows as files or as a Dataset: the same run."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import fastpref
from fastpref.config import Config
from fastpref.config.losses import LOSSES
from fastpref.errors import UserError
from fastpref.training.arguments import config_of
from tests.support.command_line import succeed
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_ROWS
from tests.support.runs import CONFIG, LORA, contents, rows, write_config

TABLES = tomllib.loads(CONFIG)
WANTED = ["train.steps=3", "train.betas=[0.8, 0.9]", 'output.dir="a b"']


def given(path: Path) -> dict[str, Callable[[], Config]]:
    """Return every way to write one config: each with the changes of WANTED."""
    tables = {**TABLES, "train": {**TABLES["train"], "steps": 3, "betas": (0.8, 0.9)}, "output": {"dir": Path("a b")}}
    tables["output"]["save_every"] = TABLES["output"]["save_every"]
    changes = {"train.steps": 3, "train.betas": (0.8, 0.9), "output.dir": Path("a b")}
    sections = {name: getattr(config_of(TABLES), name) for name in ("model", "data", "eval", "tokens", "train")}
    return {
        "path": lambda: config_of(path, WANTED),
        "name of the path": lambda: config_of(str(path), WANTED),
        "path, changes as a dict": lambda: config_of(path, changes),
        "dict": lambda: config_of(tables),
        "dict, changes": lambda: config_of(TABLES, WANTED),
        "dict of sections": lambda: config_of({**sections, "output": tables["output"]}, WANTED),
        "Config": lambda: config_of(config_of(TABLES), WANTED),
        "rows in place of others": lambda: config_of(
            {**TABLES, "eval": {**TABLES["eval"], "data": [], "fraction": 0.5}, "data": [{"path": "others"}]},
            WANTED,
            TABLES["data"],
            TABLES["eval"]["data"],
        ),
        "no rows before": lambda: config_of({k: v for k, v in TABLES.items() if k != "data"}, WANTED, TABLES["data"]),
    }


def test_every_way_gives_the_same_config(config: Path):
    """The ways differ only in what was set. No way changes what the caller gave."""
    before = repr(TABLES)
    ways = given(config)
    wanted = ways["path"]()
    for name, make in ways.items():
        assert make() == wanted, name
    assert repr(TABLES) == before
    assert config_of(wanted) is wanted


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_a_table_or_its_options(loss: str):
    """The options of a loss, such as `fastpref.losses.DPO(beta=0.2)`, stand where a table can."""
    options = LOSSES[loss]()
    assert config_of({**TABLES, "loss": options}).loss == options
    assert config_of({**TABLES, "loss": {"type": loss}}).loss == options


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # of each case config, overrides, data, eval_data
    "no config": ((3,), r"takes the path of a config, a dict of its tables or a fastpref.Config, got int"),
    "a key": (({**TABLES, "trian": {}},), r"^the config: trian: unknown key \(did you mean 'train'\?\)"),
    "a value": (({**TABLES, "train": {"batch": "x"}},), r"^the config: train.batch: .*got 'x'"),
    "no data": (({k: v for k, v in TABLES.items() if k != "data"},), r"^the config: data: is missing"),
    "a change": ((TABLES, ["train.steps=0"]), r"^override 'train.steps=0': train.steps: "),
    "a change as a dict": ((TABLES, {"train.steps": 0}), r"^override 'train.steps=0': train.steps: "),
    "one string": ((TABLES, "train.steps=2"), r"^overrides are a list of strings"),
    "a key of rows": ((TABLES, (), [{"path": "x", "frmat": "y"}]), r"^override 'data': data\[0\].frmat: unknown key"),
    "no rows": ((TABLES, (), []), r"^override 'data': data: needs at least one entry"),
    "rows in a dict": (({**TABLES, "data": 3},), r"^data: takes a datasets.Dataset, .*got int"),
    "held-out rows in a dict": (({**TABLES, "eval": {"data": 3}},), r"^eval.data: takes a datasets.Dataset"),
    "held-out rows": ((TABLES, (), None, 3), r"^eval_data: takes a datasets.Dataset"),
    "a table that is none": (({**TABLES, "eval": 3},), r"^the config: eval: must be a table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_user_errors(name: str, elsewhere: Path):
    """Each mistake is a UserError that says where it is; `train` raises it before it writes anything."""
    arguments, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        fastpref.train(*arguments[:2], **dict(zip(("data", "eval_data"), arguments[2:])))
    assert list(elsewhere.iterdir()) == []


def test_a_dataset_is_trained_on_as_its_file(elsewhere: Path):
    """A run on Datasets has the numbers of a run on their files, also resumed, and `eval` finds its rows by its
    folder. Other rows are refused."""
    made = {path: datasets.Dataset.from_json(str(path)) for path in (QUICKSTART_ROWS, QUICKSTART_HELDOUT)}
    train = made[QUICKSTART_ROWS].select(range(23))  # pyright: ignore[reportAttributeAccessIssue]
    held = made[QUICKSTART_HELDOUT].select(range(5))  # pyright: ignore[reportAttributeAccessIssue]
    short = [LORA, "train.steps=3", "output.save_every=1"]
    fastpref.train(write_config(elsewhere), [*short, "output.dir=file"])
    fastpref.train({**TABLES, "data": train, "eval": {**TABLES["eval"], "data": held}}, [*short, "output.dir=set"])
    resume = Path("set", "checkpoints", "step-2")
    resumed = fastpref.train(
        TABLES, [*short, "output.dir=set"], data=train, eval_data=held, resume=resume, force=True, cache=False
    )
    assert rows(elsewhere / "set") == rows(elsewhere / "file")
    written, expected = (contents(elsewhere / name / "final") for name in ("set", "file"))
    assert written["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    held_out = succeed("eval", "set", "--json").json
    assert held_out["loss"] == pytest.approx(resumed.eval_metrics["eval/loss"], abs=1e-6)
    other = train.shuffle(seed=1)
    with pytest.raises(UserError, match="are not those it was trained with"):
        fastpref.train(TABLES, short, data=other, eval_data=held, resume=resume, force=True)
