"""What rows with lists of completions, weights and margins become for each kind of loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config
from fastpref.config.losses import LOSSES
from fastpref.data.cache import load_examples
from fastpref.data.rows.content import Paired, Ranked, RowContent, Unpaired
from fastpref.data.sources import Prepared, prepare
from fastpref.errors import UserError
from tests.support.lists import of_lists
from tests.support.toy_tokenizers import plain

ROW = {"prompt": "q", "responses": ["good", "bad", "fair"], "scores": [3, 0, 2]}
TIED = {"prompt": "r", "responses": ["one", "two", "three"], "scores": [2, 2, 1]}
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
SINGLE = {"prompt": "q", "completion": "yes", "label": True}
PAIRED = [name for name, loss in LOSSES.items() if loss.paired and not loss.listwise]


def config(folder: Path, *rows: dict[str, Any], loss: str = "dpo", name: str = "rows", **of_data: Any) -> Config:
    """Write rows to a file, and return a config that reads it; `loss` may be "lists"."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {} if loss == "lists" else {"loss": {"type": loss}}
    made = Config.model_validate({"model": {"name": "m"}, "data": [{"path": str(path), **of_data}], **own})
    return of_lists(made) if loss == "lists" else made


def read(folder: Path, *rows: dict[str, Any], **how: Any) -> Prepared:
    return prepare(config(folder, *rows, **how))


def contents(prepared: Prepared) -> list[RowContent]:
    return [row.content for row in prepared.train]


def refused(folder: Path, *rows: dict[str, Any], **how: Any) -> str:
    """Return the message about rows that are refused, without the folder."""
    with pytest.raises(UserError) as caught:
        read(folder, *rows, **how)
    return str(caught.value).replace(f"{folder}/", "")


# --- Lists of completions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", PAIRED)
def test_a_list_makes_pairs_for_a_loss_of_pairs(tmp_path: Path, loss: str):
    """By default the pair of a list is its best and its worst completion; a note counts the pairs."""
    made = read(tmp_path, ROW, TIED, loss=loss)
    assert contents(made) == [Paired("q", "good", "bad"), Paired("r", "one", "three")]
    assert 'rows.jsonl: 2 pairs of 2 rows (pairs = "best-worst")' in made.notes


def test_every_pair_has_the_place_of_its_row(tmp_path: Path):
    """The pairs of a row follow each other, and pairs that are left out are counted and noted."""
    made = read(tmp_path, ROW, TIED, pairs="all", min_difference=1.5)
    assert contents(made) == [Paired("q", "good", "bad"), Paired("q", "fair", "bad")]
    assert [str(row.place) for row in made.train] == [f"{tmp_path}/rows.jsonl:1"] * 2
    assert (made.train.tied, made.train.close) == (1, 3)
    assert (
        'rows.jsonl: 2 pairs of 2 rows (pairs = "all"); 1 of equal scores and 3 of scores closer than 1.5 dropped'
        in made.notes
    )


def test_counts_have_the_pairs_that_are_left_out(tmp_path: Path):
    """What is tied or too close is counted with the rows that are dropped later, and the numbers add up."""
    rows = [ROW, TIED, {"prompt": "s", "responses": ["", "one", "one"], "scores": [3, 2, 1]}]
    data = load_examples(config(tmp_path, *rows, pairs="all", min_difference=1.5), plain(), cache=False)
    counts = data.counts["train"]
    assert (counts.kept, counts.tied, counts.close, counts.empty, counts.rows) == (2, 1, 5, 1, 9)
    assert "training: 2 of 9 rows used, 1 dropped: with equal scores, 5 dropped: with scores closer than" in str(
        data.notes
    )


def test_a_weight_repeats_what_is_left_out_too(tmp_path: Path):
    """[[data]] weight repeats the pairs of a row, and the counts of those that it leaves out."""
    made = read(tmp_path, TIED, pairs="adjacent", weight=2)
    assert len(made.train) == made.train.tied == 2


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_nothing_far_enough_is_an_error(tmp_path: Path, fraction: float | None):
    """If no pair is left, the message counts what was dropped, with held-out rows too."""
    whole = config(tmp_path, ROW, TIED, min_difference=9).but({"eval.fraction": fraction})
    with pytest.raises(
        UserError, match=r"no training row can be used: 0 of \d rows used, \d dropped: with scores clos"
    ):
        load_examples(whole, plain(), cache=False)


def test_a_split_keeps_the_pairs_of_a_prompt_together(tmp_path: Path):
    """All pairs of a row are on one side of eval.fraction, and so are the counts of those left out."""
    rows = [{**TIED, "prompt": str(at)} for at in range(20)]
    made = prepare(config(tmp_path, *rows, pairs="all").but({"eval.fraction": 0.5}))
    sides = [{str(row.content.prompt) for row in side} for side in (made.train, made.heldout)]
    assert len(sides[0]) + len(sides[1]) == 20
    for prompts, side in zip(sides, (made.train, made.heldout)):
        assert len(side) == 2 * len(prompts) == 2 * side.tied > 0


