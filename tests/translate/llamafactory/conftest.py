"""A folder with the description of data sets, as LLaMA-Factory has it."""

import json
from pathlib import Path
from typing import Any

import pytest

INFO: dict[str, Any] = {
    "pairs": {"file_name": "pairs.json", "ranking": True,
              "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
    "hub": {"hf_hub_url": "org/pairs", "subset": "s", "split": "test", "revision": "v1", "num_samples": 50,
            "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
    "files": {"file_name": "many", "ranking": True},
    "script": {"script_url": "org/code"},
    "cloud": {"cloud_file_name": "s3://bucket/x"},
    "ms": {"ms_hub_url": "org/pairs"},
    "odd": {"file_name": "odd.json", "folder": "x", "colums": {}, "ranking": True},
    "nothing": {"ranking": True},
    "images": {"file_name": "i.json", "ranking": True, "columns": {
        "prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "images": "images"}},
}  # fmt: skip


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with data/dataset_info.json, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "many").mkdir(parents=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("pairs.json", "many/b.json", "many/a.json", "many/read.me"):
        (tmp_path / "data" / name).write_text("[]")
    return tmp_path
