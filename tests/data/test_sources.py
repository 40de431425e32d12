"""Files of every kind become rows in the form that a method needs; otherwise one message names the place at fault."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from fastpref.config import Config, DataConfig, load_config
from fastpref.data.opening import open_records
from fastpref.data.rows.auto import KNOWN
from fastpref.data.rows.content import Paired, RowContent, Unpaired
from fastpref.data.sources import Prepared, SourceRow, prepare, repeats
from fastpref.data.survey import share
from fastpref.errors import UserError

USER = {"role": "user", "content": 'q\n"1", é'}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
TEXT = {"prompt": 'q\n"1", é', "chosen": "yes", "rejected": "no"}
LABELLED = {"prompt": "q", "completion": "yes", "label": True}
CHAT = Paired([USER], [YES], [NO])

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    """Write a file of the kind given by its suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".arrow":
        table = Dataset.from_list(rows).data.table
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".folder":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def prepared(*paths: Path | str, loss: str = "dpo", of_data: Any = (), **tables: Any) -> Prepared:
    """Return the rows of files, each read with the keys `of_data` of its [[data]], in a config with other tables."""
    data = [{"path": str(path), **dict(of_data)} for path in paths]
    return prepare(Config.model_validate({"model": {"name": "m"}, "data": data, "loss": {"type": loss}, **tables}))


def prepare_one(path: Path | str, loss: str = "dpo", **of_data: Any) -> Prepared:
    return prepared(path, loss=loss, of_data=of_data)


def place(path: Path, at: int) -> str:
    """Return the place of row `at` in a file of `write`: one line per row, except that a .json file has one line."""
    line = {".jsonl": f":{at + 1}", ".json": f":1, row {at}", ".csv": f":{at + 2}, row {at}"}
    return f"{path}{line.get(path.suffix, f', row {at}')}"


def contents(rows: Iterable[SourceRow]) -> list[RowContent]:
    return [row.content for row in rows]


# --- Files ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any], str, Paired | Unpaired]] = {  # loss, row, note, result
    "text": ("dpo", TEXT, "text prompt, chosen and rejected", Paired(TEXT["prompt"], "yes", "no")),
    "labelled text": ("kto", LABELLED, "prompt, completion and label", Unpaired("q", "yes", True)),
    "explicit prompt": (
        "orpo", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, "a prompt of messages with chosen and rejected",
        CHAT,
    ),
    "implicit prompt": (
        "simpo", {"chosen": [USER, YES], "rejected": [USER, NO]},
        "chosen and rejected conversations that share their prompt", CHAT,
    ),
    "ShareGPT": (
        "ipo",
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        "ShareGPT conversations with chosen and rejected", CHAT,
    ),
    "labelled messages": (
        "kto", {"messages": [USER, NO], "label": False}, "messages and label", Unpaired([USER], [NO], False),
    ),
}  # fmt: skip
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".folder")
FILES = [(kind, suffix) for kind in KINDS for suffix in SUFFIXES]
FILES = [(kind, suffix) for kind, suffix in FILES if suffix != ".csv" or "text" in kind]  # a CSV file has no lists


@pytest.mark.parametrize(("kind", "suffix"), FILES)
def test_every_kind_of_row_is_read_from_every_kind_of_file(tmp_path: Path, kind: str, suffix: str):
    """The suffix selects the reader, the columns select the format, and a note gives both with the number of rows."""
    loss, row, name, content = KINDS[kind]
    path = write(tmp_path / f"rows{suffix}", [row, row])
    read = prepared(path, loss=loss)
    assert contents(read.train) == [content, content]
    assert len(read.heldout) == 0
    assert read.notes == [f"rows{suffix}: 2 rows of {name}"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow", ".folder"])
def test_keys_that_only_some_messages_have(tmp_path: Path, suffix: str):
    """Tool calls and reasoning are only in messages that have them, though a table has these keys in all messages."""
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    other = {"function": {"name": "read", "arguments": {"path": "a.txt"}}}
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "tool_calls": [other, call]},
    ]
    path = write(tmp_path / f"calls{suffix}", [{"messages": [USER, answer], "label": True} for answer in answers])
    assert contents(prepared(path, loss="kto").train) == [Unpaired([USER], [answer], True) for answer in answers]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".folder"])
def test_nulls_that_a_table_fills_its_rows_with_are_none_of_a_tools(tmp_path: Path, suffix: str):
    """A tool's schema has only its own keys, though a table adds those of the other tools as nulls."""
    tools = tuple(
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("city", "path")
    )
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], "tools": list(tools), "label": True}
    path = write(tmp_path / f"tools{suffix}", [row])
    assert contents(prepared(path, loss="kto").train)[0].writing.tools == tools


