"""Short runs of the quickstart's model, and the files that they write."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fastpref
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL, QUICKSTART_ROWS

SPEEDS = ("tokens_per_second", "pairs_per_second")
CONFIG = f"""
[model]
name = "{QUICKSTART_MODEL.as_posix()}"
[[data]]
path = "{QUICKSTART_ROWS.as_posix()}"
rows = 23
[[eval.data]]
path = "{QUICKSTART_HELDOUT.as_posix()}"
rows = 5
[eval]
every = 4
sample_tokens = 3
[tokens]
max_length = 96
[train]
learning_rate = 1e-3
steps = 10
batch = 5
tokens_per_microbatch = 150
[output]
dir = "out"
save_every = 5
"""
LORA = "lora={rank=4, dropout=0.2}"


def write_config(folder: Path) -> Path:
    """Write a config of ten steps of several micro-batches, with little more than two epochs, and the output out."""
    path = folder / "cfg.toml"
    path.write_text(CONFIG)
    return path


def train_in(folder: Path, settings: Sequence[str]) -> Path:
    """Train as `write_config` says, with these overrides, and return the folder, whose run is in out/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fastpref.train(write_config(folder), settings)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the speeds, which differ between runs."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in logged]


def last_evaluation(folder: Path) -> dict[str, float]:
    """Return the metrics of a run's last evaluation, without the prefix eval/ of their names."""
    last = [row for row in rows(folder) if "eval/loss" in row][-1]
    return {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a checkpoint or of final/, without speeds and the manifest."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop("manifest.json", None)
    if "training_state.json" in files:
        state = _plain(json.loads(files["training_state.json"]))
        for speed in SPEEDS:
            state["progress"]["last"].pop(speed, None)
        files["training_state.json"] = json.dumps(state).encode()
    return files


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"map"}:
        return {str(k): _plain(v) for k, v in value["map"]}
    return [_plain(v) for v in value] if isinstance(value, list) else value