def test_a_list_stays_whole_for_a_loss_of_lists(tmp_path: Path):
    """Lists keep all completions, of whatever number, with their scores; pairs remain pairs."""
    two = {"prompt": "q", "responses": ["a", "b"], "scores": [0, 1]}
    made = read(tmp_path, ROW, two, loss="lists")
    assert contents(made) == [Ranked("q", ("good", "bad", "fair"), (3, 0, 2)), Ranked("q", ("a", "b"), (0, 1))]
    assert not any("pairs" in note for note in made.notes)
    assert contents(read(tmp_path, PAIR, loss="lists")) == [Paired("q", "yes", "no")]


def test_kto_takes_the_best_and_the_worst(tmp_path: Path):
    """For KTO the best completion of a list is a good completion and the worst is a bad one, as of a pair."""
    made = read(tmp_path, ROW, loss="kto")
    assert contents(made) == [Unpaired("q", "good", True), Unpaired("q", "bad", False)]
    assert any(
        "the best and the worst completion of a row count as one good and one bad" in note for note in made.notes
    )


@pytest.mark.parametrize(
    ("row", "loss", "key", "value"),
    [(PAIR, "dpo", "pairs", "all"), (PAIR, "dpo", "min_difference", 1), (SINGLE, "kto", "min_difference", 1)],
)
def test_keys_for_lists_need_lists(tmp_path: Path, row: dict[str, Any], loss: str, key: str, value: Any):
    """The keys that make pairs are refused for data in which they would do nothing."""
    message = refused(tmp_path, row, loss=loss, **{key: value})
    reason = "makes pairs of rows with a list of scored completions, and no row has one"
    assert message == f"rows.jsonl: {key} {reason}; remove data.{key}"


def test_a_list_that_is_broken_is_dropped_and_counted(tmp_path: Path):
    """Rows that cannot be ranked end the run with their line, or are left out and counted by their mistake."""
    bad = [{**ROW, "scores": [1, 2]}, {**ROW, "scores": [1, 1, 1]}, {**ROW, "responses": ["a"]}]
    what = "responses has 3 completions, and scores has 2 numbers"
    assert refused(tmp_path, ROW, *bad).startswith(f"rows.jsonl:2: {what}; mend the row, or leave such rows out")
    made = read(tmp_path, ROW, *bad, on_error="drop")
    assert (len(made.train), made.left_out) == (1, 3)
    note = next(note for note in made.notes if "left out" in note)
    for kind in ("another number of scores than of completions", "completions of one score", "fewer than two completi"):
        assert f"1 with {kind}" in note


# --- Weights and margins -------------------------------------------------------------------------------------------

