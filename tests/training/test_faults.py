"""A fault in a run is reported with its step, its rows and a remedy, and never updates the weights."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastpref
from fastpref.errors import UserError
from fastpref.model.failure import is_out_of_memory
from fastpref.step import objective as step_module
from fastpref.training import loop, start
from fastpref.training.faults import StoppedAtOnce, interrupts
from fastpref.training.progress import Display
from tests.support.command_line import PROGRAM, WIDE, run_process
from tests.support.runs import LORA, rows

SETTINGS = [LORA, "train.steps=4", "eval.every=100", "output.save_every=100", "train.tokens_per_microbatch=10000"]


def adapter(step: int) -> dict[str, torch.Tensor]:
    return load_file(f"out/checkpoints/step-{step}/adapter_model.safetensors")


def poison(monkeypatch: pytest.MonkeyPatch, what: str, at: set[int]) -> None:
    """Put a NaN into a weight or a row's log-probability, or an infinity into a gradient, in these steps (from 1)."""
    run_step, preference_loss = loop.TrainingRun._step, step_module.preference_loss
    backward = loop.Accelerator.backward
    now, bad = 0, None

    def stepping(self, number: int, examples) -> None:
        nonlocal now, bad
        now, bad = number, examples[3].completions[0]
        if what == "weight" and number in at:
            next(p for p in self.policy.parameters() if not p.requires_grad).data.view(-1)[7] = math.nan
        run_step(self, number, examples)

    def poisoned(logp, segments, lengths, *rest, **options):
        if what == "row" and now in at:
            # the row's chosen completion has a unique length, also when the row is computed alone
            ours = torch.tensor([len(bad or [])]) == lengths[: len(lengths) // 2]
            factor = torch.where(torch.isin(segments, ours.nonzero()[:, 0]), math.nan, 1.0)
            logp = logp * factor
        return preference_loss(logp, segments, lengths, *rest, **options)

    def propagating(self, loss, **options) -> None:
        backward(self, loss, **options)
        if what == "gradient" and now in at:
            last = [p for group in self._optimizers for g in group.param_groups for p in g["params"]][-1]
            last.grad.view(-1)[0] = math.inf

    monkeypatch.setattr(loop.TrainingRun, "_step", stepping)
    monkeypatch.setattr(step_module, "preference_loss", poisoned)
    monkeypatch.setattr(loop.Accelerator, "backward", propagating)


def test_an_interrupt_while_a_run_begins_says_what_is_there(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C after the folder was made, while trackers are reached, leaves a run that --force replaces."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trackers, "start", interrupt)
        with pytest.raises(StoppedAtOnce):
            fastpref.train(config, SETTINGS)
    assert "stopped before the first step; --force replaces out\n" in capsys.readouterr().out
    assert not fastpref.train(config, SETTINGS, force=True).interrupted


MESSAGES = {
    "weight": r"step 3: loss nan.*; the weights themselves are not finite: backbone\.\S+; its rows are .*jsonl:\d+;",
    "gradient": r"step 3: loss 0\.\d+, gradient norm (nan|inf); the gradients that are not finite are of \S+lora_\S+;",
    "row": r"step 3: loss nan.*; of its 5 rows these give such a loss by themselves: \S*train\.jsonl:\d+\. The model",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_what_is_not_finite_stops_before_it_is_used(config: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """Non-finite numbers stop the run: the step and rows are named, and the checkpoint of the step before resumes."""
    fastpref.train(config, [*SETTINGS, "output.dir=whole"])
    poison(monkeypatch, what, {3})
    with pytest.raises(UserError, match=MESSAGES[what]) as raised:
        fastpref.train(config, SETTINGS)
    assert not Path("out/final").exists()
    assert "fastpref train out/config.toml --resume out/checkpoints/step-2" in str(raised.value)
    assert [p.name for p in Path("out/checkpoints").glob("step-*")] == ["step-2"]
    assert all(torch.isfinite(t).all() for t in adapter(2).values())
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    fastpref.train("out/config.toml", resume="out")
    assert rows(Path("out")) == rows(Path("whole"))  # the failed step has changed neither weights nor random generators


@pytest.mark.parametrize("what", ["gradient", "row"])
def test_skipping_goes_on(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str):
    """A skipped step changes no weight; it is counted, and its row of metrics is valid JSON."""
    poison(monkeypatch, what, {3})
    result = fastpref.train(config, [*SETTINGS, "train.nonfinite=skip", "output.save_every=1", "output.keep=9"])
    assert math.isfinite(result.metrics["loss"])
    two, three, four = (adapter(n) for n in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert not all(torch.equal(three[name], four[name]) for name in two)
    assert "The step is left out, the 1. of this run" in capsys.readouterr().out
    text = Path("out/metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    skipped = next(row for row in rows(Path("out")) if row["step"] == 3)
    assert skipped["grad_norm"] is None


def test_skipping_ends_after_ten_in_a_row(config: Path, monkeypatch: pytest.MonkeyPatch):
    """Nine skipped steps in a row are tolerated and the tenth ends the run; a good step resets the count."""
    options = [*SETTINGS, "train.steps=14", "train.nonfinite=skip", "eval.data=[]", "eval={}", "log.every=100"]
    poison(monkeypatch, "gradient", {*range(2, 11), *range(12, 15)})
    fastpref.train(config, [*options, "output.dir=fine"])
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    poison(monkeypatch, "gradient", set(range(2, 12)))
    with pytest.raises(UserError, match=r"step 11: .*It is the 10th such step in a row"):
        fastpref.train(config, options)


ERRORS = {
    "a GPU's": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    "Python's": (MemoryError(), True),
    "a CPU's": (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
    "cuBLAS's": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    "another": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    "a disk's": (OSError("out of memory"), False),
}


@pytest.mark.parametrize(("error", "yes"), ERRORS.values(), ids=ERRORS)
def test_which_errors_are_of_memory(error: Exception, yes: bool):
    assert is_out_of_memory(error) == yes


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_no_memory_is_one_message_with_what_would_fit(config: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """Out of memory gives one message with a breakdown, an override and a command, with which the run continues."""
    options = [*SETTINGS, "eval.every=2"]
    run_step, evaluate = loop.TrainingRun._step, loop.TrainingRun._evaluate

    def stepping(self, number: int, examples) -> None:
        if number == 3 and where == "step":
            torch.rand(5)  # a failing step may have used the random generators
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run_step(self, number, examples)

    def evaluating(self) -> None:
        if self.progress.step == 2 and where == "evaluation":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        evaluate(self)

    monkeypatch.setattr(loop.TrainingRun, "_step", stepping)
    monkeypatch.setattr(loop.TrainingRun, "_evaluate", evaluating)
    with pytest.raises(UserError) as raised:
        fastpref.train(config, options)
    message = re.fullmatch(
        r"out of memory after step 2: the run holds weights 3\.3 MiB, adapters 0\.1 MiB, gradients 0\.1 MiB, optimizer "
        r"0\.3 MiB, head workspace 128\.0 MiB of .* activations of a micro-batch of .* would most likely fit "
        r"\(a step is counted at \S+ MiB\): (train\.tokens_per_microbatch=.*)\n.*"
        r"fastpref train out/config\.toml --resume out/checkpoints/step-2 \1", str(raised.value), re.DOTALL
    )  # fmt: skip
    assert message, raised.value
    overrides = message[1].split()
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    fastpref.train("out/config.toml", overrides, resume="out/checkpoints/step-2")
    assert [row["step"] for row in rows(Path("out"))] == [0, 1, 2, 2, 3, 4, 4]


def test_no_memory_to_load_the_model(config: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(start, "load_model", refuse)
    with pytest.raises(UserError, match=r"out of memory while .*model was loaded; it needs adapters, lora=\{\}, or"):
        fastpref.train(config)
    assert not Path("out").exists()


def test_two_signals_end_at_once(config: Path):
    """A second Ctrl-C does not wait for the end of the step."""
    with interrupts() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_an_interrupt_unless_it_is_ignored(config: Path, ignored: bool):
    """SIGHUP asks a run to stop, once, as its terminal sends several; nohup lets it go on."""
    told: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with interrupts(lambda: told.append(1)) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        assert (signals, told) == (([], []) if ignored else ([signal.SIGHUP], [1]))
    finally:
        signal.signal(signal.SIGHUP, before)


def signalled(monkeypatch: pytest.MonkeyPatch, what: str, times: int) -> None:
    """Send Ctrl-C so many times when the second phase of this name has computed a part."""
    phases: list[str] = []
    phase = Display.phase

    def begun(self: Display, words: str, *of: Any, **more: Any) -> None:
        phases.append(words)
        phase(self, words, *of, **more)

    def part(self: Display, number: int, of: int) -> None:
        if phases[-1].startswith(what) and [words.startswith(what) for words in phases].count(True) == 2:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "phase", begun)
    monkeypatch.setattr(Display, "part", part)


EVALUATED = [LORA, "train.steps=3", "log.every=1", "eval.every=1", "output.save_every=stop"]


def test_an_interrupt_does_not_wait_for_an_evaluation(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The evaluation is left out, the checkpoint is written, and a resumed run makes it: all rows are the same."""
    with monkeypatch.context() as patch:
        signalled(patch, "evaluating", 1)
        run = fastpref.train(config, EVALUATED)
    assert run.interrupted
    assert [path.name for path in Path("out/checkpoints").glob("step-*")] == ["step-1"]
    fastpref.train(config, EVALUATED, resume=True)
    fastpref.train(config, [*EVALUATED, "output.dir=whole"])
    assert rows(Path("out")) == rows(Path("whole"))


def test_a_second_interrupt_says_what_is_left(config: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    """After two signals in a step nothing of it remains, and the run says so before it ends."""
    signalled(monkeypatch, "step", 2)
    with pytest.raises(KeyboardInterrupt):
        fastpref.train(config, EVALUATED)
    printed = capfd.readouterr()
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops without one" in printed.err
    assert "stopped at once, after step 1. There is no checkpoint before it." in printed.out
    assert not Path("out/checkpoints").exists()


def test_a_command_that_is_interrupted_and_resumed(config: Path):
    """After Ctrl-C (status 130, no traceback), the printed command resumes, and the result is that of one whole run."""
    settings = [LORA, "train.steps=25", "eval.every=100", "log.every=1"]
    command = [*PROGRAM, "train", str(config), *settings]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | WIDE)
    metrics, deadline = Path("out/metrics.jsonl"), time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 130, printed
    assert "Traceback" not in printed
    assert "stopping after this step, with a checkpoint" in printed
    assert not Path("out/final").exists()
    resume = printed.splitlines()[-1].split()
    assert resume[:4] == ["fastpref", "train", "out/config.toml", "--resume"]
    ran = run_process(*resume[1:])
    assert ran.status == 0, ran.err
    fastpref.train(config, [*settings, "output.dir=whole"])
    assert rows(Path("out")) == rows(Path("whole"))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(26), 25]
