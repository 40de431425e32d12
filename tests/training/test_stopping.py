"""train.stop: a run ends early when evaluations get no better, with the best weights in final/."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastpref
from fastpref.config import Config
from fastpref.config.losses import DPO, LOSSES
from fastpref.config.stopping import Better, StopConfig, metrics_to_stop_by
from fastpref.errors import UserError
from fastpref.run.folder import RunFolder
from fastpref.run.state import Progress
from fastpref.step.objective import Objective
from fastpref.training.progress import Display
from fastpref.training.stopping import left_language
from tests.support.runs import LORA, contents, rows

STOP = [LORA, "eval.every=1", 'train.stop={after=2, metric="eval/loss"}', "output.save_every=100"]


def pretend(monkeypatch: pytest.MonkeyPatch, metric: str, values: list[float]) -> None:
    """Let the evaluations of a run give these values of a metric, by the number of the step."""
    evaluate = Objective.evaluate
    at = iter(range(len(values)))

    def pretended(self: Objective, *args: Any) -> Any:
        metrics = evaluate(self, *args)
        result = metrics.result() | {metric: values[next(at)]}
        monkeypatch.setattr(metrics, "result", lambda: result)
        return metrics

    monkeypatch.setattr(Objective, "evaluate", pretended)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


ENDS = {  # overrides of train.stop, values by step, the last step, the step of the best
    "lower is better": ('{after=2, metric="eval/loss"}', [0.7, 0.6, 0.5, 0.55, 0.51, 0.4], 4, 2),
    "higher is better": ('{after=2, metric="eval/rewards/accuracies"}', [0.5, 0.6, 0.5, 0.7, 0.7, 0.6, 0.9], 5, 3),
    "by more than": ('{after=1, metric="eval/loss", by=0.1}', [0.7, 0.55, 0.5, 0.1], 2, 1),
    "the count begins anew": ('{after=2, metric="eval/loss"}', [0.7, 0.8, 0.6, 0.7, 0.5, 0.6, 0.6], 6, 4),
    "nothing beats the start": ('{after=3, metric="eval/rewards/margins"}', [0.0, -0.1, -0.2, -0.3, 0.5], 3, 0),
    "no number": ('{after=2, metric="eval/loss"}', [0.7, float("nan"), 0.6, float("nan"), float("nan")], 4, 2),
    "never": ('{after=9, metric="eval/loss"}', [0.7, 0.6, 0.5, 0.9, 0.9, 0.9, 0.9], 6, 2),
}


@pytest.mark.parametrize(("stop", "values", "last", "best"), ENDS.values(), ids=ENDS)
def test_a_run_ends_with_the_best(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stop: str, values: list[float], last: int, best: int
):
    """A run ends after `after` evaluations in a row that are not better; final/ has the weights of the best, which has
    a checkpoint without save_every; the result's metrics are those of final/, and the last state is saved too."""
    metric = stop.split('"')[1]
    pretend(monkeypatch, metric.removeprefix("eval/"), values)
    text = config.read_text().replace("save_every = 5\n", "")
    config.write_text(text)
    result = fastpref.train(config, [LORA, "train.steps=6", "eval.every=1", f"train.stop={stop}"])
    out = result.output_dir
    assert rows(out)[-1]["step"] == last
    assert RunFolder(out).best() == f"step-{best}"
    assert weights(out / "final") == weights(out / "checkpoints" / f"step-{best}")
    assert (out / "checkpoints" / f"step-{last}").is_dir()
    assert result.eval_metrics[metric] == values[best]
    assert f"| step {best} |" in (out / "final" / "README.md").read_text()
    assert json.loads((out / "run.json").read_text())["heldout"]["step"] == best
    assert f"final/ gets the weights of step {best}" in capsys.readouterr().out