WEIGHTED: dict[str, tuple[dict[str, Any], str, Any, float | None]] = {  # row, loss, format, margin
    "auto": (PAIR | {"weight": 2, "margin": 0.5}, "dpo", "auto", 0.5),
    "passthrough": (PAIR | {"weight": 2, "margin": -1}, "simpo", "passthrough", -1),
    "a fixed template": (PAIR | {"weight": 2, "margin": 0}, "dpo", "chatml.prompt_pairs", 0),
    "chats": (
        {"messages": "q", "chosen": "yes", "rejected": "no", "weight": 2, "margin": 3}, "dpo", "chat_template.default",
        3,
    ),
    "other columns of a table": (
        PAIR | {"w": 2, "m": 1, "weight": "x", "margin": "y"}, "dpo", {"field_weight": "w", "field_margin": "m"}, 1,
    ),
    "other columns of chats": (
        {"messages": "q", "chosen": "yes", "rejected": "no", "w": 2, "m": 1}, "dpo",
        {"type": "chat_template.default", "field_weight": "w", "field_margin": "m"}, 1,
    ),
    "no margin": (PAIR | {"weight": 2, "margin": "y"}, "dpo", {"field_margin": ""}, None),
    "single": (SINGLE | {"weight": 2}, "kto", "auto", None),
    "a pair for KTO": (PAIR | {"weight": 2}, "kto", "auto", None),
    "a list": (ROW | {"weight": 2}, "dpo", "auto", None),
    "a whole list": (ROW | {"weight": 2}, "lists", "auto", None),
    "a list in a table": (ROW | {"w": 2}, "dpo", {"type": "table.ranked", "field_weight": "w"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("row", "loss", "format", "margin"), WEIGHTED.values(), ids=WEIGHTED)
def test_weights_and_margins_are_columns_of_every_format(
    tmp_path: Path, row: dict[str, Any], loss: str, format: Any, margin: float | None
):
    """Every example of a row has its weight, and a pair its margin; a note says that the columns are read."""
    made = read(tmp_path, row, loss=loss, format=format)
    assert [content.weight for content in contents(made)] == [2.0] * len(made.train)
    assert all(getattr(content, "margin", None) == margin for content in contents(made))
    options = format if isinstance(format, dict) else {}
    note = f"rows.jsonl: the column {options.get('field_weight', 'weight')} multiplies the loss of each row, 2 to 2"
    assert note in made.notes


def test_weights_and_margins_of_a_csv_file(tmp_path: Path):
    """In a CSV file, whose cells are text, these columns hold numbers, under their own names too."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,weight,m\nq,1,2,0.5,1e-1\n")
    data = {"path": str(path), "format": {"field_margin": "m"}}
    made = prepare(Config.model_validate({"model": {"name": "m"}, "data": [data]}))
    assert contents(made) == [Paired("q", "1", "2", weight=0.5, margin=0.1)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"weight {value}": ({"weight": value}, f"weight holds {value!r}; a weight is a number above 0, by which")
        for value in (0, -1, float("nan"), float("inf"), "2", True, 1e-300, [1])
    },
    **{
        f"margin {value}": ({"margin": value}, f"margin holds {value!r}; a margin is a finite number, the difference")
        for value in (float("nan"), float("-inf"), "2", "", False, 1e300)
    },
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_weight_or_margin_that_is_none(tmp_path: Path, changes: dict[str, Any], message: str):
    """Other values are refused with their line, or dropped and counted."""
    good = dict.fromkeys(changes, 1)
    assert refused(tmp_path, PAIR | good, PAIR | changes).startswith(f"rows.jsonl:2: {message}")
    made = read(tmp_path, PAIR | good, PAIR | changes, on_error="drop")
    assert (len(made.train), made.left_out) == (1, 1)


@pytest.mark.parametrize("on_error", ["error", "drop"])
@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize("other", [{}, {"weight": None, "margin": None}], ids=["missing", "null"])
def test_a_column_that_only_some_rows_have(tmp_path: Path, name: str, other: dict[str, Any], on_error: str):
    """A data set whose rows have a weight or margin in part is refused, with a row of each kind."""
    message = refused(tmp_path, PAIR | other, PAIR | {"prompt": "r", name: 1}, on_error=on_error)
    assert message == (
        f"rows.jsonl:2: the row has a {name}, and rows.jsonl:1 has none; give every row of rows.jsonl one, or remove "
        f"the column {name}"
    )


def test_a_column_that_the_format_names_must_be_there(tmp_path: Path):
    """A column that an option names is no longer optional."""
    assert refused(tmp_path, PAIR, format={"field_weight": "w"}).startswith("rows.jsonl:1: there is no column w; ")


def test_margins_of_one_file_alone(tmp_path: Path):
    """If one of two files has margins and the other has none, both are named."""
    with_margins = config(tmp_path, PAIR | {"margin": 1}, name="a")
    both = with_margins.model_copy(update={"data": (*with_margins.data, *config(tmp_path, PAIR, name="b").data)})
    with pytest.raises(UserError, match=r"^a.jsonl has margins and b.jsonl has none"):
        prepare(both)


@pytest.mark.parametrize(
    ("loss", "row", "message"),
    [
        ("kto", PAIR, "the row has a margin, which is one of a pair, and kto takes completions; remove or rename"),
        ("lists", PAIR, "the row has a margin, which is one of a pair, and lists takes lists; remove or rename"),
        ("kto", SINGLE, "the column margin is filled, and a margin is one of a pair: here is a single completion"),
        ("dpo", ROW, "the column margin is filled, and a margin is one of a pair: here is a list of completions"),
    ],
    ids=["a pair for KTO", "a pair for a loss of lists", "single", "a list"],
)  # fmt: skip
def test_a_margin_without_a_pair(tmp_path: Path, loss: str, row: dict[str, Any], message: str):
    """A margin that no pair can have is refused, instead of being left out."""
    assert refused(tmp_path, row | {"margin": 1}, loss=loss).startswith(f"rows.jsonl:1: {message}")


def test_rows_that_differ_in_a_number_are_no_duplicates(tmp_path: Path):
    """Weight, margin and scores belong to a row: only rows that have the same ones repeat each other."""
    drop = {"tokens.duplicates": "drop"}
    rows = [PAIR | {"weight": weight, "margin": margin} for weight, margin in ((1, 1), (2, 1), (1, 2), (1.0, 1.0))]
    made = prepare(config(tmp_path, *rows).but(drop))
    assert (len(made.train), made.duplicates) == (3, 1)
    lists = of_lists(config(tmp_path, ROW, ROW | {"scores": [3, 0, 1]}, ROW).but(drop))
    assert (len(prepare(lists).train), prepare(lists).duplicates) == (2, 1)
