"""The profile streaming: every engine takes the same steps, and copies and bytes are counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.profiles import STREAMING
from bench.results import RESIDENT, markdown
from bench.streaming import ENGINES, compare_streaming

CPU = not torch.cuda.is_available()
LAYERS = 5
TINY = replace(STREAMING, shape=replace(STREAMING.shape, hidden=64, layers=LAYERS, vocab=1024, batch=2), repeats=1)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return list(compare_streaming(TINY, None, None))


def test_streamed_steps_are_the_same_in_less_memory(records: list[dict[str, Any]]) -> None:
    """On a CPU the loss has the same bits. Fewer slots hold less; steps take as much beyond that."""
    assert [record["what"] for record in records] == ["none", "nf4"]
    for record in records:
        assert [row["method"] for row in record["rows"]] == list(ENGINES)
        resident, two, three = record["rows"]
        assert two["loss"] == three["loss"] == (resident["loss"] if CPU else two["loss"])
        assert [row["note"] for row in record["rows"]] == [""] * 3
        assert two["held"] < three["held"] < resident["held"]
        assert max(two["bytes"], three["bytes"]) < 1.2 * resident["bytes"]
        assert all(len(row["ms"]) == 1 for row in record["rows"])


def test_copies_are_counted(records: list[dict[str, Any]]) -> None:
    """At most two sweeps of the policy and one of the reference copy every layer, less the slots at the turn."""
    for record in records:
        resident, *streamed = record["rows"]
        slot = streamed[1]["held"] - streamed[0]["held"]
        assert resident["copies"] == resident["copied"] == 0
        for row, slots in zip(streamed, (2, 3)):
            assert 2 * LAYERS - 2 * slots <= row["copies"] <= 3 * LAYERS - 2 * slots
            assert row["copied"] == pytest.approx(row["copies"] * slot, rel=0.01)  # allocators round


def test_the_table_has_every_row(records: list[dict[str, Any]]) -> None:
    machine = {"processor": "A", "device": "cpu", "threads": 1, "python": "3", "versions": {}, "commit": "c"}
    words = {"command": "c", "date": "d", "seconds": 1, "rule": TINY.rule, "machine": machine}
    broken = records[0] | {"rows": [row | {"note": "wrong: loss off by 1e-02"} for row in records[0]["rows"]]}
    result = words | {"head": [], "scaling": [], "steps": [], "streaming": [*records, broken]}
    table = [line for line in markdown(result).splitlines() if "| " in line]
    assert len(table) == 1 + 3 * 3
    assert f"| none | {RESIDENT} |" in table[1]
    assert "1.00 ± 0.00" in table[1]
    assert all("wrong: loss off by 1e-02 | | |" in line for line in table[-3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "streaming", "--gate", "2"], "--profile streaming: --only, --match, --base and --gate are for"),
        (["--profile", "streaming", "--model", "nowhere"], "--model nowhere: no such file or folder"),
        (["--profile", "tiny", "--pairs", "3"], "--pairs are for --profile prefixes and streaming"),
    ],
)
def test_mistakes_are_said_in_one_message(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_the_command_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.profiles.STREAMING", replace(TINY, quantizations=("none",)))
    monkeypatch.setattr("bench.profiles.STREAMING_GPU", replace(TINY, quantizations=("none",)))
    found = CliRunner().invoke(app, ["--profile", "streaming", "--pairs", "1", "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "a step is 1 pairs" in (tmp_path / "results.md").read_text()
    (record,) = json.loads((tmp_path / "results.json").read_text())["streaming"]
    assert len(record["rows"]) == len(ENGINES)
