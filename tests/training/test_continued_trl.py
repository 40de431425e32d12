"""A continued adapter, trained by fastpref and by TRL from the same start on the same batches: the same losses."""

import json
import warnings
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref
from fastpref.training import loop, start
from tests.support.adapters import save_adapter
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.runs import rows
from tests.support.ten_steps import BATCH, STEPS, ten_steps

RATE = 2e-3
CONFIG = ten_steps(RATE)
LOSSES: dict[str, str] = {"dpo": "sigmoid", "kto": "kto"}


def pairs() -> list[dict[str, Any]]:
    lines = QUICKSTART_ROWS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:BATCH]]


def labelled() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if at % 3 else "rejected"], "label": at % 3 != 0}
        for at, row in enumerate(pairs())
    ]


def of_fastpref(folder: Path, adapter: Path, loss: str, reference: str) -> list[float]:
    content = pairs() if loss == "dpo" else labelled()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "cfg.toml").write_text(CONFIG)
    overrides = [f"loss.type={loss}", f"lora.from={adapter}", f"reference.adapter={reference}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def backwards(count: int, batch: int, seed: int, *_: Any, **__: Any) -> Iterator[list[int]]:
            return repeat(
                list(range(count))[::-1]
            )  # KTO pairs a prompt with the next completion, TRL with the one before

        for module in (loop, start):
            if hasattr(module, "data_order"):
                patch.setattr(module, "data_order", backwards)
        fastpref.train("cfg.toml", overrides)
    return [row["loss"] for row in rows(folder / "out") if "loss" in row]


def of_trl(folder: Path, adapter: Path, loss: str, reference: str) -> list[float]:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype=torch.float32)

    model = peft.PeftModel.from_pretrained(base(), str(adapter), is_trainable=True)
    kind = "DPO" if loss == "dpo" else "KTO"
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": STEPS, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 2048, "loss_type": LOSSES[loss],
    }  # fmt: skip
    if loss == "kto":
        settings["train_sampling_strategy"] = "sequential"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            ref_model=base() if reference == "none" else None,  # without one, TRL adds its adapter "ref"
            args=getattr(trl, f"{kind}Config")(**settings),
            train_dataset=Dataset.from_list(pairs() if loss == "dpo" else labelled()),
            processing_class=AutoTokenizer.from_pretrained(QUICKSTART_MODEL),
        )
        assert ("ref" in trainer.model.peft_config) == (reference == "start")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reference", ["start", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ten_steps_are_trls(tmp_path: Path, loss: str, reference: str):
    """DPO and KTO from a trained adapter, with it or the base model as reference, have the losses of TRL."""
    adapter = save_adapter(tmp_path / "adapter", QUICKSTART_MODEL)
    ours = of_fastpref(tmp_path, adapter, loss, reference)
    theirs = of_trl(tmp_path, adapter, loss, reference)
    assert len(ours) == STEPS
    assert max(theirs) - min(theirs) > 0.01  # the training moves
    assert ours == pytest.approx(theirs, abs=1e-5)
