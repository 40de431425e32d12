"""Every key of a config changes something that a user can see: the weights, the metrics, the files, or what is printed.

A row of CHANGES names a key, another value for it, the settings in which it matters, and where the change is seen. A
key of the schema without a row fails `test_every_key_has_a_row`, and a key that nothing reads fails its own row. A key
that changes what the reference computes must also change where later runs look that up.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.testing import assert_close

from fastpref.config.losses import LOSSES
from fastpref.config.text import keys_of, sections
from fastpref.step.logprob_store import LogprobStore
from tests.support.command_line import run_command
from tests.support.keys import CHANGES, Change
from tests.support.runs import rows, write_config

SHORTER = {"steps = 10": "steps = 3", "batch = 5": "batch = 3", "rows = 23": "rows = 7", "rows = 5": "rows = 2"}
TIMES = ("pairs/s", "completions/s", "lists/s")


def keys() -> Iterator[str]:
    """Yield every key of the schema; those of a loss as loss(TYPE).KEY."""
    for section in sections():
        if section == "loss":
            yield from (f"loss({loss}).{key}" for loss in LOSSES for key in keys_of("loss", loss))
        else:
            yield from (f"{section}.{key}" for key in keys_of(section, "dpo"))


def test_every_key_has_a_row() -> None:
    assert set(keys()) == set(CHANGES)


@dataclass(frozen=True)
class Seen:
    """What a user sees of a run."""

    status: int
    weights: Mapping[str, str]  # digests of the files of final/ with weights
    metrics: list[dict[str, Any]]
    files: Mapping[str, str]  # digests of the files, except those that repeat the config or tell times
    words: list[str]  # printed lines without times
    reference: Mapping[tuple[str, bytes], Tensor]  # what is remembered for later runs: by folder and completion


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Seen]:
    return {}


def seen(folder: Path, change: Change, overrides: tuple[str, ...]) -> Seen:
    """Train in an empty folder, and return what is there afterwards."""
    config = write_config(folder)
    text = config.read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        text = text.replace(f"\n{long}\n", f"\n{'' if short == change.without else short}\n")
    config.write_text(text.replace("every = 4", "every = 2"), encoding="utf-8")
    change.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASTPREF_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "300")
        result = run_command("train", config, *overrides)
    run = next((path.parent for path in sorted(folder.rglob("metrics.jsonl"))), None)
    lines = re.sub(r"cache/(\w+)/\w+", r"cache/\1", (result.out + result.err).replace(str(folder), ".")).splitlines()
    kept = sorted((folder / "cache" / "reference").glob("*"))
    return Seen(
        status=result.status,
        weights={path.name: _digest(path) for path in sorted(folder.rglob("final/*.safetensors"))},
        metrics=rows(run) if run is not None else [],
        files={path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if _says(path)},
        words=[line for line in lines if not any(word in line for word in TIMES)],
        reference={(path.name, key): store[key] for path in kept for store in [LogprobStore(path)] for key in store},
    )


def _says(path: Path) -> bool:
    if not path.is_file() or "cache" in path.parts:
        return False
    return path.name not in ("config.toml", "cfg.toml", "run.json", "metrics.jsonl", "report.html")


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_value_is_seen(key: str, tmp_path: Path, runs: dict[tuple[str, ...], Seen]) -> None:
    change = CHANGES[key]
    plain = change.name_of(key)
    before = (*change.given, *([f"{plain}={change.before}"] if change.before is not None else []))
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    if before not in runs:
        runs[before] = seen(tmp_path / "before", change, before)
    first, second = runs[before], seen(tmp_path / "after", change, (*change.given, f"{plain}={change.value}"))
    if change.shows == "status":  # one of the two is an error
        assert {first.status, second.status} == {0, 2}, second.words
        return
    assert first.status == 0, first.words
    for name in first.reference.keys() & second.reference.keys():
        assert_close(second.reference[name], first.reference[name], rtol=0, atol=1e-5, msg=f"{key}: reference")
    if change.shows == "refused":  # the key is read, and this machine or these data cannot do what it says
        assert second.status == 2
        assert any(word in " ".join(second.words) for word in (plain.rpartition(".")[2], change.value))
        return
    assert second.status == 0, second.words
    assert getattr(first, change.shows) != getattr(second, change.shows), second.words