def test_a_null_that_a_call_is_made_with_stays(tmp_path: Path):
    """A null argument of a call in JSON is kept."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"limit": None}}]}
    path = write(tmp_path / "calls.jsonl", [{"messages": [USER, call], "label": True}])
    called = {"type": "function", "function": {"name": "f", "arguments": {"limit": None}}}
    turn = {"role": "assistant", "tool_calls": [called]}
    assert contents(prepared(path, loss="kto").train) == [Unpaired([USER], [turn], True)]


def test_words_of_a_csv_file_stay_words(tmp_path: Path):
    """Text columns of a CSV file are taken literally: numbers, "None" and "NA" are text."""
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


def test_formats_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each [[data]] has its own format, whose functions and templates are looked up in the config's folder."""
    (tmp_path / "run" / "elsewhere").mkdir(parents=True)
    folder = tmp_path / "run"
    monkeypatch.chdir(folder / "elsewhere")
    (folder / "mine.py").write_text("def read(row): return {'prompt': row['q'], 'chosen': 'yes', 'rejected': 'no'}")
    (folder / "mine.jinja").write_text("{{ messages }}")
    write(folder / "a.jsonl", [{"q": "1"}])
    write(folder / "b.csv", [{"question": "2", "chosen": "yes", "rejected": "no"}])
    write(folder / "c.json", [{"talk": "3", "chosen": "yes", "rejected": "no"}])
    (folder / "cfg.toml").write_text(
        """
        [model]
        name = "m"
        [[data]]
        path = "a.jsonl"
        format = "mine:read"
        [[data]]
        path = "b.csv"
        format = { field_prompt = "question" }
        [[data]]
        path = "c.json"
        [data.format]
        type = "chat_template.default"
        field_messages = "talk"
        chat_template = "mine.jinja"
        """
    )
    read = prepare(load_config(folder / "cfg.toml"))
    assert [row.content.prompt for row in read.train] == ["1", "2", [{"role": "user", "content": "3"}]]
    assert read.train[2].content.writing.chat_template == "{{ messages }}"
    assert [note.partition(": ")[2] for note in read.notes] == [
        "1 rows of the function read",
        "1 rows of table",
        "1 rows of chat_template.default",
    ]


def test_the_question_of_a_row():
    """A row's question is its text prompt, or the text of the prompt's last turn."""
    assert SourceRow(Paired("q", "yes", "no"), "").question == "q"
    assert SourceRow(Paired([YES, USER], [YES], [NO]), "").question == USER["content"]
    assert SourceRow(Paired([{"role": "assistant", "tool_calls": []}], [YES], [NO]), "").question == ""


# --- Methods -------------------------------------------------------------------------------------------------------


def test_pairs_given_to_kto_are_unpaired_and_said_to_be(tmp_path: Path):
    """For KTO, chosen becomes true and rejected false, both keep their row's place, and a note says so."""
    path = write(tmp_path / "pairs.jsonl", [TEXT, TEXT])
    read = prepared(path, loss="kto")
    halves = [Unpaired(TEXT["prompt"], "yes", True), Unpaired(TEXT["prompt"], "no", False)]
    assert contents(read.train) == halves * 2
    assert [str(row.place) for row in read.train] == [f"{path}:{line}" for line in (1, 1, 2, 2)]
    assert read.notes[1:] == [
        "pairs.jsonl: KTO takes single completions, so each pair counts as one good and one bad completion"
    ]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "cpo"])
def test_single_completions_are_refused_where_pairs_are_needed(tmp_path: Path, loss: str):
    """Every other method refuses single completions, and names the columns and the method that takes them."""
    path = write(tmp_path / "rows.jsonl", [LABELLED])
    message = re.escape(f"{path}:1: ") + ".*the columns are prompt, completion, label.*" + re.escape('type = "kto"')
    with pytest.raises(UserError, match=message):
        prepared(path, loss=loss)


# --- Mistakes ------------------------------------------------------------------------------------------------------

AUTO = f"of no format that auto knows, which are {KNOWN}"
OWN = (
    'your own columns are named by format = { field_prompt = "...", ... }, or joined by a Python function, '
    '"module:function"'
)
PAIR_LINE = json.dumps(TEXT) + "\n"


def parquet(columns: list[str], rows: int) -> bytes:
    """Return a parquet file of text in which columns may have the same name."""
    written = io.BytesIO()
    pq.write_table(pa.table([pa.array(["x"] * rows, pa.string())] * len(columns), names=columns), written)
    return written.getvalue()


