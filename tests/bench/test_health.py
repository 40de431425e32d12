"""The battery of health with a model and pairs of one's own: rows that are short enough, runs, and the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import health
from bench.faults import healthy, ruined
from bench.own_model import FEWEST, short_rows
from fastpref.config.model import ModelConfig
from fastpref.errors import UserError
from fastpref.health import RULES
from fastpref.model.tokenizer import load_tokenizer
from tests.support.paths import QUICKSTART

MODEL, ROWS = QUICKSTART.parent / "quickstart" / "model", QUICKSTART.parent / "quickstart" / "train.jsonl"


def turns(*words: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": said} for at, said in enumerate(words)]


def written(folder: Path, change: dict[str, Any]) -> Path:
    """Write pairs with questions of their own, of which the first is changed."""
    rows = [
        {
            "conversations": turns(f"What is {at}?"),
            "chosen": {"from": "gpt", "value": "Four. It is even."},
            "rejected": {"from": "gpt", "value": "Five."},
        }
        for at in range(FEWEST + 1)
    ]
    path = folder / "pairs.json"
    path.write_text(json.dumps([rows[0] | change, *rows[1:]]))
    return path


def answer(words: str) -> dict[str, str]:
    return {"from": "gpt", "value": words}


LONG = "Four is nine. " * 40
SHORTENED: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    # a row: the question and the chosen completion that are left of it, or None
    "as it is": ({"conversations": turns("Hi?")}, ("Hi?", "Four. It is even.")),
    "a long conversation": ({"conversations": turns(LONG, "Yes.", "Hi?")}, ("Hi?", "Four. It is even.")),
    "a long question": ({"conversations": turns(LONG)}, None),
    "a long completion": ({"conversations": turns("Hi?"), "chosen": answer("Nine. " + LONG)}, ("Hi?", "Nine. Four is")),
    "a long sentence": ({"conversations": turns("Hi?"), "chosen": answer("four is " * 90)}, None),
    "equal sides": ({"conversations": turns("Hi?"), "rejected": answer("Four. It is even.")}, None),
    "an empty side": ({"conversations": turns("Hi?"), "chosen": answer("")}, None),
}


@pytest.mark.parametrize("what", SHORTENED)
def test_rows_are_made_short_enough(what: str, tmp_path: Path):
    """Long rows keep their last question and first whole sentences; rows that still do not fit are left out."""
    change, left = SHORTENED[what]
    training, heldout = short_rows(MODEL, written(tmp_path, change), 64)
    rows = [*training, *heldout]
    tokenizer = load_tokenizer(ModelConfig(name=str(MODEL)))
    sides = [side for row in rows for side in (row["prompt"], row["chosen"], row["rejected"])]
    assert all(sum(len(tokenizer(turn["content"])["input_ids"]) for turn in side) <= 24 for side in sides)
    assert all(side[-1]["content"].endswith((".", "?")) for side in sides)
    assert not {row["prompt"][0]["content"] for row in training} & {row["prompt"][0]["content"] for row in heldout}
    found = [row for row in rows if row["prompt"][-1]["content"] == "Hi?"]
    assert len(rows) == FEWEST + (left is not None)
    if left is not None:
        assert found[0]["chosen"][0]["content"].startswith(left[1])


def test_capitals_are_of_the_chosen_side(tmp_path: Path):
    """The rejected side is a beginning of the chosen one in capitals, and never the row's own."""
    for row in short_rows(MODEL, written(tmp_path, {}), 64, capitals=True)[0]:
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        shorter = min(len(chosen), len(rejected))
        assert rejected == rejected.upper()
        assert chosen.upper()[:shorter] == rejected[:shorter]


def test_too_few_rows_are_refused(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(UserError, match="of 9 rows are pairs"):
        short_rows(MODEL, path, 64)


def test_faults_name_rules():
    """Every fault is that of a rule that exists, and every name is that of one run."""
    cases = [*ruined(20), *healthy(20), *health.quickstart().cases]
    assert {name for case in cases for name in case.faults} <= set(RULES)
    for subject in ([*ruined(20), *healthy(20)], health.quickstart().cases):
        assert len({case.name for case in subject}) == len(subject)


def test_a_model_of_ones_own(tmp_path: Path):
    """A folder and a file give a run of each case, and its line in the page between the marks of such models."""
    given = [str(tmp_path / "page.md"), "--model", str(MODEL), "--data", str(ROWS), "--steps", "2", "--length", "96"]
    (tmp_path / "page.md").write_text("before\n<!-- battery: python -m bench.health docs/health.md --model")
    app = health.typer.Typer()
    app.command()(health.main)
    shown = CliRunner().invoke(app, [*given, "--runs", str(tmp_path), "--match", "held-out rows that are"])
    assert shown.exit_code == 0, shown.output
    assert "| DPO, held-out rows that are training rows | `heldout_leaks` 0 | yes |" in shown.output
    assert "**1 of 1 ruined runs are caught, and 0 of 0 healthy runs have a false alarm**" in shown.output
    assert "before" in (tmp_path / "page.md").read_text()  # a part of the runs leaves the page alone
    alone = CliRunner().invoke(app, given[:3])
    assert alone.exit_code == 2
