"""Two hosts without a shared disk: if one lacks something or has it in another version, both end with one message
before the first step, and neither waits for the other."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastpref
from fastpref.errors import UserError
from fastpref.processes import Processes, end_together
from tests.support.paths import EXAMPLES, ROOT
from tests.support.runs import CONFIG, rows

LIMIT = 300  # seconds after which a run counts as waiting forever


def environment(rank: int, port: int) -> dict[str, str]:
    """Return the environment that a launcher sets on each of two hosts."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def both(commands: list[list[str]], folders: list[Path]) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes at once, and fail if one does not end."""
    port = free_port()
    started = [
        subprocess.Popen(
            command, env=environment(rank, port), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank, (command, folder) in enumerate(zip(commands, folders))
    ]
    try:
        outcomes = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *outcome) for p, outcome in zip(started, outcomes)]


def host(folder: Path) -> Path:
    """Make a disk with its own config, model and rows."""
    shutil.copytree(EXAMPLES / "quickstart" / "model", folder / "model")
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(EXAMPLES / "quickstart" / name, folder)
    text = CONFIG.replace(f"{EXAMPLES.as_posix()}/quickstart/", "").replace("steps = 10", "steps = 2")
    (folder / "cfg.toml").write_text(text.replace("save_every = 5", "save_every = 1") + "[lora]\nrank = 2\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process with two checkpoints, and return the run's folder."""
    folder = host(tmp_path_factory.mktemp("one") / "host")
    fastpref.train(folder / "cfg.toml", [f"output.dir={folder / 'out'}"])
    return folder / "out"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def prepare(case: str, hosts: list[Path], run: Path) -> None:
    """Make the second host differ from the first (or the first lack its rows)."""
    match case:
        case "no config":
            (hosts[1] / "cfg.toml").unlink()
        case "no model":
            shutil.rmtree(hosts[1] / "model")
        case "no rows":
            (hosts[1] / "train.jsonl").unlink()
        case "no rows on the first":
            (hosts[0] / "train.jsonl").unlink()
        case "other rows":
            edit(hosts[1] / "train.jsonl", "nine", "ten")
        case "other weights":
            edit_weights(hosts[1] / "model" / "model.safetensors")
        case "no checkpoint":
            shutil.copytree(run, hosts[0] / "out")
        case "another checkpoint":
            for folder in hosts:
                shutil.copytree(run, folder / "out")
            shutil.rmtree(hosts[1] / "out" / "checkpoints" / "step-2")


def edit_weights(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


CASES = {  # the messages on the first host and on the second
    "no config": ("process 1 on .*cfg.toml: there is no such file", "^cfg.toml: there is no such file"),
    "no model": (
        "process 1 on .*model.name = 'model': no tokenizer there",
        "^model.name = 'model': no tokenizer there",
    ),
    "no rows": ("process 1 on .*train.jsonl: there is no such file", "^train.jsonl: there is no such file"),
    "no rows on the first": (
        "^train.jsonl: there is no such file",
        "process 0 on .*train.jsonl: there is no such file",
    ),
    "no checkpoint": ("process 1 on .*--resume: there is no ", "^--resume: there is no "),
    "another setting": (r"train.batch: 4 \(process 0 on .*\), 5 \(process 1 on ", r"train.batch: 4 \(process 0 on "),
    "another checkpoint": ("checkpoint: 'step-2, .*'step-1, ", "checkpoint: 'step-2, .*'step-1, "),
    "other rows": ("tokens of the training rows: ", "tokens of the training rows: "),
    "other weights": ("the model's weights: ", "the model's weights: "),
}


@pytest.fixture(scope="module")
def came(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the outcome of every case on each host."""
    folder = tmp_path_factory.mktemp("hosts")
    for case in [*CASES, "alike"]:
        prepare(case, [host(folder / case / f"host{rank}") for rank in range(2)], run)
    script = str(ROOT / "tests" / "support" / "host_runs.py")
    ended = both([[sys.executable, script, str(folder)]] * 2, [folder, folder])
    assert [process.returncode for process in ended] == [0, 0], ended
    return [json.loads((folder / f"came{rank}.json").read_text()) for rank in range(2)] + [{"folder": folder}]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_one_host_lacks_ends_both(came: list[dict[str, Any]], case: str):
    """Each host ends with one message that names the other host's fault, and nothing is written."""
    folder = came[2]["folder"]
    for rank, said in enumerate(CASES[case]):
        assert isinstance(came[rank][case], str), came[rank][case]
        assert_matches(said, came[rank][case])
        if "checkpoint" not in case:
            assert not (folder / case / f"host{rank}" / "out").exists()


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(UserError, match=pattern):
        raise UserError(text)


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
    gone = hosts[1] / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    command = f'cd "{disk}" && exec "{sys.executable}" -m fastpref train cfg.toml --resume train.steps=3'
    commands = [
        ["unshare", "--mount", "sh", "-c", f'mount --bind "{folder}" "{disk}" && {command}'] for folder in hosts
    ]
    ended = both(commands, [tmp_path, tmp_path])
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
