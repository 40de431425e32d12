"""A reference that moves towards the policy (TR-DPO, arXiv 2404.09656)."""

import json
import warnings
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref
from fastpref.config import Config, make_config
from fastpref.errors import UserError
from fastpref.training import loop
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.runs import rows
from tests.support.ten_steps import BATCH, STEPS, ten_steps

RATE = 1e-4
CONFIG = ten_steps(RATE)
SYNCS: dict[str, tuple[int, float]] = {"mixed": (3, 0.4), "in every step": (1, 0.6), "replaced": (4, 1.0)}


def pairs() -> list[dict[str, Any]]:
    lines = QUICKSTART_ROWS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:BATCH]]


def in_order(count: int, *_: Any, **__: Any) -> Iterator[list[int]]:
    return repeat(list(range(count)))


def losses(folder: Path, *overrides: str) -> list[float]:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    (folder / "cfg.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loop, "data_order", in_order)
        fastpref.train("cfg.toml", overrides)
    return [row["loss"] for row in rows(folder / "out") if "loss" in row]


def of_trl(folder: Path, every: int, mix: float) -> list[float]:
    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)

    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": STEPS, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 2048, "sync_ref_model": True, "ref_model_sync_steps": every, "ref_model_mixup_alpha": mix,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            model=model(), ref_model=model(), args=trl.DPOConfig(**settings), train_dataset=Dataset.from_list(pairs()),
            processing_class=AutoTokenizer.from_pretrained(QUICKSTART_MODEL),
        )  # fmt: skip
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", SYNCS)
def test_ten_steps_are_trls(tmp_path: Path, case: str):
    """Losses equal those of TRL's SyncRefModelCallback, and not those of a reference that stays."""
    every, mix = SYNCS[case]
    ours = losses(tmp_path / "ours", f"reference.sync={{every={every}, mix={mix}}}")
    assert len(ours) == STEPS
    assert ours == pytest.approx(of_trl(tmp_path, every, mix), abs=1e-5)
    still = losses(tmp_path / "still", "reference.mode=copy")
    assert ours[:every] == still[:every]
    assert ours[every] > still[every] + 1e-4  # a reference that follows leaves less of a margin


def test_a_reference_that_is_replaced_in_every_step(tmp_path: Path):
    """If it is always the policy, every step begins with margins of zero."""
    assert losses(tmp_path / "run", "reference.sync={every=1, mix=1.0}") == pytest.approx([0.6931472] * STEPS, abs=1e-6)


def config(**tables: Any) -> Config:
    return make_config({"model": {"name": "m"}, "data": [{"path": "d"}], **tables})


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"reference": {"name": "n", "sync": {}}}, "only a copy of the model itself can be moved"),
    "precomputed": ({"reference": {"mode": "precompute", "sync": {}}}, "only a copy of the model itself can be moved"),
    "adapters": ({"lora": {}, "reference": {"mode": "copy", "sync": {}}}, "only full fine-tuning moves its reference"),
    "no reference": ({"loss": {"type": "orpo"}, "reference": {"sync": {}}}, "orpo has no reference to move"),
    "half precision": (
        {"reference": {"mode": "copy", "dtype": "bfloat16", "sync": {}}}, "in fewer bits would round small moves off",
    ),
    "no share": ({"reference": {"mode": "copy", "sync": {"mix": 0.0}}}, "mix: must be greater than 0"),
    "too large a share": ({"reference": {"mode": "copy", "sync": {"mix": 1.1}}}, "mix: must be less than or equal"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_moved(fault: str):
    tables, message = FAULTS[fault]
    with pytest.raises(UserError, match=rf"reference\.sync.*{message}"):
        config(**tables)
