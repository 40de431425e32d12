"""Files of every kind become rows in the form a method needs; whatever cannot is one message that names the place."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fastpref.config import Config
from fastpref.data.formats import Paired, Unpaired
from fastpref.data.sources import Prepared, SourceRow, prepare, split_by_prompt
from fastpref.errors import UserError

USER = {"role": "user", "content": 'q\n"1", é'}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
TEXT = {"prompt": 'q\n"1", é', "chosen": "yes", "rejected": "no"}
LABELLED = {"prompt": "q", "completion": "yes", "label": True}
CHAT = Paired([USER], [YES], [NO])

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    """A file of the kind its suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def prepared(*paths: Path | str, loss: str = "dpo", **tables: Any) -> Prepared:
    data = [{"path": str(path)} for path in paths]
    return prepare(Config.model_validate({"model": {"name": "m"}, "data": data, "loss": {"type": loss}, **tables}))


def contents(rows: list[SourceRow]) -> list[Paired | Unpaired]:
    return [row.content for row in rows]


# --- Files ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any], str, Paired | Unpaired]] = {  # loss, row, what is noted, what it becomes
    "text": ("dpo", TEXT, "text prompt, chosen and rejected", Paired(TEXT["prompt"], "yes", "no")),
    "labelled text": ("kto", LABELLED, "prompt, completion and label", Unpaired("q", "yes", True)),
    "explicit prompt": (
        "orpo",
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        "a prompt of messages with chosen and rejected",
        CHAT,
    ),
    "implicit prompt": (
        "simpo",
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        "chosen and rejected conversations that share their prompt",
        CHAT,
    ),
    "ShareGPT": (
        "ipo",
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        "ShareGPT conversations with chosen and rejected",
        CHAT,
    ),
    "labelled messages": (
        "kto",
        {"messages": [USER, NO], "label": False},
        "messages and label",
        Unpaired([USER], [NO], False),
    ),
}
FILES = [(kind, suffix) for kind in KINDS for suffix in (".json", ".jsonl", ".parquet", ".csv")]
FILES = [(kind, suffix) for kind, suffix in FILES if suffix != ".csv" or "text" in kind]  # a CSV has no lists


@pytest.mark.parametrize(("kind", "suffix"), FILES)
def test_every_kind_of_row_is_read_from_every_kind_of_file(tmp_path: Path, kind: str, suffix: str):
    """The suffix picks the reader and the columns the format; the note says how many rows of what were found."""
    loss, row, name, content = KINDS[kind]
    path = write(tmp_path / f"rows{suffix}", [row, row])
    read = prepared(path, loss=loss)
    assert contents(read.train) == [content, content]
    assert [row.place for row in read.train] == [f"{path}, row 0", f"{path}, row 1"]
    assert read.heldout == []
    assert read.notes == [f"rows{suffix}: 2 rows of {name}"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_keys_that_only_some_messages_have(tmp_path: Path, suffix: str):
    """Tool calls and reasoning arrive as they were written, and nowhere else, though a table has them everywhere."""
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    other = {"function": {"name": "read", "arguments": {"path": "a.txt"}}}
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [other, call]},
    ]
    path = write(tmp_path / f"calls{suffix}", [{"messages": [USER, answer], "label": True} for answer in answers])
    assert contents(prepared(path, loss="kto").train) == [Unpaired([USER], [answer], True) for answer in answers]


def test_words_of_a_csv_file_stay_words(tmp_path: Path):
    """Text columns of a CSV file are taken literally: numbers, "None" and "NA" are answers like any other."""
    rows = [{"prompt": "007", "chosen": "None", "rejected": "1.50"}, {"prompt": "NA", "chosen": "", "rejected": " x "}]
    read = prepared(write(tmp_path / "words.csv", rows))
    assert contents(read.train) == [Paired("007", "None", "1.50"), Paired("NA", "", " x ")]


@pytest.mark.parametrize("labels", [("True", "false"), (1, 0), ("1.0", "0.0"), ("TRUE", "FALSE")], ids=str)
def test_labels_of_a_csv_file(tmp_path: Path, labels: tuple[Any, Any]):
    """A CSV file's label column may be written in words or numbers."""
    path = write(tmp_path / "labels.csv", [{**LABELLED, "label": label} for label in labels])
    assert contents(prepared(path, loss="kto").train) == [Unpaired("q", "yes", True), Unpaired("q", "yes", False)]


def test_several_files_follow_each_other(tmp_path: Path):
    """[[data]] are concatenated in order, each with its own format and `rows`, and [[eval.data]] is held out."""
    texts = [{**TEXT, "prompt": f"text {i}"} for i in range(5)]
    first = write(tmp_path / "a.jsonl", texts)
    second = write(tmp_path / "b.json", [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}])
    held = write(tmp_path / "c.parquet", [TEXT])
    config = {
        "model": {"name": "m"},
        "data": [{"path": str(first), "rows": 2}, {"path": str(second), "rows": 99}],
        "eval": {"data": [{"path": str(held)}]},
    }
    read = prepare(Config.model_validate(config))
    assert [row.content.prompt for row in read.train] == ["text 0", "text 1", [USER]]
    assert contents(read.heldout) == [Paired(TEXT["prompt"], "yes", "no")]
    assert [note.partition(":")[0] for note in read.notes] == ["a.jsonl", "b.json", "c.parquet"]