def test_an_interrupted_run_stops_where_it_would_have(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The count of evaluations that are not better goes on after Ctrl-C and --resume; the result is the same bits."""
    values = [0.7, 0.5, 0.6, 0.55, 0.4, 0.3]
    with monkeypatch.context() as patch:
        pretend(patch, "loss", values)
        fastpref.train(config, [*STOP, "train.stop.after=2", "output.dir=whole"])
    step = Display.step

    def interrupted(self, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        pretend(patch, "loss", values)
        patch.setattr(Display, "step", interrupted)
        assert fastpref.train(config, STOP).interrupted
    with monkeypatch.context() as patch:
        pretend(patch, "loss", values[3:])
        fastpref.train(config, STOP, resume=True)
    assert rows(Path("out")) == rows(Path("whole"))
    assert [row["step"] for row in rows(Path("out"))][-1] == 3
    for place in ("final", "checkpoints/step-1", "checkpoints/step-3"):
        ours, theirs = (contents(Path(run, place)) for run in ("out", "whole"))
        for name in ("adapter_model.safetensors", "training_state.safetensors"):
            assert ours.get(name) == theirs.get(name), (place, name)


def test_a_stopped_run_goes_on_with_more_patience(config: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that has ended early ends again when it is resumed, and goes on if train.stop asks for more."""
    with monkeypatch.context() as patch:
        pretend(patch, "loss", [0.7, 0.5, 0.6, 0.6])
        fastpref.train(config, STOP)
    before = weights(Path("out/final"))
    fastpref.train(config, STOP, resume=True)
    assert rows(Path("out"))[-1]["step"] == 3
    assert weights(Path("out/final")) == before
    with monkeypatch.context() as patch:
        pretend(patch, "loss", [0.4, 0.9, 0.9, 0.9])
        fastpref.train(config, [*STOP, "train.stop.after=3"], resume=True)
    assert rows(Path("out"))[-1]["step"] == 7
    assert weights(Path("out/final")) == weights(Path("out/checkpoints/step-4")) != before


def test_a_best_without_a_checkpoint_is_forgotten(config: Path, capsys: Any):
    """A run resumed with a new train.stop says that its best evaluation so far has no checkpoint, and takes another."""
    fastpref.train(config, [LORA, "train.steps=4", "eval.every=1", "output.save_every=4"])
    shutil.rmtree("out/final")
    for place in Path("out/checkpoints").glob("step-*"):
        if place.name != "step-4":
            shutil.rmtree(place)
    best = RunFolder(Path("out")).best()
    result = fastpref.train(
        config, [LORA, "train.steps=6", "eval.every=1", 'train.stop={metric="eval/loss"}'], resume=True
    )
    told = "has no checkpoint; train.stop takes a later one" in capsys.readouterr().out
    assert told == (best != "step-4")
    assert (result.output_dir / "final").is_dir()


def test_a_metric_that_the_rows_do_not_give(config: Path):
    """Held-out rows of one kind have no accuracy; the run says so before its first step."""
    held = Path("good.jsonl")
    held.write_text(
        "\n".join(json.dumps({"prompt": f"What is {n}?", "completion": "A number.", "label": True}) for n in range(4))
    )
    settings = [LORA, "loss.type=kto", "eval.every=1", "eval.data=[{path='good.jsonl'}]", "train.stop={}"]
    with pytest.raises(UserError, match=r"train\.stop\.metric: .* no eval/rewards/accuracies; it has eval/loss"):
        fastpref.train(config, settings)
    assert rows(Path("out")) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_the_metrics_of_a_loss_are_in_its_evaluations(config: Path, loss: str):
    """Every metric that train.stop takes for a loss is one that its evaluations have."""
    result = fastpref.train(config, [LORA, f"loss.type={loss}", "train.steps=1", "eval.samples=0"])
    known = metrics_to_stop_by(fastpref.load_config(config, [f"loss.type={loss}"]).loss)
    assert set(known) <= set(result.eval_metrics)
    undirected = {"entropy", "logits/chosen", "logits/rejected", "rewards/length_correlation", "kl"}
    assert set(result.eval_metrics) - set(known) <= {f"eval/{name}" for name in undirected}


ACCURACY, LOSS = "rewards/accuracies", "loss"
BETTER: dict[str, tuple[StopConfig | None, dict[str, float], dict[str, float], bool]] = {
    "more accurate": (None, {ACCURACY: 0.6, LOSS: 2}, {ACCURACY: 0.5, LOSS: 1}, True),
    "as accurate, lower loss": (None, {ACCURACY: 0.5, LOSS: 1}, {ACCURACY: 0.5, LOSS: 2}, True),
    "the same": (None, {ACCURACY: 0.5, LOSS: 1}, {ACCURACY: 0.5, LOSS: 1}, False),
    "no accuracy, in SFT": (None, {LOSS: 1, "perplexity": 3}, {LOSS: 2, "perplexity": 4}, True),
    "a tie is not better": (StopConfig(), {ACCURACY: 0.5, LOSS: 1}, {ACCURACY: 0.5, LOSS: 2}, False),
    "not by enough": (StopConfig(metric="eval/loss", by=0.5), {LOSS: 1.5}, {LOSS: 2}, False),
    "the first was no number": (StopConfig(metric="eval/loss"), {LOSS: 5}, {LOSS: float("nan")}, True),
    "this one is no number": (StopConfig(metric="eval/loss"), {LOSS: float("nan")}, {LOSS: 5}, False),
}


@pytest.mark.parametrize(("stop", "new", "best", "expected"), BETTER.values(), ids=BETTER)
def test_what_is_better(stop: StopConfig | None, new: dict[str, float], best: dict[str, float], expected: bool):
    def named(values: dict[str, float]) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in values.items()}

    assert Better.of(stop, DPO())(named(new), named(best)) == expected


HEALTHY = {"eval/loss": 0.69, "eval/rewards/accuracies": 0.5, "eval/rewards/chosen": 0.0, "eval/rewards/margins": 0.0,
           "eval/logps/chosen": -4.6, "eval/entropy": 0.23, "eval/mean_token_accuracy": 0.89}  # fmt: skip
LEARNT = {"eval/loss": 0.35, "eval/rewards/accuracies": 0.9, "eval/rewards/margins": 0.9}
SPOILT = {"eval/loss": 0.1, "eval/rewards/accuracies": 1.0, "eval/rewards/margins": 4.0, "eval/rewards/chosen": -0.6}


@pytest.mark.parametrize(
    ("stop", "best"), [(None, 10), ({}, 10), ({"metric": "eval/loss"}, 20)], ids=["default", "auto", "a named metric"]
)
def test_a_model_that_has_left_its_language_is_not_the_best(stop: Any, best: int):
    """The best is the last good evaluation, however right a later one is; a metric that is named decides alone."""
    config = Config.model_validate(
        {"model": {"name": "m"}, "data": [{"path": "d"}], "eval": {"fraction": 0.1}, "train": {"stop": stop}}
    )
    data: Any = SimpleNamespace(extras=False)
    progress = Progress()
    for step, change in ((0, {}), (10, LEARNT), (20, SPOILT)):
        row = HEALTHY | change
        progress.step, progress.evaluated = step, row
        better = Better.of(config.train.stop, config.loss)
        progress.improved(better, departed=left_language(config, data, progress, row))
    assert progress.best is not None
    assert progress.best["step"] == best
    assert progress.not_better == (20 - best) // 10
