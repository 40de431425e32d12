"""A checkpoint is whole or absent: after kills, full disks and damage, the last whole one is found."""

import builtins
import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref
from fastpref import atomic
from fastpref.atomic import WriteError, damage, write_folder
from fastpref.errors import UserError
from fastpref.run import state
from fastpref.run.folder import RunFolder
from fastpref.run.resume import find_checkpoint
from fastpref.step.objective import Objective
from fastpref.training import loop
from tests.support.command_line import run_process
from tests.support.runs import LORA, rows, train_in

SETTINGS = [LORA, "train.steps=3", "output.save_every=1", "eval.every=100"]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in a new folder; its run `out` has checkpoints at steps 2 and 3."""
    return train_in(tmp_path_factory.mktemp("trained"), SETTINGS)


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Copy that run into the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return RunFolder(Path("out"))


def newest(run: RunFolder) -> tuple[str, list[str]]:
    """Return the name of the checkpoint that --resume takes, and the notes about others."""
    resumed = find_checkpoint(fastpref.load_config(run.path / "config.toml"), "run", str(run.path), force=False)
    return resumed.checkpoint.name, resumed.notes


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_checkpoint_holds(run: RunFolder):
    """A checkpoint has the adapter as PEFT loads it, the tokenizer, the config, the state, and no pickle."""
    place = run.path / "checkpoints" / "step-3"
    names = {path.name for path in place.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "config.toml", "manifest.json",
        "training_state.json", "training_state.safetensors",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(fastpref.load_config("cfg.toml").model.name)
    assert PeftModel.from_pretrained(base, place).peft_config
    assert AutoTokenizer.from_pretrained(place).chat_template
    for path in run.path.rglob("*"):
        assert path.name == ".lock" or not path.name.startswith(".")
        if path.is_file():
            assert path.suffix not in PICKLES
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def test_the_state_comes_back_as_it_was(tmp_path: Path):
    """The state is restored exactly: nested values of every kind that optimizers keep, shared tensors and views."""
    shared, long = torch.arange(6.0).reshape(2, 3), torch.arange(10)
    saved = {
        "state": {0: {"step": torch.tensor(3.0), "m": shared}, 7: {"m": shared, "view": long[2:5], "t": shared.T}},
        "groups": [{"betas": (0.9, 0.999), "foreach": None, "lr": 0.1 + 0.2, "fused": True}],
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "empty": [{}, [], ()],
        "tensor": {"map": 1},
    }
    state.write_state(tmp_path, saved)
    loaded = state.read_state(tmp_path)
    assert str(loaded) == str(saved)
    assert loaded["state"][7]["t"].tolist() == shared.T.tolist()
    assert loaded["bf16"].dtype == torch.bfloat16
    assert loaded["state"][0]["m"] is loaded["state"][7]["m"]
    with pytest.raises(TypeError, match="cannot hold object"):
        state.write_state(tmp_path, {"x": object()})


def test_every_damage_is_found(run: RunFolder):
    """Any damage (a changed, missing or added byte, a missing file) is named, and the checkpoint before is taken."""
    place = run.path / "checkpoints" / "step-3"
    assert newest(run) == ("step-3", [])
    for path in sorted(place.rglob("*")):
        content = path.read_bytes()
        places = {0, len(content) // 3, len(content) // 2, len(content) - 1}
        changed = [content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :] for at in places]
        for damaged in (content[:-1], content + b"\0", None, *changed):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            name, notes = newest(run)
            assert name == "step-2"
            assert path.name in notes[0]
            assert "step-3 is not whole" in notes[0]
            with pytest.raises(UserError, match=f"not whole: {path.name}"):
                find_checkpoint(fastpref.load_config("out/config.toml"), "run", place, force=False)
            path.write_bytes(content)
    assert newest(run) == ("step-3", [])


def test_a_run_goes_on_behind_a_damaged_checkpoint(run: RunFolder, trained: Path, capsys: pytest.CaptureFixture[str]):
    """If the last checkpoint is damaged, a resumed run says so and writes the same checkpoint again."""
    damaged = run.path / "checkpoints" / "step-3" / "training_state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    fastpref.train("cfg.toml", SETTINGS, resume=True)
    assert "step-3 is not whole (training_state.safetensors has" in capsys.readouterr().out
    assert damage(damaged.parent) is None
    assert rows(run.path) == rows(trained / "out")
    for folder in run.checkpoints():
        for file in folder.iterdir():
            file.unlink()
    with pytest.raises(UserError, match=r"(?s)no checkpoint is whole:.*step-3 is not whole.*step-2 is not whole"):
        fastpref.train("cfg.toml", SETTINGS, resume=True)


class Canary:
    def __reduce__(self):
        return Path("executed").write_text, ("by a pickle",)


def test_pickles_are_never_read(run: RunFolder):
    """Pickled files under the names that torch and PEFT would load are never read from a checkpoint."""
    place = run.path / "checkpoints" / "step-3"
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (place / name).write_bytes(pickle.dumps(Canary()))
    fastpref.train("cfg.toml", [*SETTINGS, "train.steps=4"], resume=True)
    assert (run.path / "checkpoints" / "step-4").is_dir()
    assert not Path("executed").exists()
    for name in ("training_state.safetensors", "adapter_model.safetensors"):
        (place / name).unlink()
    place.rename(place.with_name("step-9"))
    assert newest(run)[0] == "step-4"
    assert not Path("executed").exists()


def test_a_state_of_another_version(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "FORMAT", state.FORMAT + 1)
    with pytest.raises(UserError, match="step-3: this checkpoint is of another version of fastpref"):
        newest(run)


def save_again(run: RunFolder, step: int) -> None:
    """Write a checkpoint as a run does: the same files by the same libraries, with the contents of step 3."""
    source = run.path / "checkpoints" / "step-3"
    config = fastpref.load_config("cfg.toml")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = state.read_state(source)

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        (folder / "config.toml").write_bytes((source / "config.toml").read_bytes())
        state.write_state(folder, content)

    run.checkpoint(step, fill)


def killed_save(run: RunFolder, at: int) -> int:
    """Save step 4 in a forked process, and return its exit code. The process is killed at the event of this number:
    before a file is opened (to be written, hashed or forced to disk), a folder is made, or a rename."""
    child = os.fork()
    if child == 0:
        try:
            events = count(1)

            def kill(event: str, arguments: tuple) -> None:
                counts = event in ("open", "os.rename", "os.mkdir") and "checkpoints" in str(arguments[0])
                if counts and next(events) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            save_again(run, 4)
            os._exit(0)
        except BaseException:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_file_leaves_the_last_whole_checkpoint(run: RunFolder):
    """SIGKILL before any file is written, hashed, forced to disk or renamed leaves the last whole checkpoint."""
    new = run.path / "checkpoints" / "step-4"
    kills = 0
    while (status := killed_save(run, kills + 1)) == -signal.SIGKILL:
        kills += 1
        name, notes = newest(run)
        assert name in ("step-3", "step-4")  # the new checkpoint is whole, or it is not there
        assert notes == []
        if name == "step-4":
            assert damage(new) is None
            shutil.rmtree(new)
    assert status == 0
    assert kills >= 2 * len(list(new.rglob("*")))  # each file is opened at least to be hashed and to be forced to disk
    fastpref.train("cfg.toml", SETTINGS, resume="out/checkpoints/step-3", force=True)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["best.json", "step-2", "step-3"]


def test_a_kill_while_a_checkpoint_is_replaced(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """If the second rename fails while a checkpoint is replaced, the old checkpoint is put back."""
    place = run.path / "checkpoints" / "step-3"
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(WriteError, match="step-3: cannot be written: No space left on device"):
        write_folder(place, lambda folder: None, manifest=True)
    assert damage(place) is None
    assert sorted(p.name for p in place.parent.iterdir()) == ["best.json", "step-2", "step-3"]


def test_what_is_kept(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The newest `keep` checkpoints are kept, and the best by held-out accuracy, which is saved once it is seen."""
    accuracies = iter([0.5, 0.7, 0.9, 0.9, 0.8, 0.85, 0.4])
    evaluate = Objective.evaluate

    def pretended(self: Objective, *args: Any) -> Any:
        metrics = evaluate(self, *args)
        result = metrics.result() | {"rewards/accuracies": next(accuracies), "loss": 1.0}
        monkeypatch.setattr(metrics, "result", lambda: result)
        return metrics

    monkeypatch.setattr(Objective, "evaluate", pretended)
    options = ["train.steps=12", "eval.every=2", "output.save_every=5", "output.keep=2"]
    result = fastpref.train(config, [LORA, *options])
    place = result.output_dir / "checkpoints"
    assert sorted(p.name for p in place.glob("step-*")) == ["step-10", "step-4", "step-5"]
    assert RunFolder(result.output_dir).best() == "step-4"
    # After resuming from before the best one, that one is forgotten; keep=1 keeps the newest and the new best.
    accuracies = iter([0.1] * 9)
    fastpref.train(config, [LORA, *options, "output.keep=1"], resume=place / "step-5", force=True)
    assert sorted(p.name for p in place.glob("step-*")) == ["step-10", "step-4"]