def test_the_question_of_a_row():
    """A row's question is its text prompt, or the words of the prompt's last turn."""
    assert SourceRow(Paired("q", "yes", "no"), "").question == "q"
    assert SourceRow(Paired([YES, USER], [YES], [NO]), "").question == USER["content"]
    assert SourceRow(Paired([{"role": "assistant", "tool_calls": []}], [YES], [NO]), "").question == ""


# --- Methods -------------------------------------------------------------------------------------------------------


def test_pairs_given_to_kto_are_unpaired_and_said_to_be(tmp_path: Path):
    """KTO takes chosen as true and rejected as false, keeps their row's place, and a note says so."""
    path = write(tmp_path / "pairs.jsonl", [TEXT, TEXT])
    read = prepared(path, loss="kto")
    halves = [Unpaired(TEXT["prompt"], "yes", True), Unpaired(TEXT["prompt"], "no", False)]
    assert contents(read.train) == halves * 2
    assert [row.place for row in read.train] == [f"{path}, row {at}" for at in (0, 0, 1, 1)]
    assert read.notes[1:] == [
        "pairs.jsonl: KTO takes single responses, so each pair counts as one good and one bad response"
    ]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "cpo"])
def test_single_responses_are_refused_where_pairs_are_needed(tmp_path: Path, loss: str):
    """Every other method refuses labelled data, naming the columns there are and the method that takes them."""
    path = write(tmp_path / "rows.jsonl", [LABELLED])
    said = re.escape(f"{path}, row 0: ") + ".*the columns are prompt, completion, label.*" + re.escape('type = "kto"')
    with pytest.raises(UserError, match=said):
        prepared(path, loss=loss)


# --- Mistakes ------------------------------------------------------------------------------------------------------

KNOWN = (
    "known are prompt, chosen and rejected; chosen and rejected conversations; conversations, chosen and rejected; "
    "prompt, completion and label; messages and label"
)
PAIR_LINE = json.dumps(TEXT) + "\n"
BAD_FILES: dict[str, tuple[str, str | bytes | None, str]] = {  # name, what it holds, what is said after the name
    "no file": ("none.jsonl", None, ": there is no such file"),
    "an empty file": ("a.json", "", ": the file is empty"),
    "white space": ("a.jsonl", " \n\n", ": there are no rows"),
    "an empty array": ("a.json", "[]", ": there are no rows"),
    "only a header": ("a.csv", "prompt,chosen,rejected\n", ": there are no rows"),
    "broken JSON": ("a.json", '[{"prompt": "q",', ": cannot be read as json: "),
    "a broken line": ("a.jsonl", PAIR_LINE + "{oops\n", ": cannot be read as json: "),
    "not text": ("a.json", b"\xff\xfe\x00", ": cannot be read as json: "),
    "no parquet": ("a.parquet", PAIR_LINE, ": cannot be read as parquet: "),
    "unknown suffix": (
        "a.txt",
        PAIR_LINE,
        ": files of kind '.txt' are not read; known are .json, .jsonl, .parquet, .csv",
    ),
    "no suffix": ("a", PAIR_LINE, ": files of kind '' are not read; known are .json, .jsonl, .parquet, .csv"),
    "rows under a key": ("a.json", json.dumps({"data": [TEXT]}), f": the columns data are of no known format; {KNOWN}"),
    "a column missing": (
        "a.csv",
        "prompt,chosen,text\nq,yes,no\n",
        f": the columns prompt, chosen, text are of no known format; {KNOWN}",
    ),
    "no label": (
        "a.jsonl",
        '{"prompt": "q", "completion": "yes"}\n',
        f": the columns prompt, completion are of no known format; {KNOWN}",
    ),
    "a missing response": ("a.jsonl", PAIR_LINE + '{"prompt": "q", "chosen": "yes"}\n', ", row 1: rejected is missing"),
    "unknown role": (
        "a.jsonl",
        json.dumps({"prompt": [{"role": "usr", "content": "q"}], "chosen": "yes", "rejected": "no"}),
        ", row 0: prompt has a turn of role 'usr'; known roles are ",
    ),
}


