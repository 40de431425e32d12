"""A reference with adapters computes each completion once: in later epochs, evaluations and runs it is looked up."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastpref
from fastpref.data.batch import PreferenceBatch
from fastpref.step import precompute
from fastpref.step.logprob_store import LogprobStore
from fastpref.step.reference import ModelReference
from fastpref.training.progress import Display
from tests.support.paths import QUICKSTART_MODEL
from tests.support.runs import LORA, contents, rows

EPOCH = 5  # steps, of which the last belongs to the second epoch too
CALL = ModelReference.__call__


class Passes:
    """The number of the reference's passes in each step; evaluations belong to the step after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.by_step = [0]
        step = Display.step

        def counted(reference: ModelReference, batch: PreferenceBatch) -> Tensor:
            self.by_step[-1] += 1
            return CALL(reference, batch)

        def ended(display: Display, *facts: Any) -> None:
            self.by_step.append(0)
            step(display, *facts)

        monkeypatch.setattr(ModelReference, "__call__", counted)
        monkeypatch.setattr(Display, "step", ended)

    def take(self) -> list[int]:
        """Return the passes of each step of a run, and of its last evaluation, and count anew."""
        taken, self.by_step = self.by_step, [0]
        return taken


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


KTO = ("loss.type=kto", "data.0.rows=11")  # 22 completions
METHODS = {
    "dpo": [],
    "ipo, packed": ["loss.type=ipo", "train.layout=packed"],
    "dpo, padded": ["train.layout=padded"],
    "dpo that sorts": ['loss.variants=["aot"]'],
    "dpo that sorts at once": ['loss.variants=["aot"]', "train.tokens_per_microbatch=4000"],
    "kto": [*KTO],
    "kto at once": [*KTO, "train.tokens_per_microbatch=4000"],
    "kto without kl": [*KTO, 'loss.kl="none"'],
}


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_each_completion_is_computed_once(config: Path, passes: Passes, overrides: list[str]):
    """After the first epoch no step and no evaluation makes a pass of the reference, and a later run makes none. KTO's
    steps still compute their mismatched completions. All metrics are those of a reference that computes every step."""
    pairs_each_other = "loss.type=kto" in overrides and 'loss.kl="none"' not in overrides
    fastpref.train(config, [LORA, *overrides, "output.dir=first"])
    first = passes.take()
    assert all(first[:EPOCH])
    assert all(first[EPOCH:10]) if pairs_each_other else first[EPOCH:] == [0] * 6
    assert first[10] == 0  # the last evaluation
    fastpref.train(config, [LORA, *overrides, "output.dir=second"])
    assert passes.take() == [0] * 11
    assert rows(Path("second")) == rows(Path("first"))
    fastpref.train(config, [LORA, *overrides, "reference.mode=adapter", "output.dir=live"])
    assert sum(passes.take()) > sum(first)
    for remembered, live in zip(rows(Path("first")), rows(Path("live")), strict=True):
        assert remembered == pytest.approx(live, rel=1e-4, abs=1e-6)


def test_what_a_run_says(config: Path, passes: Passes, capsys: pytest.CaptureFixture[str], cache: Path):
    """The start says what is remembered where, what is there already, and why nothing is remembered."""
    once = "the same weights with the adapters off, computed once for each completion and remembered in"
    short = [LORA, "train.steps=2", "eval.data=[]", "eval={}"]
    cases = {
        (): (True, once),
        ("train.batch=6",): (True, "reference log-probabilities: those of 20 completions are there"),
        ("reference.mode=adapter",): (True, "reference: the same weights with the adapters off\n"),
    }
    for number, (overrides, (used, words)) in enumerate(cases.items()):
        fastpref.train(config, [*short, *overrides, f"output.dir=run-{number}"], cache=used)
        assert words in capsys.readouterr().out.replace("\r", "")
    before = contents(cache)
    passes.take()
    fastpref.train(config, [*short, "output.dir=without"], cache=False)
    assert "computed in every step: --no-cache keeps nothing" in capsys.readouterr().out
    assert all(passes.take()[:2])
    assert contents(cache) == before


