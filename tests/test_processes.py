"""Two processes on a CPU, with DDP or FSDP2, do what one does, and a run can be resumed from their checkpoints."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastpref
from fastpref.errors import UserError
from fastpref.processes import check_sharded
from tests.support.adapters import save_adapter
from tests.support.paths import QUICKSTART_MODEL, ROOT
from tests.support.process_runs import PLAIN, RESUMED, SAME, launched, run_all
from tests.support.runs import contents, rows, write_config

WAYS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_adapter(folder / "start", QUICKSTART_MODEL)
    return write_config(folder)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    run_all(config, config.parent / "alone")
    return config.parent / "alone"


@pytest.fixture(scope="module", params=WAYS)
def both(config: Path, request: pytest.FixtureRequest) -> Path:
    """Run everything with two processes, and return the folder of the runs."""
    folder, script = config.parent / request.param, ROOT / "tests" / "support" / "process_runs.py"
    command = [*LAUNCH, str(script), str(config), str(folder), request.param]
    variables = launched(WAYS[request.param])
    process = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=config.parent)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for ours, theirs in zip(a, b):
        for name, value in ours.items():
            # A correlation divides by the small spread of the first rewards, which enlarges their rounding.
            least = 2e-5 if name.endswith("length_correlation") else 1e-5
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=least), name


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_two_are_one(both: Path, alone: Path, name: str):
    """Metrics and trained weights are those of one process up to float32 rounding."""
    close(rows(both / name), rows(alone / name))
    assert (both / name / "report.html").exists()
    ours, theirs = (json.loads((folder / name / "run.json").read_text())["heldout"] for folder in (both, alone))
    for side in ("chosen", "rejected"):  # of all held-out rows, whose order differs
        assert sorted(ours[side]) == pytest.approx(sorted(theirs[side]), rel=1e-4, abs=1e-5)
    (ours,), (theirs,) = ((folder / name / "final").glob("*model.safetensors") for folder in (both, alone))
    trained, expected = load_file(ours), load_file(theirs)
    assert trained.keys() == expected.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_every_process_leaves_the_group(both: Path):
    """Every process leaves the group before the interpreter ends, because a running gloo thread would then abort it."""
    assert [(both / f"member-{rank}").read_text() for rank in range(2)] == ["False", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_cut_run_of_two_is_the_whole_one(both: Path, name: str):
    """A run with dropout that is resumed has bit-identical weights, optimizer state, generators and metrics."""
    cut, whole = both / f"{name}-cut", both / f"{name}-whole"
    assert rows(cut) == rows(whole)
    for place in ("checkpoints/step-10", "final"):
        assert contents(cut / place) == contents(whole / place)


@pytest.mark.slow
def test_one_goes_on_from_what_two_wrote(both: Path, alone: Path, config: Path):
    """One process resumes from a checkpoint of two, which contains the whole optimizer state."""
    overrides = ["loss.type=kto", f"output.dir={both / 'kto-full-alone'}", "output.keep=9"]
    shutil.copytree(both / "kto-full-whole", both / "kto-full-alone")
    for later in ("checkpoints/step-10", "checkpoints/step-8"):
        shutil.rmtree(both / "kto-full-alone" / later, ignore_errors=True)
    fastpref.train(config, overrides, resume=True)
    close(rows(both / "kto-full-alone"), rows(alone / "kto-full-whole"))


@pytest.mark.slow
def test_ctrl_c_stops_both_with_one_checkpoint(config: Path):
    """The launcher passes Ctrl-C on: both processes stop after the same step, with one checkpoint."""
    out = config.parent / "stopped"
    overrides = [PLAIN, f"output.dir={out}", "train.steps=4000", "output.save_every=4000", "eval.every=4000"]
    command = [*LAUNCH, "-m", "fastpref", "train", str(config), *overrides]
    running = subprocess.Popen(command, env=launched({}), cwd=config.parent, stdout=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=120)
    assert output.count("go on with") == 1
    (checkpoint,) = (out / "checkpoints").iterdir()
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert checkpoint.name == f"step-{last['step']}"


@pytest.mark.parametrize(
    ("override", "setting"),
    [("model.quantization=nf4", "nf4"), ("train.optimizer=adamw_8bit", "adamw_8bit"), ("reference.mode=copy", "copy"),
     ("lora={dora=true}", "dora"), ("lora.stack=true", "stack"), ("reference.name=other", "other"),
     ("lora={init='pissa'}", "pissa")],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(config: Path, override: str, setting: str):
    with pytest.raises(UserError, match=f"{setting}.* cannot be sharded by FSDP"):
        check_sharded(fastpref.load_config(config, [PLAIN, override]))