def refusing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Make the disk full from the `at`-th file of a checkpoint that is opened for writing or forced to disk."""
    touched: list[str] = []
    real_open, real_sync = io.open, atomic.sync

    def touch(path: object) -> None:
        if ".step-" in str(path):
            touched.append(str(path))
            if len(touched) >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def opened(file, mode="r", *rest, **options):
        if any(letter in mode for letter in "wax+"):
            touch(file)
        return real_open(file, mode, *rest, **options)

    def synced(path: Path) -> None:
        touch(path)
        real_sync(path)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(atomic, "sync", synced)
    return touched


def refusal(run: RunFolder) -> str | None:
    """Return why step 4 cannot be saved, or None if it was saved."""
    try:
        save_again(run, 4)
    except WriteError as error:
        return str(error)
    return None


def test_a_full_disk_at_any_write_leaves_what_there_was(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """ENOSPC at any write or sync gives one message, removes the temporary folder and leaves every file as it was."""
    before = files(run.path)
    for at in count(1):
        with monkeypatch.context() as patch:
            touched = refusing(patch, at)
            message = refusal(run)
        if message is None:
            break
        assert "checkpoints/step-4: cannot be written: No space left on device" in message
        assert len(touched) >= at
        assert files(run.path) == before
    assert at > len(list((run.path / "checkpoints" / "step-4").iterdir()))
    assert newest(run)[0] == "step-4"


def test_a_run_on_a_full_disk_ends_with_one_message(config: Path, monkeypatch: pytest.MonkeyPatch):
    """If the disk is full at the second checkpoint, the weights are still saved, and the first checkpoint resumes."""
    step = loop.TrainingRun._step

    def filling(self, number: int, examples) -> None:
        step(self, number, examples)
        if number == 2:
            refusing(monkeypatch, 3)

    monkeypatch.setattr(loop.TrainingRun, "_step", filling)
    with pytest.raises(UserError) as raised:
        fastpref.train(config, SETTINGS)
    message = str(raised.value)
    assert message.startswith("out/checkpoints/step-2: cannot be written: No space left on device")
    assert "the weights after step 2 are in out/stopped" in message
    assert "fastpref train out/config.toml --resume out/checkpoints/step-1" in message
    assert sorted(p.name for p in Path("out/checkpoints").iterdir()) == ["step-1"]
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    fastpref.train(config, SETTINGS, resume=True)
    assert [row["step"] for row in rows(Path("out"))] == [0, 1, 2, 3, 3]
    assert not Path("out/stopped").exists()


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mount a file system of four megabytes, which only an administrator can do."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(not Path("/proc/mounts").exists(), reason="needs Linux")
def test_a_file_system_that_is_really_full(small_disk: Path, run: RunFolder):
    """On a full disk every existing file stays as it is, and the command ends with a message and status 2."""
    shutil.copytree(run.path, small_disk / "out")
    small = RunFolder(small_disk / "out")
    before = files(small.path)

    def fill(free: int) -> None:
        (small_disk / "filler").unlink(missing_ok=True)
        room = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free)))

    messages = []
    for free in (*range(0, 700_000, 50_000), 3_000_000):
        fill(free)
        messages.append(refusal(small))
        shutil.rmtree(small.path / "checkpoints" / "step-4", ignore_errors=True)
        assert files(small.path) == before
    assert None in messages
    refusals = [message for message in messages if message]
    assert refusals
    assert all("o space left on device" in message for message in refusals)
    fill(300_000)
    ran = run_process("train", "cfg.toml", *SETTINGS, "train.steps=5", f"output.dir={small.path}", "--resume")
    assert ran.status == 2, ran.err
    assert f"output.dir = '{small.path}': 0.3 MiB are free there, and the result (" in ran.err  # before a step is lost
    assert "Traceback" not in ran.err
    assert files(small.path) == before
    assert damage(small.path / "checkpoints" / "step-3") is None


def test_metrics_that_cannot_be_written(config: Path, monkeypatch: pytest.MonkeyPatch):
    """If a row of metrics cannot be written, a checkpoint is saved and named, and the run can be resumed from it."""
    log = RunFolder.log

    def refused(self: RunFolder, row) -> None:
        if row["step"] == 2:
            raise WriteError(f"{self.metrics}: cannot be written: No space left on device")
        log(self, row)

    monkeypatch.setattr(RunFolder, "log", refused)
    with pytest.raises(UserError, match=r"(?s)metrics\.jsonl: cannot.*go on with.*--resume out/checkpoints/step-"):
        fastpref.train(config, [*SETTINGS, "output.save_every=100"])
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    fastpref.train("out/config.toml", resume="out")
    assert [row["step"] for row in rows(Path("out"))][-2:] == [3, 3]
