"""Two hosts without a shared disk: if one lacks something or has it in another version, both end with one message
before the first step, and neither waits for the other."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fastpref
from fastpref.errors import UserError
from fastpref.processes import Processes, end_together
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL, QUICKSTART_ROWS, ROOT
from tests.support.process_runs import launched
from tests.support.runs import CONFIG, rows

LIMIT = 300  # seconds after which a run counts as waiting forever


def both(commands: list[list[str]], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes at once, as a launcher does on two hosts, and fail if one does not end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank, command in enumerate(commands):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=launched(variables), cwd=folder, **pipes))
    try:
        outcomes = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *outcome) for p, outcome in zip(started, outcomes)]


def host(folder: Path) -> Path:
    """Make a disk with its own config, model and rows."""
    shutil.copytree(QUICKSTART_MODEL, folder / "model")
    for file in (QUICKSTART_ROWS, QUICKSTART_HELDOUT):
        shutil.copy(file, folder)
    text = CONFIG.replace(f"{QUICKSTART_MODEL.parent.as_posix()}/", "").replace("steps = 10", "steps = 2")
    (folder / "cfg.toml").write_text(text.replace("save_every = 5", "save_every = 1") + "[lora]\nrank = 2\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process with two checkpoints, and return the run's folder."""
    folder = host(tmp_path_factory.mktemp("one") / "host")
    fastpref.train(folder / "cfg.toml", [f"output.dir={folder / 'out'}"])
    return folder / "out"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit_rows(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "nine" in text
    file.write_text(text.replace("nine", "ten"), encoding="utf-8")


def edit_weights(file: Path) -> None:
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def other_checkpoints(first: Path, second: Path, run: Path) -> None:
    for folder in (first, second):
        shutil.copytree(run, folder / "out")
    remove(second / "out" / "checkpoints" / "step-2")


# How the hosts become different (from their folders and the run's), and the messages on the first and on the second.
CASES: dict[str, tuple[Callable[..., object] | None, str, str]] = {
    "no config": (
        lambda first, second, run: remove(second / "cfg.toml"),
        "process 1 on .*cfg.toml: there is no such file", "^cfg.toml: there is no such file",
    ),
    "no model": (
        lambda first, second, run: remove(second / "model"),
        "process 1 on .*model.name = 'model': no tokenizer there", "^model.name = 'model': no tokenizer there",
    ),
    "no rows": (
        lambda first, second, run: remove(second / "train.jsonl"),
        "process 1 on .*train.jsonl: there is no such file", "^train.jsonl: there is no such file",
    ),
    "no rows on the first": (
        lambda first, second, run: remove(first / "train.jsonl"),
        "^train.jsonl: there is no such file", "process 0 on .*train.jsonl: there is no such file",
    ),
    "no checkpoint": (
        lambda first, second, run: shutil.copytree(run, first / "out"),
        "process 1 on .*--resume: there is no ", "^--resume: there is no ",
    ),
    "another setting": (
        None, r"train.batch: 4 \(process 0 on .*\), 5 \(process 1 on ", r"train.batch: 4 \(process 0 on "
    ),
    "another checkpoint": (
        other_checkpoints, "checkpoint: 'step-2, .*'step-1, ", "checkpoint: 'step-2, .*'step-1, "
    ),
    "other rows": (
        lambda first, second, run: edit_rows(second / "train.jsonl"),
        "tokens of the training rows: ", "tokens of the training rows: ",
    ),
    "other weights": (
        lambda first, second, run: edit_weights(second / "model" / "model.safetensors"),
        "the model's weights: ", "the model's weights: ",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def came(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the outcome of every case on each host."""
    folder = tmp_path_factory.mktemp("hosts")
    for case in [*CASES, "alike"]:
        hosts = [host(folder / case / f"host{rank}") for rank in range(2)]
        if case in CASES and (change := CASES[case][0]) is not None:
            change(*hosts, run)
    script = str(ROOT / "tests" / "support" / "host_runs.py")
    ended = both([[sys.executable, script, str(folder)]] * 2, folder)
    assert [process.returncode for process in ended] == [0, 0], ended
    return [json.loads((folder / f"came{rank}.json").read_text()) for rank in range(2)] + [{"folder": folder}]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_one_host_lacks_ends_both(came: list[dict[str, Any]], case: str):
    """Each host ends with one message that names the other host's fault, and nothing is written."""
    folder = came[2]["folder"]
    for rank, message in enumerate(CASES[case][1:]):
        assert isinstance(came[rank][case], str), came[rank][case]
        assert re.search(message, came[rank][case])
        if "checkpoint" not in case:
            assert not (folder / case / f"host{rank}" / "out").exists()


@pytest.mark.slow
def test_hosts_that_are_alike_train(came: list[dict[str, Any]], run: Path):
    """Two equal hosts train without a shared disk: the first writes the run, the second only its own cache."""
    folder = came[2]["folder"] / "alike"
    last = [row for row in rows(run) if "loss" in row]
    assert came[0]["alike"] == came[1]["alike"]
    assert came[0]["alike"]["loss"] == pytest.approx(last[-1]["loss"], rel=1e-4)
    assert (folder / "host0" / "out" / "final").is_dir()
    assert not (folder / "host1" / "out").exists()


def namespaces() -> bool:
    """Return whether a test may mount folders on this machine."""
    tried = ["unshare", "--mount", "mount", "--bind", "/tmp", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="mount namespaces are not permitted here")
@pytest.mark.parametrize("missing", ["cfg.toml", "out"])
def test_in_two_mount_namespaces(run: Path, tmp_path: Path, missing: str):
    """With the same paths on two disks, both command lines end with status 2 and one message each."""
    disk = tmp_path / "disk"
    disk.mkdir()
    hosts = [host(tmp_path / f"host{rank}") for rank in range(2)]
    for folder in hosts:
        shutil.copytree(run, folder / "out")
    remove(hosts[1] / missing)
    command = f'cd "{disk}" && exec "{sys.executable}" -m fastpref train cfg.toml --resume train.steps=3'
    commands = [
        ["unshare", "--mount", "sh", "-c", f'mount --bind "{folder}" "{disk}" && {command}'] for folder in hosts
    ]
    ended = both(commands, tmp_path)
    assert [process.returncode for process in ended] == [2, 2], ended[0].stderr + ended[1].stderr
    for process in ended:
        assert process.stderr.count("fastpref") == 1
        assert "Traceback" not in process.stderr
    assert "ended because of process 1 on " in ended[0].stderr
    assert ended[1].stderr.startswith("fastpref (process 1): ")


def test_one_process_alone_keeps_its_own_message():
    """A single process gathers nothing and keeps its own message."""
    alone = Processes()
    assert alone.together(lambda: 3) == alone.first_then_others(lambda: 3) == 3
    alone.agree(dict)
    with pytest.raises(UserError, match=r"^mine$"):
        end_together(UserError("mine"))
