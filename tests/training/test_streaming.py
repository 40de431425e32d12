"""Runs with streamed layers: the same files as resident ones, and a run may go on either way."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator

import fastpref
from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.model.policy import Policy
from fastpref.model.streaming.stream import Streaming
from fastpref.processes import Processes
from fastpref.training import start
from tests.support.runs import LORA, contents, rows, write_config

STREAMED = "model.streaming=true"
SETTINGS = {"config.toml", "README.md"}  # files that name the run's settings
RUNS: dict[str, list[str]] = {
    "adapters": [LORA],
    "nf4, DoRA": ["lora={rank=4, dora=true}", "model.quantization=nf4", "loss.type=kto"],
    "nf4, ranks and layers": [
        'lora={rank=4, rank_pattern={q_proj=2}, alpha_pattern={v_proj=64}, layers=[0, "2:"]}', "model.quantization=nf4",
    ],
    "nf4, OLoRA": ['lora={rank=4, init="olora"}', "model.quantization=nf4"],
    "nf4, LoftQ": ['lora={rank=4, init="loftq"}', "model.quantization=nf4", "loss.type=orpo"],
    "precomputed": [LORA, 'reference.mode="precompute"', "loss.type=ipo"],
    "int8, head, no reference": [
        'lora={rank=4, target=["all-linear", "lm_head"], modules_to_save=["embed_tokens"]}',
        "model.quantization=int8", "loss.type=simpo",
    ],
}  # fmt: skip


def run_in(folder: Path, settings: Sequence[str]) -> Path:
    """Train ten steps without remembered reference log-probabilities, and return the folder of the run."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fastpref.train(write_config(folder), settings, cache=False)
    return folder / "out"


def assert_same_files(ours: Path, theirs: Path) -> None:
    for part in ("checkpoints/step-5", "checkpoints/step-10", "final"):
        a, b = contents(ours / part), contents(theirs / part)
        assert a.keys() == b.keys()
        assert {name for name in a if a[name] != b[name]} <= SETTINGS


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("resident"), RUNS["adapters"])


@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_run_writes_the_files_of_a_resident_one(
    tmp_path: Path, resident: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Metrics, checkpoints, adapter and samples are equal after ten steps; Accelerate never moves the policy."""
    plain = resident if name == "adapters" else run_in(tmp_path / "resident", RUNS[name])

    def moved(self: Policy, *args: object) -> None:
        raise AssertionError("the streamed policy was moved")

    monkeypatch.setattr(Policy, "to", moved)
    streamed = run_in(tmp_path / "streamed", [*RUNS[name], STREAMED])
    assert rows(streamed) == rows(plain)
    assert_same_files(streamed, plain)


def test_slots_and_residents_change_nothing_and_are_told(
    tmp_path: Path, resident: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A run with three slots and a layer that stays on the device writes the same files, and its notes count them."""
    monkeypatch.setattr(start, "choose_streaming", lambda *args, **options: (Streaming(3, 1), ["chosen so"]))
    run = run_in(tmp_path / "run", RUNS["adapters"])
    assert rows(run) == rows(resident)
    assert_same_files(run, resident)
    printed = " ".join(capsys.readouterr().out.split())
    assert "chosen so streaming: 3 of 4 layers" in printed
    assert "3 slots of at most" in printed


CONSTANT = [LORA, "train.schedule=constant", "train.warmup=0"]  # which does not depend on the number of steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("whole"), CONSTANT)


@pytest.mark.parametrize("first", ["resident", "streamed"])
def test_a_run_goes_on_streamed_or_not(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, first: str):
    """A run that changes model.streaming in its middle equals one that does not, bit for bit."""
    before, after = ([], [STREAMED]) if first == "resident" else ([STREAMED], [])
    run = run_in(tmp_path, [*CONSTANT, *before, "train.steps=5"])
    monkeypatch.chdir(tmp_path)
    fastpref.train(tmp_path / "cfg.toml", [*CONSTANT, *after], resume=run / "checkpoints/step-5", cache=False)
    for part in ("checkpoints/step-10", "final"):
        ours, theirs = contents(run / part), contents(whole / part)
        assert {name for name in theirs if ours[name] != theirs[name]} <= SETTINGS


REFUSED = {
    "full fine-tuning": ([STREAMED], "model.streaming: only frozen weights can stay in host memory"),
    "a copy": ([LORA, STREAMED, 'reference.mode="copy"'], "model.streaming: a frozen copy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_that_cannot_stream(tmp_path: Path, name: str):
    """A config that cannot be streamed is refused, and nothing is written."""
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        run_in(tmp_path / "run", settings)
    assert not (tmp_path / "run/out").exists()


def test_several_processes_do_not_stream(config: Path):
    """Weights are streamed to one GPU: true is refused with several processes, "auto" does without."""
    accelerator = Accelerator(cpu=True)
    two = Processes(0, 2)
    with pytest.raises(UserError, match=r"model\.streaming: .* there are 2 processes"):
        start._streaming(load_config(config, [LORA, STREAMED]), accelerator, two)
    assert start._streaming(load_config(config, [LORA]), accelerator, two) == (None, [])
