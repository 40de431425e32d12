"""`fastpref check` reads the first rows of every file of a source: of folders, of patterns, and of large files."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from fastpref.checks import first_rows
from fastpref.checks.rows import data_mistakes
from fastpref.config import Config, DataConfig
from fastpref.data.found import Found, find
from fastpref.errors import UserError

ROW = {"prompt": "q", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(ROW) + "\n"


def mistakes(path: Path, **keys: Any) -> list[str]:
    raw = {"model": {"name": "someone/model"}, "data": [{"path": str(path), **keys}]}
    return list(data_mistakes(Config.model_validate(raw)))


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list([ROW]).to_parquet(path)
        else:
            path.write_text("" if path.suffix == ".md" else LINE)
    return folder


FOLDERS: dict[str, tuple[tuple[str, ...], str, int]] = {  # files, split, how many files are looked at
    "no splits": (("a.jsonl", "b/c.jsonl", "README.md"), "train", 2),
    "names of files": (("my-train.jsonl", "train_2.jsonl", "dev.jsonl", "trains.jsonl"), "train", 2),
    "another split": (("train.jsonl", "x.val.jsonl"), "validation", 1),
    "names of folders": (("train/test.jsonl", "a test/train.jsonl", "c.jsonl"), "train", 1),
    "shards of the hub": (("data/train-00000-of-00001.parquet", "train.parquet"), "train", 1),
    "splits of the hub": (
        ("data/train_sft-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        "train_sft",
        1,
    ),
    "text of a split": (("test.txt", "a.jsonl"), "train", 0),
    "hidden files": ((".a/train.jsonl", "__b/train.jsonl", "c.jsonl"), "train", 1),
    "no such split": (("dev.jsonl",), "train", 0),
    "several kinds": (("train.jsonl", "train.csv"), "train", 0),
}


@pytest.mark.parametrize(("files", "split", "count"), FOLDERS.values(), ids=FOLDERS)
def test_what_is_looked_at_is_what_a_run_reads(tmp_path: Path, files: tuple[str, ...], split: str, count: int):
    """Files that `check` takes for those of a split are all files that `datasets` takes for them, or none."""
    data = DataConfig(path=str(write(tmp_path, *files)), split=split)
    looked_at = first_rows.files_in(data, tmp_path)
    assert len(looked_at) == count
    try:
        found = find(data) or Found(())
    except UserError:
        found = Found(())
    assert not looked_at or {file.resolve() for file in looked_at} == set(found.files)


def arrow(write: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        table = pa.Table.from_pylist([json.loads(LINE)])
        with pa.OSFile(str(path), "wb") as file, write(file, table.schema) as writer:
            writer.write_table(table)

    return make


def rows() -> Dataset:
    return Dataset.from_list([json.loads(LINE)])


TABLE = ",".join(ROW) + "\n" + ",".join(ROW.values()) + "\n"
LARGE = 100  # bytes of the files that are not read whole
FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {  # name of the file or folder, and what writes it
    "lines": ("a.jsonl", lambda path: path.write_text(LINE)),
    "an array": ("a.json", lambda path: path.write_text(f"[{LINE}]")),
    "a table": ("a.csv", lambda path: path.write_text(TABLE)),
    "packed lines": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINE.encode()))),
    "parquet": ("a.parquet", lambda path: rows().to_parquet(path)),
    "an Arrow file": ("a.arrow", arrow(pa.ipc.new_file)),
    "an Arrow stream": ("a.arrow", arrow(pa.ipc.new_stream)),
    "a saved data set": ("a", lambda path: rows().save_to_disk(str(path))),
    "saved splits": (
        "a",
        lambda path: DatasetDict({"train": rows()}).save_to_disk(str(path)),
    ),
    "a large table": ("a.csv", lambda path: path.write_text(TABLE * LARGE)),
    "large lines": ("a.jsonl", lambda path: path.write_text(LINE * LARGE)),
    "large lines of another name": ("a.json", lambda path: path.write_text(LINE * LARGE)),
    "a large array": ("a.json", lambda path: path.write_text(f"[{','.join([LINE] * LARGE)}]")),
    "large packed lines": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress((LINE * LARGE).encode()))),
    "a second shard": ("*.jsonl", lambda path: write_two(path.parent)),
}


def write_two(folder: Path) -> None:
    (folder / "1.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "2.jsonl").write_text(LINE)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_whatever_holds_the_rows(
    tmp_path: Path, name: str, write: Callable[[Path], Any], right: bool, monkeypatch: pytest.MonkeyPatch
):
    """Columns that no format reads, or the first row has not, are a mistake of each kind of file and folder."""
    monkeypatch.setattr(first_rows, "WHOLE", 200)
    monkeypatch.setattr(first_rows, "BEGINNING", 20 * len(LINE) + 10)
    if not right:
        monkeypatch.setitem(globals(), "LINE", LINE.replace("chosen", "other"))
        monkeypatch.setitem(globals(), "TABLE", TABLE.replace("chosen", "other"))
    write(tmp_path / name)
    found = mistakes(tmp_path / name)
    assert [("of no format" in mistake) or ("there is no column chosen" in mistake) for mistake in found] == [True] * (
        not right
    )


def test_what_is_in_doubt_is_left_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The beginning of a large file that may be right is no mistake."""
    monkeypatch.setattr(first_rows, "WHOLE", 1)
    monkeypatch.setattr(first_rows, "BEGINNING", 100)
    (tmp_path / "a.json").write_text(json.dumps({"data": [ROW] * 50}))
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "é" * 200}]))
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW | {"prompt": "q" * 200}))
    (tmp_path / "d.csv").write_text(f"prompt,chosen,rejected\n{'q' * 200},a,b\n")
    for file in sorted(tmp_path.iterdir()):
        assert mistakes(file) == [], file.name


def test_shards_are_looked_at_without_torch_or_datasets(tmp_path: Path):
    """Folders of shards do not make `check` import what takes seconds."""
    write(tmp_path, "data/train-00000-of-00001.parquet")
    code = (
        "import sys; from pathlib import Path; from fastpref.config import DataConfig\n"
        "from fastpref.checks.first_rows import files_in, first_rows\n"
        f"data = DataConfig(path={str(tmp_path)!r}); files = files_in(data, Path(data.path))\n"
        "print([len(first_rows(data, file)) for file in files], {'datasets', 'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1] set()\n"
