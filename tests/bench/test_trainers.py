"""The engines that train on the same rows for a comparison with TRL."""

from pathlib import Path

import pytest

from bench.engines import Job
from bench.trainers import run_apart
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_computed_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    """A run keeps no log-probabilities of the reference, with which the next one would save a pass that TRL makes."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(QUICKSTART_HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    job = Job("fastpref", method, str(QUICKSTART_MODEL), str(rows), 1, 2, 2, 256, checkpointing=False)
    assert len(run_apart(job)["loss"]) == 2
    assert not list((tmp_path / "cache").rglob("*reference*"))
