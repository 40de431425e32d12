"""One name may stand for a file of any kind, a folder of files with splits, or a pattern of files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fastpref.config import Config, DataConfig, load_config
from fastpref.data.opening import content_hash, open_records
from fastpref.data.sources import Prepared, prepare
from fastpref.errors import UserError

ROWS = [{"prompt": f'p, {at}; \t| "é"\n', "chosen": "yes", "rejected": "no"} for at in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def read(path: Path | str, **keys: Any) -> Prepared:
    return prepare(Config.model_validate({"model": {"name": "m"}, "data": [{"path": str(path), **keys}]}))


def rows_of(prepared: Prepared) -> list[str]:
    return [row.content.prompt for row in prepared.train if isinstance(row.content.prompt, str)]


def write(folder: Path, *names: str) -> Path:
    """Write the rows to each file, and put the file's name into every prompt."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"prompt": f"{name} {at}"} for at, row in enumerate(ROWS[:2])]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if "twice" in name:
            lines = lines.replace(b'"rejected"', b'"chosen"')
        if path.suffix == ".parquet":
            Dataset.from_list(rows).select(range(0 if "none" in name else 2)).to_parquet(path)
        else:
            path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return folder


FILES: dict[str, tuple[str, str, str]] = {  # name of the file, content, words of the note before the usual one
    "lines": ("a.ndjson", LINES, ""),
    "capitals": ("A.JSONL", LINES, ""),
    "an array in a file of lines": ("a.jsonl", json.dumps(ROWS, indent=1), ""),
    "an array on the line of such a file": ("a.jsonl", json.dumps(ROWS), ""),
    "rows under a key": ("a.json", json.dumps({"data": ROWS}), ""),
    "rows under a key among others": ("a.json", json.dumps({"é": 1.5, "rows": ROWS, "of": {"x": []}}, indent=2), ""),
    "commas": ("a.csv", table(","), ""),
    "semicolons": ("a.csv", table(";"), "a semicolon separates"),
    "bars": ("a.csv", table("|"), "a bar separates"),
    "tabs": ("a.csv", table("\t"), "a tab separates"),
    "what Excel was told": ("a.csv", "sep=;\n" + table(";"), "a semicolon separates"),
    "semicolons beside as many commas": (
        "a.csv",
        table(";").replace("prompt;chosen;rejected", "prompt;chosen;rejected;of, by, at, in").replace("no\r", "no;x\r"),
        "a semicolon separates",
    ),
    "tabs by name": ("a.tsv", table("\t"), ""),
    "commas in a file of tabs": ("a.tsv", table(","), "a comma separates"),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("name", "text", "note"), FILES.values(), ids=FILES)
def test_a_file_is_read_whatever_its_form(tmp_path: Path, name: str, text: str, note: str, packing: str):
    """Rows, places and notes of a file are the same, packed or not, with a byte order mark or without."""
    path = tmp_path / f"{name}{packing}"
    for mark in ("", "\ufeff"):
        path.write_bytes(PACKINGS[packing]((mark + text).encode()))
        prepared = read(path)
        assert rows_of(prepared) == [row["prompt"] for row in ROWS]
        assert [note in first for first in prepared.notes[:-1]] == [True] * bool(note)
    assert str(prepared.train[0].place).startswith(f"{path}:")


def test_a_row_of_one_object_is_a_row(tmp_path: Path):
    """An object on one line that has the columns of a row is one, though it holds a list of objects."""
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0] | {"data": [{}]}))
    assert rows_of(read(tmp_path / "a.json")) == [ROWS[0]["prompt"]]


