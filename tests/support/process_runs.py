"""Runs for test_processes.py, in one process or in each of several: `python process_runs.py CONFIG FOLDER`."""

import atexit
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref.atomic import WriteError
from fastpref.errors import UserError
from fastpref.processes import start_processes
from fastpref.run.folder import RunFolder
from tests.support.runs import LORA

PLAIN = "lora={rank=4}"
SAME = {
    "dpo-lora": [PLAIN],
    "dpo-full-precomputed": [],
    "dpo-sorts": [PLAIN, 'loss.variants=["aot"]'],
    "dpo-sorts-at-once": [PLAIN, 'loss.variants=["aot_unpaired"]', "train.tokens_per_microbatch=4000"],
    "kto-many": ["loss.type=kto", PLAIN],
    "kto-at-once": ["loss.type=kto", PLAIN, "train.tokens_per_microbatch=4000"],
    "orpo-head": ["loss.type=orpo", 'lora={rank=2, target=["q_proj", "lm_head"]}', "train.checkpointing=true"],
    "simpo-one-pair": ["loss.type=simpo", PLAIN, "train.batch=1", "train.steps=4"],
    "dpo-continued": ["lora.from=start"],
    "ipo-continued-from-base": ["loss.type=ipo", "lora.from=start", "reference.adapter=none"],
    "cpo-padded-full": ["loss.type=cpo", "train.layout=padded"],
    "sft": ["loss.type=sft", PLAIN],
    "stopped": [PLAIN, "eval.every=1", 'train.stop={after=2, metric="eval/loss", by=9.0}'],
}
RESUMED = {"dpo": [LORA], "kto-full": ["loss.type=kto"]}


def launched(variables: dict[str, str]) -> dict[str, str]:
    """Return the environment of a process on a CPU that these variables of a launcher are set for."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    return os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path} | variables


def run_all(config: Path, folder: Path, *, sharded: bool = False) -> None:
    """Train every run in its own folder; stop those of RESUMED after five steps, and resume them."""
    for name, overrides in SAME.items():
        fastpref.train(config, ["train.steps=5", *overrides, f"output.dir={folder / name}"])
    _, processes = start_processes(fastpref.load_config(config), "no")
    assert processes.sharded == sharded
    for name, overrides in RESUMED.items():
        out, whole = folder / f"{name}-cut", folder / f"{name}-whole"
        cut = [*overrides, f"output.dir={out}", "output.keep=9"]
        fastpref.train(config, cut)

        def cut_off(out: Path = out, whole: Path = whole) -> None:
            shutil.copytree(out, whole)
            for later in ("checkpoints/step-10", "checkpoints/step-8", "final"):
                shutil.rmtree(out / later, ignore_errors=True)

        processes.on_first(cut_off)
        fastpref.train(config, cut, resume=True)
    _faults(config, folder / "faults")


def _faults(config: Path, folder: Path) -> None:
    """Assert that a failure of the first process ends all processes with its message."""
    with pytest.MonkeyPatch.context() as patch:

        def full(self: RunFolder, *_: object) -> Path:
            raise WriteError(f"{self.path}: cannot be written: no space")

        patch.setattr(RunFolder, "checkpoint", full)
        with pytest.raises(UserError, match="no space"):
            fastpref.train(config, [PLAIN, f"output.dir={folder}"])
    with pytest.raises(UserError, match="the folder is not empty"):
        fastpref.train(config, [PLAIN, f"output.dir={folder}"])


def _write_membership(folder: Path) -> None:
    """Write whether this process is still in a process group. It is registered first, and so called last at exit."""
    path = folder / f"member-{os.environ['RANK']}"
    path.write_text(str(torch.distributed.is_initialized()))


if __name__ == "__main__":
    atexit.register(_write_membership, Path(sys.argv[2]))
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), sharded=sys.argv[3] == "fsdp")