BAD_FILES: dict[str, tuple[str, str | bytes | None, str]] = {  # name, content, the message after the name
    "no file": ("none.jsonl", None, ": there is no such file"),
    "an empty file": ("a.json", "", ": the file is empty"),
    "white space": ("a.jsonl", " \n\n", ": there are no rows"),
    "an empty array": ("a.json", " [ ]\n", ": there are no rows"),
    "only a header": ("a.csv", "prompt,chosen,rejected\n", ": there are no rows"),
    "an array cut short": (
        "a.json", '[{"prompt": "q"},\n {"prompt": "q",',
        ":2: not valid JSON at column 17: Expecting property name enclosed in double quotes; mend it, or write one row "
        'a line (.jsonl), of which on_error = "drop" leaves out the broken ones',
    ),
    "an array without commas": (
        "a.json", '[{"é": 1}\n{"prompt": 2}]', ":2: not valid JSON at column 1: Expecting ',' or ']'; mend it",
    ),
    "something after the array": ("a.json", "[1]\n[2]", ":2: not valid JSON at column 1: Something follows the array"),
    "one object over lines": (
        "a.json", json.dumps({"mine": [TEXT]}, indent=1),
        ": this is one object, and a file of rows is a list of objects, [{...}, ...], or has it under \"data\"",
    ),
    "a broken line": (
        "a.jsonl", PAIR_LINE + "\n{oops\n",
        ":3: not valid JSON at column 2: Expecting property name enclosed in double quotes; mend the row, or leave "
        'such rows out with on_error = "drop"',
    ),
    "a broken first line": (
        "a.jsonl", '{"prompt": }\n' + PAIR_LINE, ":1: not valid JSON at column 12: Expecting value",
    ),
    "a broken line of a .json file": ("a.json", PAIR_LINE + "{oops\n", ":2: not valid JSON at column 2: "),
    "a line that is no object": ("a.jsonl", PAIR_LINE + "[1, 2]\n", ":2: a row is an object {...}, got [1, 2]"),
    "an element that is no object": ("a.json", f"[{PAIR_LINE},3]", ":2, row 1: a row is an object {...}, got 3"),
    "too deep an element": ("a.json", '[{"prompt": "q"},\n' + "[" * 10**5, ":2: not valid JSON at column 1: "),
    "too deep": ("a.jsonl", PAIR_LINE + "[" * 10**5, ":2: not readable as JSON: "),
    "a number of 5,000 digits": ("a.jsonl", PAIR_LINE + "1" * 5000, ":2: not readable as JSON: "),
    "not UTF-8": (
        "a.jsonl", PAIR_LINE.encode() + b'{"prompt": "caf\xe9"}\n',
        ":2: byte 16 of the row, 0xe9, is not UTF-8; save the file as UTF-8",
    ),
    "not UTF-8 in an array": (
        "a.json", '[{"prompt": "é"},\n'.encode() + b'{"prompt": "caf\xe9"}]',
        ":2, row 1: byte 16 of the row, 0xe9, is not UTF-8; save the file as UTF-8",
    ),
    "not UTF-8 in a table": (
        "a.csv", "prompt,chosen,rejected\né,b,c\n".encode() + b"caf\xe9,b,c\n",
        ":3, row 1: byte 4 of the row, 0xe9, is not UTF-8; save the file as UTF-8",
    ),
    "UTF-16 without a mark": ("a.jsonl", PAIR_LINE.encode("utf-16-le"), ": the file is UTF-16, and UTF-8 is read"),
    "UTF-16": ("a.csv", "prompt\tchosen\n".encode("utf-16"), ": the file is UTF-16, and UTF-8 is read; save it as "),
    "half a character": (
        "a.jsonl", PAIR_LINE + '{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}',
        ":2: '\\ud83d' is half a character, which no text holds",
    ),
    "no parquet": ("a.parquet", PAIR_LINE, ": cannot be read as parquet: "),
    "no arrow": ("a.arrow", PAIR_LINE, ": cannot be read as arrow: "),
    "unknown suffix": (
        "a.txt", PAIR_LINE, ": files of kind '.txt' are not read; known are .json, .jsonl, .ndjson, .csv, .tsv, ",
    ),
    "no suffix": ("a", PAIR_LINE, ": files of kind '' are not read; known are .json, .jsonl, .ndjson, .csv"),
    "rows under an unknown key": ("a.json", json.dumps({"mine": [TEXT]}), f": the columns mine are {AUTO}; {OWN}"),
    "rows under two keys": (
        "a.json", json.dumps({"data": [TEXT], "train": [TEXT]}, indent=1),
        ": this is one object, and a file of rows is a list of objects, [{...}, ...], or has it under \"data\"; data "
        "and train are lists here, so write a file of each",
    ),
    "not packed": ("a.jsonl.gz", PAIR_LINE, ": cannot be unpacked: Not a gzipped file"),
    "packed by half": (
        "a.jsonl.gz", gzip.compress(PAIR_LINE.encode())[:-9],
        ": cannot be unpacked: Compressed file ended before the end-of-stream marker was reached",
    ),
    "nothing packed": ("a.csv.gz", gzip.compress(b""), ": the file is empty"),
    "another packing": ("a.jsonl.zst", PAIR_LINE, ": files of kind '.zst' are not read; known are .json, .jsonl, "),
    "a packed table": ("a.parquet.gz", PAIR_LINE, ": files of kind '.gz' are not read; known are .json, .jsonl, "),
    "a column missing": (
        "a.csv", "prompt,chosen,text\nq,yes,no\n", f": the columns prompt, chosen, text are {AUTO}; {OWN}",
    ),
    "columns of a named format": (
        "a.csv", "question,chosen,rejected\nq,yes,no\n",
        f": the columns question, chosen, rejected are {AUTO}; these columns fit format = "
        '{ type = "chat_template.default", field_messages = "question" } or { field_prompt = "question" } or '
        '"chatml.default"; ',
    ),
    "a field too many": (
        "a.csv", 'prompt,chosen,rejected\nq,yes,no\n"q\n1",yes, it is,no\n',
        ":3, row 1: there are 4 fields, and the header names 3; text that holds a comma or a line end stands in",
    ),
    "a quote that does not end": (
        "a.csv", 'prompt,chosen,rejected\nq,yes,no\nq,yes,"no\nq,yes,no\n',
        ":3, row 1: not valid CSV: unexpected end of data; a field that begins with a quote ends with one",
    ),
    "a quote that ends in another row": (
        "a.csv", 'prompt,chosen,rejected\nq,yes,no\nq,yes,"no\nq,"yes",no\n', ":3, row 1: not valid CSV: ',' expected",
    ),
    "a quoted word at the beginning": (
        "a.tsv", 'prompt\tchosen\trejected\n"Hi", he said\tyes\tno\n', ":2, row 0: not valid CSV: '\t' expected after",
    ),
    "lines that end as on an old Mac": (
        "a.csv", "prompt,chosen,rejected\rq,yes,no\r", ":1: not valid CSV: a carriage return stands outside quotes",
    ),
    "a key twice": (
        "a.jsonl", PAIR_LINE + '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}',
        ":2: the key 'chosen' is there twice, and only one of its values can be meant; mend the row",
    ),
    "a key twice in a message": (
        "a.json", '[{"chosen": [{"role": "user", "content": "a", "content": "b"}]}]', ":1, row 0: the key 'content' is",
    ),
    "a column twice in a table": (
        "a.parquet", parquet(["chosen", "rejected", "chosen"], 1), ": two columns are named 'chosen'; rename or remove",
    ),
    "a table without rows": ("a.parquet", parquet(["chosen", "rejected"], 0), ": there are no rows"),
    "a column twice": ("a.csv", "prompt,prompt\n1,2\n", ":1: the header names the column 'prompt' twice"),
    "a missing completion": (
        "a.jsonl", PAIR_LINE + '{"prompt": "q", "chosen": "yes"}\n',
        ":2: there is no column rejected; the columns are prompt, chosen; your own columns are named by",
    ),
    "a wrong type": (
        "a.json", json.dumps([TEXT, {"prompt": "q", "chosen": 3.5, "rejected": "no"}], indent=0),
        ":7, row 1: chosen must be text or a list of messages, got 3.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "held", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, held: str | bytes | None, message: str):
    """One error, on one line, names the file and the line, or the row counted from 0."""
    path = tmp_path / name
    if held is not None:
        path.write_bytes(held.encode() if isinstance(held, str) else held)
    with pytest.raises(UserError) as caught:
        prepared(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


BAD_ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {  # format, row, the message after the place
    "a text column of messages": (
        "chatml.intel", {"question": "q", "chosen": [YES], "rejected": "no"},
        "chosen must be text, got [{'role': 'assistant', 'content': 'yes'}]; the formats chat_template.* and auto read",
    ),
    "a column of another format": (
        "chatml.intel", TEXT,
        "there is no column question; the columns are prompt, chosen, rejected; these columns fit format = "
        '"auto" or { type = "chat_template.default", field_messages = "prompt" } or { field_prompt = "prompt" }; ',
    ),
    "no question at all": (
        "llama3.default", {"chosen": "yes", "rejected": "no"},
        "there is no column prompt, input, question or instruction; the columns are chosen, rejected",
    ),
    "an empty row": ("passthrough", {}, "there is no column prompt; the row is empty"),
    "tool calls without a template": (
        "chatml.argilla_chat",
        {"chosen": [USER, {**YES, "tool_calls": [{"function": {"name": "f"}}]}], "rejected": [USER, NO]},
        "chosen has a turn of role 'assistant' that is more than text; a chat_template format writes it",
    ),
    "a conversation without a prompt": (
        "chat_template.argilla_chat", {"chosen": [YES], "rejected": [NO]},
        "chosen must end with an assistant turn that answers something before it",
    ),
    "a completion of the user's": (
        "chat_template.default", {"messages": "q", "chosen": USER, "rejected": "no"},
        "chosen ends with a turn of role 'user'; a completion ends with the assistant's",
    ),
    "content that is a number": (
        "chat_template.default", {"messages": [{"role": "user", "content": 3}], "chosen": "yes", "rejected": "no"},
        "messages has a turn of role 'user' whose content is 3, not text",
    ),
    "an unknown role of ones own": (
        {"type": "chat_template.default", "roles": {"assistant": ["bot"]}},
        {"messages": [{"role": "robot", "content": "q"}], "chosen": "yes", "rejected": "no"},
        "messages has a turn of role 'robot'; known roles are system, developer, user, assistant, tool, human, gpt, "
        "chatgpt, bing, bard, observation, function_call, tool_call, "
        "tool_response, function, bot; name others by the option roles",
    ),
    "tools that are no JSON": (
        "chat_template.default", {"messages": "q", "chosen": "yes", "rejected": "no", "tools": "[{"},
        "tools is not valid JSON: Expecting property name",
    ),
    "tools that are none": (
        "chat_template.default", {"messages": "q", "chosen": "yes", "rejected": "no", "tools": ["search"]},
        "tools must be a list of tools' JSON schemas, got ['search']",
    ),
    "a system prompt that is a list": (
        "chat_template.default", {"messages": "q", "chosen": "yes", "rejected": "no", "system": ["s"]},
        "system must be text, got ['s']",
    ),
    "one answer": (
        "zephyr.nectar", {"prompt": "q", "answers": [{"answer": "a", "rank": 1}]},
        "answers has 1 completion, and a comparison needs two",
    ),
    "an answer without a rank": (
        "zephyr.nectar", {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        "answers holds {'answer': 'b'}, which has no rank",
    ),
    "answers of one rank": (
        "zephyr.nectar", {"prompt": "q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 2}]},
        "all answers have rank 2, so none is better",
    ),
    "a column that the table does not name": (
        {"field_prompt": "ask"}, TEXT, "there is no column ask; the columns are prompt, chosen, rejected",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("format", "row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_not_of_a_named_format(tmp_path: Path, format: Any, row: dict[str, Any], message: str):
    """The message names the line, the column and its value, and the formats that fit, if any."""
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        prepare_one(path, format=format)
    assert str(caught.value).startswith(f"{path}:1: {message}")


def test_a_row_without_a_column_of_the_others_can_be_left_out(tmp_path: Path):
    """The message about a row without a column that rows before it have names on_error, which leaves it out."""
    path = write(tmp_path / "a.jsonl", [TEXT, {"prompt": "q", "chosen": "yes"}])
    with pytest.raises(
        UserError, match=r":2: there is no column rejected; .*; rows without it are left out with on_err"
    ):
        prepare_one(path)
    assert len(prepare_one(path, on_error="drop").train) == 1


def test_a_label_of_another_column_is_named(tmp_path: Path):
    """A table's own label column is read like any label, and the error about a bad one gives that column's name."""
    path = tmp_path / "rows.csv"
    path.write_text("q,a,good\nQ,A,1\nQ,B,0\nQ,C,maybe\n")
    table = {"field_prompt": "q", "field_completion": "a", "field_label": "good"}
    message = re.escape(f"{path}:4, row 2: good must be true or false, 0 or 1, got 'maybe'")
    with pytest.raises(UserError, match=message):
        prepare_one(path, loss="kto", format=table)
    assert contents(prepare_one(path, loss="kto", format=table, rows=2).train) == [
        Unpaired("Q", "A", True),
        Unpaired("Q", "B", False),
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_byte_order_marks_and_windows_line_ends(tmp_path: Path, suffix: str):
    """Files with a byte order mark and Windows line ends have the same rows and line numbers as others."""
    plain = write(tmp_path / f"plain{suffix}", [{"prompt": f"é {i}", "chosen": "y", "rejected": "n"} for i in range(3)])
    text = plain.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    windows = tmp_path / f"windows{suffix}"
    windows.write_bytes(b"\xef\xbb\xbf" + text)
    assert contents(prepared(windows).train) == contents(prepared(plain).train)
    assert [str(row.place) for row in prepared(windows).train] == [place(windows, at) for at in range(3)]


def test_lines_are_those_of_an_editor(tmp_path: Path):
    """Line numbers are those of an editor, also with empty lines, pretty-printed objects and cells of several lines."""
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n" + PAIR_LINE + "\n \n" + PAIR_LINE)
    assert [str(row.place) for row in prepared(lines).train] == [f"{lines}:2", f"{lines}:5"]
    pretty = tmp_path / "a.json"
    pretty.write_text(json.dumps([TEXT, TEXT], indent=2))
    assert [str(row.place) for row in prepared(pretty).train] == [f"{pretty}:2, row 0", f"{pretty}:7, row 1"]
    table = write(tmp_path / "a.csv", [TEXT, TEXT])  # the prompt has two lines
    assert [str(row.place) for row in prepared(table).train] == [f"{table}:2, row 0", f"{table}:4, row 1"]


def broken(at: int) -> str:
    """Return a row's line; every tenth line is broken in one of four ways."""
    ways = ["{oops", "[1]", '{"prompt": "q", "chosen": null, "rejected": "no"}', '{"prompt": "q"}']
    return ways[at // 10 % 4] if at % 10 == 3 else json.dumps({**TEXT, "prompt": f"p{at}"})


def test_broken_rows_are_left_out_and_counted(tmp_path: Path):
    """With on_error = "drop" only the broken rows are left out, and a note counts them by kind."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(broken(at) for at in range(100)))
    read = prepare_one(path, on_error="drop")
    assert [row.content.prompt for row in read.train] == [f"p{at}" for at in range(100) if at % 10 != 3]
    note = read.notes[1]
    assert note.startswith("rows.jsonl: 10 of 100 rows left out: 3 not valid JSON (the first: ")
    for message in (
        f"{path}:4: not valid JSON at column 2",
        f"3 no object (the first: {path}:14: a row is",
        f"2 with a null (the first: {path}:24: chosen is missing",
        f"2 without a column (the first: {path}:34: there is no column chosen",
    ):
        assert message in note
    with pytest.raises(UserError, match=re.escape(f"{path}:4: not valid JSON")):
        prepare_one(path)


@pytest.mark.parametrize("first", ["{oops", '{"prompt": "q"}', "3"])
def test_a_broken_first_row_is_left_out_too(tmp_path: Path, first: str):
    """If the first row is broken, `auto` detects the format from the first readable row."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{first}\n{PAIR_LINE}")
    assert contents(prepare_one(path, on_error="drop").train) == [Paired(TEXT["prompt"], "yes", "no")]
    with pytest.raises(UserError, match=re.escape(f"{path}:1: ")):
        prepare_one(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{oops", "3"], "no row can be read; the first: "),
        (['{"prompt": "q"}'], "the columns prompt are of no format"),
        (["3", '{"prompt": null, "chosen": "x", "rejected": ""}'], "the columns prompt, chosen, rejected are of no"),
    ],
    ids=["no JSON", "no format", "no row"],
)
def test_a_file_of_broken_rows_is_an_error(tmp_path: Path, lines: list[str], message: str):
    """If no row can be used, there is an error whatever on_error says."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        prepare_one(path, on_error="drop")
    path.write_text('{"prompt": 1}\n{"prompt": null}')
    message = (
        f"{path}: none of the 2 rows can be used: 1 with a value of another type (the first: {path}:1: prompt must"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_one(path, on_error="drop", format="passthrough")


def test_nothing_is_printed_beside_the_error(tmp_path: Path):
    """Nothing that `datasets` logs about an unreadable file, and no progress bar, is printed with the error."""
    write(tmp_path / "good.parquet", [TEXT])
    (tmp_path / "broken.parquet").write_text(PAIR_LINE + "{oops\n")
    program = (
        "from fastpref.config import Config; from fastpref.data.sources import prepare; import fastpref\n"
        "data = [{'path': 'good.parquet'}, {'path': 'broken.parquet'}]\n"
        "try: prepare(Config.model_validate({'model': {'name': 'm'}, 'data': data}))\n"
        "except fastpref.UserError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.startswith("broken.parquet: cannot be read as parquet: ")
    assert ran.stderr == ""


@pytest.mark.parametrize("label", ["yes", "", 2, 0.5, -1], ids=repr)
def test_a_bad_label_is_named_with_its_row(tmp_path: Path, label: Any):
    """A label that is neither true nor false is an error wherever it is in the file."""
    path = write(tmp_path / "rows.jsonl", [LABELLED, {**LABELLED, "label": False}, {**LABELLED, "label": label}])
    with pytest.raises(UserError, match=re.escape(f"{path}:3: label must be true or false, 0 or 1, got ")):
        prepared(path, loss="kto")


UNKNOWN: dict[str, tuple[Callable[[Path], str], str]] = {
    "a folder": (str, ": there is no file in this folder that is read; known are .json, .jsonl, .ndjson, "),
    "a pattern": (lambda folder: f"{folder}/*.jsonl", ": no file matches this pattern"),
    "nobody's home": (lambda folder: "~fastpref-nobody/a", ": there is no such file"),
    "relative": (lambda folder: "./none", ": there is no such file"),
    "a name of the hub, offline": (
        lambda folder: "org/none", ": neither a file here nor a data set that the hub gives us",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_name_that_is_no_file(tmp_path: Path, name: Callable[[Path], str], message: str):
    """A plain folder, a missing path and an unavailable data set each have their own message."""
    with pytest.raises(UserError, match=re.escape(name(tmp_path) + message)):
        prepared(name(tmp_path))


def test_both_kinds_of_arrow_file(tmp_path: Path):
    """A .arrow file can be a stream, or have an index at its end."""
    table = Dataset.from_list([TEXT, TEXT]).data.table
    for kind, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / f"{kind}.arrow"), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
        assert len(prepared(tmp_path / f"{kind}.arrow").train) == 2


def test_a_folder_of_several_splits(tmp_path: Path):
    """`split` selects one of a saved DatasetDict's splits; an unknown name is an error that lists them."""
    made = DatasetDict({name: Dataset.from_list([{**TEXT, "prompt": name}]) for name in ("train", "test")})
    made.save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        assert [r.content.prompt for r in prepare_one(tmp_path / "saved", split=split).train] == [split]
    with pytest.raises(UserError, match=re.escape("saved: there is no split 'dev'; there are train, test")):
        prepare_one(tmp_path / "saved", split="dev")


# --- Weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 0.5, 1, 1.25, 2, 2.5, 3.001])
def test_a_weight_is_how_often_rows_are_used(tmp_path: Path, weight: float):
    """Every row is used ⌊weight⌋ times, and a fixed share of the rows once more."""
    path = write(tmp_path / "rows.jsonl", [{**TEXT, "prompt": f"p{i}"} for i in range(40)])
    prompts = [str(row.content.prompt) for row in prepare_one(path, weight=weight).train]
    assert prompts == [str(row.content.prompt) for row in prepare_one(path, weight=weight).train]
    assert len(prompts) == round(40 * weight)
    times = {prompts.count(f"p{i}") for i in range(40)}
    assert times <= {int(weight), int(weight) + 1}


def test_a_smaller_weight_uses_a_part_of_a_larger_ones_rows():
    """The rows of a smaller weight are a subset of those of a larger one, and rows keep their order."""
    few, more = list(repeats(1000, 0.2)), list(repeats(1000, 0.5))
    assert set(few) < set(more)
    assert more == sorted(more)
    assert max(more) > 900
    assert min(more) < 100
    assert list(repeats(3, 2)) == [0, 1, 2, 0, 1, 2]
    assert list(repeats(3, 0.01)) == []


def test_a_weight_is_noted(tmp_path: Path):
    """A note gives the number of rows with the weight and without it."""
    path = write(tmp_path / "rows.jsonl", [TEXT] * 10)
    assert prepare_one(path, weight=2.5).notes[-1] == "rows.jsonl: weight 2.5 makes 25 rows of 10"


def test_a_weight_that_leaves_nothing_is_an_error(tmp_path: Path):
    """A weight that leaves no row of a source is an error."""
    path = write(tmp_path / "rows.jsonl", [TEXT] * 3)
    with pytest.raises(UserError, match=re.escape(f"{path}: weight 0.1 leaves no row; choose a larger one")):
        prepare_one(path, weight=0.1)


def test_exact_duplicates_are_dropped_on_request(tmp_path: Path):
    """tokens.duplicates = "drop" keeps the first of equal rows in all sources together, before weights apply."""
    other = {**TEXT, "rejected": "never"}
    first = write(tmp_path / "a.jsonl", [TEXT, other, TEXT, {**TEXT, "id": 7}])
    second = write(tmp_path / "b.parquet", [other, {**TEXT, "chosen": "sure"}])
    raw = {"model": {"name": "m"}, "data": [{"path": str(first), "weight": 2.0}, {"path": str(second)}]}
    kept = prepare(Config.model_validate(raw | {"tokens": {"duplicates": "drop"}}))
    a, b, c = Paired(TEXT["prompt"], "yes", "no"), Paired(TEXT["prompt"], "yes", "never"), TEXT["prompt"]
    assert contents(kept.train) == [a, b, a, b, Paired(c, "sure", "no")]
    assert "a.jsonl: 2 exact duplicates left out" in kept.notes
    assert "b.parquet: 1 exact duplicates left out" in kept.notes
    assert len(prepare(Config.model_validate(raw)).train) == 2 * 4 + 2


def test_rows_are_read_when_asked_for(tmp_path: Path):
    """Rows are a sequence (index, negative index, slice, repeated access), and are read on access."""
    path = write(tmp_path / "rows.parquet", [{**TEXT, "prompt": f"p{i}"} for i in range(600)])
    rows = prepared(path).train
    assert len(rows) == 600
    assert [rows[i].content.prompt for i in (5, 599, 0, -1)] == ["p5", "p599", "p0", "p599"]
    assert [row.content.prompt for row in rows[10:12]] == ["p10", "p11"]
    assert contents(rows) == contents(rows)
    with pytest.raises(IndexError):
        rows[600]
    assert str(rows[599].place) == f"{path}, row 599"


# --- Splits --------------------------------------------------------------------------------------------------------

PROMPTS = [f"p{i}" if i % 3 else [{"role": "user", "content": f"p{i}"}] for i in range(3000)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_shares_are_even(fraction: float):
    """Of many prompts, a fraction f has a share below f."""
    held = sum(share(prompt) < fraction for prompt in PROMPTS)
    assert abs(held / 3000 - fraction) < 4 * (fraction * (1 - fraction) / 3000) ** 0.5


def test_a_split_depends_on_the_prompts_alone(tmp_path: Path):
    """Whether a prompt is held out depends on neither order, other rows nor completions; rows keep their order."""
    rows = [
        {"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in PROMPTS[:200] if isinstance(prompt, str)
    ]
    held = [row["prompt"] for row in rows if share(row["prompt"]) < 0.2]
    others = [{**row, "chosen": "x"} for row in rows]
    for at, given in enumerate((rows, rows[::-1], rows[:50], others, rows + others)):
        read = prepared(write(tmp_path / f"{at}.jsonl", given), eval={"fraction": 0.2})
        prompts = [row["prompt"] for row in given]
        assert [row.content.prompt for row in read.heldout] == [prompt for prompt in prompts if prompt in held]
        assert [row.content.prompt for row in read.train] == [prompt for prompt in prompts if prompt not in held]


def test_a_weight_does_not_cross_the_split(tmp_path: Path):
    """Both copies of a row that is used twice are on the same side."""
    path = write(tmp_path / "rows.jsonl", [{**TEXT, "prompt": f"p{i}"} for i in range(50)])
    read = prepared(path, of_data={"weight": 2.0}, eval={"fraction": 0.3})
    sides = [[str(row.content.prompt) for row in side] for side in (read.train, read.heldout)]
    assert not set(sides[0]) & set(sides[1])
    assert all(side.count(prompt) == 2 for side in sides for prompt in side)


def test_a_fraction_of_a_file_is_held_out(tmp_path: Path):
    """`eval.fraction` splits by prompt after unpairing, so that both halves of a pair are on the same side."""
    path = write(tmp_path / "pairs.jsonl", [{**TEXT, "prompt": f"p{i}"} for i in range(200)])
    read = prepared(path, loss="kto", eval={"fraction": 0.25})
    prompts = [{str(row.content.prompt) for row in side} for side in (read.train, read.heldout)]
    assert not prompts[0] & prompts[1]
    assert len(read.train) == 2 * len(prompts[0])
    assert len(read.heldout) == 2 * len(prompts[1])
    assert 25 < len(prompts[1]) < 75


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_each_side_has_a_prompt(tmp_path: Path, fraction: float, count: int):
    """Each side gets a prompt, however small file and fraction; held-out prompts have the least shares."""
    rows = [{**TEXT, "prompt": f"p{i // 2}"} for i in range(2 * count)]
    read = prepared(write(tmp_path / "pairs.jsonl", rows), eval={"fraction": fraction})
    prompts = [{str(row.content.prompt) for row in side} for side in (read.train, read.heldout)]
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert max(map(share, prompts[1])) < min(map(share, prompts[0]))
    exact = {prompt for prompt in prompts[0] | prompts[1] if share(prompt) < fraction}
    moved = len(exact) in (0, count)
    assert (len(prompts[1]) == (1 if not exact else count - 1)) if moved else prompts[1] == exact
    assert any("each side gets one at least" in note for note in read.notes) == moved


def test_one_prompt_cannot_be_split(tmp_path: Path):
    """If all rows have one prompt, the message says so and gives a remedy."""
    path = write(tmp_path / "pairs.jsonl", [{**TEXT, "chosen": f"yes {i}"} for i in range(10)])
    with pytest.raises(UserError, match=r"all 10 rows have the same one; .*\[\[eval\.data\]\]"):
        prepared(path, eval={"fraction": 0.5})


def test_a_split_of_a_folder_without_splits_is_an_error(tmp_path: Path):
    """A key that says which part is meant must not be passed over where there are no parts."""
    Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"data\.split = 'test': this folder holds one data set without splits"):
        open_records(DataConfig(path=str(tmp_path / "saved"), split="test"))