def test_another_model_or_dtype_is_computed_again(config: Path, passes: Passes):
    """Numbers of other weights or of another dtype are never used."""
    model = Path("model")
    shutil.copytree(QUICKSTART_MODEL, model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: t * 1.01 for name, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    short = [LORA, "train.steps=2", "eval.data=[]", "eval={}"]
    for number, overrides in enumerate(([], ["model.name=model"], ["model.dtype=bfloat16"])):
        fastpref.train(config, [*short, *overrides, f"output.dir=run-{number}"])
        assert all(passes.take()[:2])
        fastpref.train(config, [*short, *overrides, f"output.dir=again-{number}"])
        assert passes.take() == [0, 0, 0]


def test_a_damaged_file_is_told_and_computed_again(config: Path, passes: Passes, cache: Path, capsys):
    """A damaged file is named; what it held is computed and written again, and the results are the same."""
    short = [LORA, "train.steps=4", "eval.data=[]", "eval={}"]
    fastpref.train(config, [*short, "output.dir=first"])
    (file,) = cache.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    passes.take()
    capsys.readouterr()
    fastpref.train(config, [*short, "output.dir=second"])
    assert f"{file}: cannot be used and is computed again" in capsys.readouterr().out
    assert all(passes.take()[:4])
    assert rows(Path("second")) == rows(Path("first"))
    fastpref.train(config, [*short, "output.dir=third"])
    assert passes.take() == [0] * 5


def test_a_disk_that_refuses_costs_only_time(config: Path, passes: Passes, cache: Path, capsys, monkeypatch):
    """If the folder cannot be written, the run says so, computes every step, and has the same results."""
    fastpref.train(config, [LORA, "reference.mode=adapter", "output.dir=live"])
    live = passes.take()
    monkeypatch.setattr(precompute, "_FILE", 1)  # tokens: a file after every micro-batch
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("in the way")
    capsys.readouterr()
    fastpref.train(config, [LORA, "output.dir=out"])
    assert capsys.readouterr().out.count("not remembered any more") == 1
    assert passes.take() == live
    assert rows(Path("out")) == rows(Path("live"))


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the next run after a step."""
    display = Display.step

    def interrupted(self: Display, number: int, *rest: Any) -> None:
        display(self, number, *rest)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "step", interrupted)


@pytest.mark.parametrize("loss", [["loss.type=dpo"], KTO], ids=["dpo", "kto"])
def test_a_resumed_run_does_not_see_what_came_later(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: list[str]
):
    """A resumed run equals the uninterrupted one bit for bit, although another run has meanwhile written numbers that
    differ by rounding, here by more, for completions that it has yet to compute."""
    settings = [LORA, *loss, "output.keep=9"]
    fastpref.train(config, [*settings, "output.dir=whole"])
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "later"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert fastpref.train(config, settings).interrupted
    with monkeypatch.context() as patch:
        patch.setattr(ModelReference, "__call__", lambda self, batch: CALL(self, batch) + 1e-3)
        fastpref.train(config, [*settings, "output.dir=other"])
    own, others = (LogprobStore(next(Path(folder, "reference").iterdir())) for folder in ("cache", "later"))
    assert set(own) == set(others)
    assert any(not torch.equal(own[key], others[key]) for key in own)
    resumed = fastpref.train(config, settings, resume=True)
    assert rows(resumed.output_dir) == rows(Path("whole"))
    assert contents(Path("out/final")) == contents(Path("whole/final"))


def test_a_resumed_run_says_what_is_lost(config: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Without the files that a checkpoint names the run goes on, equal to the uninterrupted one but for rounding, and
    says so."""
    fastpref.train(config, [LORA, "output.dir=whole"])
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        fastpref.train(config, [LORA])
    shutil.rmtree(cache)
    capsys.readouterr()
    fastpref.train(config, [LORA], resume=True)
    out = capsys.readouterr().out
    assert "cannot be used and is computed again" in out
    assert "equals an uninterrupted run but for rounding" in out
    for resumed, whole in zip(rows(Path("out")), rows(Path("whole")), strict=True):
        assert resumed == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_a_file_is_written_during_an_epoch(config: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that is killed keeps what is in files, which are written after so many tokens and with each checkpoint."""
    monkeypatch.setattr(precompute, "_FILE", 100)
    files: list[int] = []
    step = Display.step

    def ended(self: Display, *facts: Any) -> None:
        files.append(len(list(cache.glob("*/*.safetensors"))))
        step(self, *facts)

    monkeypatch.setattr(Display, "step", ended)
    result = fastpref.train(config, [LORA, "eval.data=[]", "eval={}"])
    assert files == sorted(files)
    assert 1 < files[3] <= files[-1]
    state = (result.output_dir / "checkpoints" / "step-5" / "training_state.json").read_text()
    named = {pair[0]: pair[1] for pair in json.loads(state)["map"]}["reference"]
    assert len(named) > files[3]
    assert all((next(cache.iterdir()) / name).is_file() for name in named)