README = """---
configs:
- config_name: first
  data_files: one.jsonl
- config_name: second
  data_files: [{split: test, path: two.jsonl}]
---
"""
FOLDERS: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[str, ...], str]] = {
    # files, keys of [[data]], the files that are read, a part of the notes
    "shards of the hub": (
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        {}, ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"), "2 files, train-00000",
    ),
    "another split": (("train.jsonl", "dev.jsonl"), {"split": "validation"}, ("dev.jsonl",), "1 file, dev.jsonl"),
    "files without splits": (("b.jsonl", "a.jsonl", "c/d.jsonl"), {}, ("a.jsonl", "b.jsonl", "c/d.jsonl"), "3 files"),
    "packed files": (("a.jsonl.gz", "b.jsonl.gz"), {}, ("a.jsonl.gz", "b.jsonl.gz"), "2 files"),
    "a shard without rows": (
        ("train-0.parquet", "train-1.none.parquet", "train-2.parquet"), {}, ("train-0.parquet", "train-2.parquet"),
        "3 files",
    ),
    "the same names in two folders": (("a/x.jsonl", "b/x.jsonl"), {}, ("a/x.jsonl", "b/x.jsonl"), "a/x.jsonl to b/x"),
    "hidden files": ((".cache/a.jsonl", "b.jsonl"), {}, ("b.jsonl",), "1 file, b.jsonl"),
    "a file of no split": (("train.jsonl", "more.jsonl"), {}, ("train.jsonl",), "because no split has it: more.jsonl"),
    "parts of a README": (("one.jsonl", "two.jsonl"), {"name": "second", "split": "test"}, ("two.jsonl",), "1 file"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "keys", "wanted", "note"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_files(tmp_path: Path, files: tuple[str, ...], keys: dict, wanted: tuple[str, ...], note: str):
    """The files of the split are read in order, each row has the place of its file, and what is not read is said."""
    folder = write(tmp_path / "f", *files)
    if "name" in keys:
        (folder / "README.md").write_text(README)
    prepared = read(folder, **keys)
    assert rows_of(prepared) == [f"{name} {at}" for name in wanted for at in range(2)]
    assert str(folder / wanted[-1]) in str(prepared.train[-1].place)
    assert note in " ".join(prepared.notes)


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {  # files, keys, the message
    "no such split": (("train.jsonl",), {"split": "dev"}, "f: there is no split 'dev'; there are train. Select one"),
    "only another split": (("test.jsonl", "a.jsonl"), {}, "f: there is no split 'train'; there are test. Select one"),
    "a revision": (("a.jsonl",), {"revision": "v1"}, "f: data.revision = 'v1': this is a folder on this machine"),
    "no such part": (("a.jsonl",), {"name": "x"}, "f: data.name selects one of default, got 'x'"),
    "several parts": (
        ("one.jsonl", "two.jsonl"),
        {"readme": ""},
        "f: data.name selects one of first, second, got None",
    ),
    "nothing to read": (("a.xyz",), {}, "f: there is no file in this folder that is read; known are .json"),
    "another kind": (("a.txt",), {}, "a.txt: files of kind '.txt' are not read; known are .json"),
    "a split of a pattern": (("a.jsonl",), {"split": "dev", "tail": "/*.jsonl"}, "this is a pattern of files"),
    "a split of a file": (("a.jsonl",), {"split": "dev", "tail": "/a.jsonl"}, "this is a file on this machine"),
    "a pattern of folders": (("a/b.jsonl",), {"tail": "/*"}, "no file matches this pattern, only folders, such as "),
    "a shard of two columns with one name": (("a.twice.jsonl", "b.jsonl"), {}, "the key 'chosen' is there twice"),
    "a pattern of other files": (("a.txt",), {"tail": "/*"}, "f/a.txt: files of kind '.txt' are not read"),
}


def test_a_folder_that_reads_like_a_pattern(tmp_path: Path):
    """A folder in whose path there are signs of a pattern is an error that says so."""
    with pytest.raises(UserError, match="is not searched for splits; name its files by a pattern"):
        read(write(tmp_path / "f [1]", "a.jsonl"))


@pytest.mark.parametrize(("files", "keys", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_refused(tmp_path: Path, files: tuple[str, ...], keys: dict, message: str):
    """What cannot be told apart is an error that names what there is."""
    write(tmp_path / "f", *files)
    if "readme" in keys:
        (tmp_path / "f" / "README.md").write_text(README)
    keys = {key: value for key, value in keys.items() if key not in ("readme", "tail")}
    tail = next((case[1].get("tail", "") for case in REFUSED.values() if case[2] == message), "")
    with pytest.raises(UserError) as caught:
        read(f"{tmp_path / 'f'}{tail}", **keys)
    assert message in str(caught.value)


def test_a_pattern_is_of_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pattern names every file that it matches, in the config's folder first, even if that has such signs itself."""
    folder = write(tmp_path / "run [1]", "d/a.jsonl", "d/b.parquet", "d/e/c.jsonl.gz")
    for pattern, names in {
        "d/*.jsonl": ["d/a.jsonl"],
        "d/?.*": ["d/a.jsonl", "d/b.parquet"],
        "d/**/*.*": ["d/a.jsonl", "d/b.parquet", "d/e/c.jsonl.gz"],
    }.items():
        (folder / "c.toml").write_text(f'model.name = "m"\ndata = [{{ path = "{pattern}" }}]\n')
        prepared = prepare(load_config(folder / "c.toml"))
        assert rows_of(prepared) == [f"{name} {at}" for name in names for at in range(2)]
    monkeypatch.chdir(folder)
    assert len(prepare(load_config("c.toml", ["data.0.path=d/*.jsonl"])).train) == 2


def test_contents_decide_about_the_hash(tmp_path: Path):
    """The hash of a folder or a pattern changes with any of its files, and not with another split's."""
    write(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.jsonl")
    paths = {"folder": str(tmp_path), "pattern": f"{tmp_path}/train*.jsonl"}
    hashes = {name: content_hash(DataConfig(path=path)) for name, path in paths.items()}
    (tmp_path / "test.jsonl").write_text(LINES)
    assert hashes == {name: content_hash(DataConfig(path=path)) for name, path in paths.items()}
    (tmp_path / "train-2.jsonl").write_text(LINES)
    again = {name: content_hash(DataConfig(path=path)) for name, path in paths.items()}
    assert all(hashes[name] != again[name] for name in paths)


def test_text_is_read_without_datasets(tmp_path: Path):
    """Files of text are opened without importing `datasets` or torch, which take seconds."""
    write(tmp_path, "a.jsonl.gz")
    code = (
        "import sys; from fastpref.config import DataConfig; from fastpref.data.opening import open_records\n"
        f"print(len(open_records(DataConfig(path={str(tmp_path / 'a.jsonl.gz')!r}))), "
        "{'datasets', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"
    assert len(open_records(DataConfig(path=str(tmp_path / "a.jsonl.gz")))) == 2