@pytest.mark.parametrize(("name", "held", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, held: str | bytes | None, said: str):
    """One error, on one line, names the file, or the row counted from 0."""
    path = tmp_path / name
    if held is not None:
        path.write_bytes(held.encode() if isinstance(held, str) else held)
    with pytest.raises(UserError) as caught:
        prepared(path)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_nothing_is_printed_beside_the_error(tmp_path: Path):
    """What `datasets` logs of a file that it cannot read, and its progress bars, stay out of the way."""
    write(tmp_path / "good.jsonl", [TEXT])
    (tmp_path / "broken.jsonl").write_text(PAIR_LINE + "{oops\n")
    program = (
        "from fastpref.config import Config; from fastpref.data.sources import prepare; import fastpref\n"
        "data = [{'path': 'good.jsonl'}, {'path': 'broken.jsonl'}]\n"
        "try: prepare(Config.model_validate({'model': {'name': 'm'}, 'data': data}))\n"
        "except fastpref.UserError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.startswith("broken.jsonl: cannot be read as json: ")
    assert ran.stderr == ""


@pytest.mark.parametrize("label", ["yes", "", None, 2, 0.5, -1], ids=repr)
def test_a_bad_label_is_named_with_its_row(tmp_path: Path, label: Any):
    """A label that is neither true nor false is an error, not a guess, wherever in the file it stands."""
    path = write(tmp_path / "rows.jsonl", [LABELLED, {**LABELLED, "label": False}, {**LABELLED, "label": label}])
    with pytest.raises(UserError, match=re.escape(f"{path}, row 2: label must be true or false, 0 or 1, got ")):
        prepared(path, loss="kto")


UNKNOWN: dict[str, tuple[Callable[[Path], str], str]] = {
    "a folder": (str, ": this is a folder; name a .json, .jsonl, .parquet or .csv file in it"),
    "nobody's home": (lambda folder: "~fastpref-nobody/a", ": there is no such file"),
    "relative": (lambda folder: "./none", ": there is no such file"),
    "a name of the hub, offline": (
        lambda folder: "org/none",
        ": neither a file here nor a data set that the hub gives us",
    ),
}


@pytest.mark.parametrize(("name", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_name_that_is_no_file(tmp_path: Path, name: Callable[[Path], str], said: str):
    """A folder, a path that is not there and a data set that cannot be had are each said to be that."""
    with pytest.raises(UserError, match=re.escape(name(tmp_path) + said)):
        prepared(name(tmp_path))


# --- Splits --------------------------------------------------------------------------------------------------------


def rows_of(prompts: int, each: int) -> list[SourceRow]:
    """`each` rows of every prompt, of every third prompt as messages."""
    return [
        SourceRow(Paired(f"p{i}" if i % 3 else [{"role": "user", "content": f"p{i}"}], f"{k}", "no"), "")
        for k in range(each)
        for i in range(prompts)
    ]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_a_prompt_is_on_one_side_only(fraction: float):
    """All rows of a prompt go together; the share held out is near the fraction; order is kept, nothing is lost."""
    rows = rows_of(3000, 2)
    train, heldout = split_by_prompt(rows, fraction)
    held = {json.dumps(row.content.prompt) for row in heldout}
    assert heldout == [row for row in rows if json.dumps(row.content.prompt) in held]
    assert train == [row for row in rows if json.dumps(row.content.prompt) not in held]
    assert abs(len(held) / 3000 - fraction) < 4 * (fraction * (1 - fraction) / 3000) ** 0.5


def test_a_split_depends_on_the_prompts_alone():
    """The same prompts are held out in any order, beside any others, with any responses, and more for more."""
    rows = rows_of(500, 1)
    heldout = contents(split_by_prompt(rows, 0.2)[1])
    assert contents(split_by_prompt(rows[::-1], 0.2)[1]) == heldout[::-1]
    assert contents(split_by_prompt(rows[:250], 0.2)[1]) == [
        content for content in heldout if content in contents(rows[:250])
    ]
    others = [SourceRow(Unpaired(row.content.prompt, "x", True), "elsewhere") for row in rows]
    assert [r.content.prompt for r in split_by_prompt(others, 0.2)[1]] == [content.prompt for content in heldout]
    more = contents(split_by_prompt(rows, 0.4)[1])
    assert all(content in more for content in heldout)


def test_a_fraction_of_a_file_is_held_out(tmp_path: Path):
    """`eval.fraction` splits by prompt after unpairing: both halves of a pair are on the same side."""
    path = write(tmp_path / "pairs.jsonl", [{**TEXT, "prompt": f"p{i}"} for i in range(200)])
    read = prepared(path, loss="kto", eval={"fraction": 0.25})
    prompts = [{str(row.content.prompt) for row in side} for side in (read.train, read.heldout)]
    assert not prompts[0] & prompts[1]
    assert len(read.train) == 2 * len(prompts[0])
    assert len(read.heldout) == 2 * len(prompts[1])
    assert 25 < len(prompts[1]) < 75


@pytest.mark.parametrize(
    ("fraction", "left"), [(1e-9, "10 rows to train on and 0"), (1 - 1e-9, "0 rows to train on and 10")]
)
def test_a_fraction_that_leaves_nothing_is_an_error(tmp_path: Path, fraction: float, left: str):
    """With no prompt on one side there is nothing to do there, and the message says how many rows each would have."""
    path = write(tmp_path / "pairs.jsonl", [{**TEXT, "prompt": f"p{i}"} for i in range(10)])
    with pytest.raises(UserError, match=f"leaves {left}"):
        prepared(path, eval={"fraction": fraction})
