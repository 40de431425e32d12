"""The engines that train on the same rows for a comparison with TRL."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bench.engines import Job, step_clock, trl_model
from bench.trainers import run_apart
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_computed_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    """A run keeps no log-probabilities of the reference, with which the next one would save a pass that TRL makes."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(QUICKSTART_HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    job = Job("fastpref", method, str(QUICKSTART_MODEL), str(rows), 1, 2, 2, 256, checkpointing=True)
    assert len(run_apart(job)["loss"]) == 2
    assert not list((tmp_path / "cache").rglob("*reference*"))


JOB = Job("trl", "dpo", "model", "rows.jsonl", 1, 1, 1, 64, checkpointing=False)


@pytest.mark.parametrize(("gpu", "place"), [(True, {"": 0}), (False, None)])
def test_weights_are_no_part_of_a_peak(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, place: dict[str, int] | None
) -> None:
    """On a GPU, TRL's model is loaded there, so that what is held before training has its weights, as ours has."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: asked.update(options)
    )
    trl_model(JOB)
    assert asked.get("device_map") == place


def test_a_step_ends_when_the_gpu_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of TRL's steps waits for the GPU at both ends, so that no kernel's time is lost or another step's."""
    waits: list[str] = []
    clock, times = step_clock()  # which imports, and modules look for a GPU when they are imported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    clock.on_step_begin(None, None, None)
    clock.on_step_end(None, None, None)
    assert len(waits) == 2
    assert len(times) == 1
    assert times[0] >= 0
