"""Only one run at a time can use a folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref
from fastpref.errors import UserError
from fastpref.run.lock import RunLock
from tests.support.command_line import run_process
from tests.support.runs import LORA, contents

HOLD = """
import sys, time
from pathlib import Path
from fastpref.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
SAID = "out: another run is writing to this folder; wait for its end, or choose another output.dir"


def test_a_folder_that_another_run_writes_to_is_refused(config: Path):
    """While another run uses a folder, resuming or replacing is refused (one message, status 2) and every file stays
    as it is. A killed run does not block the folder."""
    fastpref.train(config, [LORA, "train.steps=2", "output.save_every=1", "eval.samples=0"])
    before = contents(Path("out"))
    other = subprocess.Popen([sys.executable, "-c", HOLD, "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused = run_process("train", config, LORA, "train.steps=4", "eval.samples=0", "--resume")
        assert (refused.status, refused.err) == (2, f"fastpref: {SAID}\n")
        with pytest.raises(UserError, match=SAID):
            fastpref.train(config, [LORA], force=True)
        assert contents(Path("out")) == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    fastpref.train(config, [LORA, "train.steps=3", "output.save_every=1", "eval.samples=0"], resume=True)
    assert Path("out/checkpoints/step-3").exists()


def test_a_run_frees_its_folder(config: Path):
    """A run frees its folder when it ends or fails."""
    settings = [LORA, "train.steps=1", "eval.samples=0"]
    fastpref.train(config, settings)
    with pytest.raises(UserError, match="not empty"):
        fastpref.train(config, settings)
    RunLock(Path("out")).acquire()
    fastpref.train(config, settings, force=True)


def test_two_runs_that_chose_the_same_folder(config: Path, monkeypatch: pytest.MonkeyPatch):
    """If two runs found the same folder free, the later one does not replace the files of the first."""
    from fastpref.training import start

    load = start.load_examples

    def meanwhile(*args, **options):
        monkeypatch.setattr(start, "load_examples", load)
        fastpref.train(config, [LORA, "train.steps=1", "eval.samples=0"])
        return load(*args, **options)

    monkeypatch.setattr(start, "load_examples", meanwhile)
    with pytest.raises(UserError, match="another run has begun in this folder meanwhile; start this one again"):
        fastpref.train(config, [LORA, "train.steps=2", "eval.samples=0"])
    assert Path("out/final/adapter_model.safetensors").exists()
