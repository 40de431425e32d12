"""Proposals for a step that does not fit: the cheapest changes first, and no more than needed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config, load_config
from fastpref.data.example import Example, Origin
from fastpref.data.longest import Microbatch
from fastpref.errors import UserError
from fastpref.memory import fit
from fastpref.memory.estimate import Estimator, proposal
from fastpref.memory.fit import Change, OversizedStep, first_change, propose
from fastpref.memory.measured import oversized_step, step_counter
from fastpref.memory.process import Card
from fastpref.memory.step import StepMemory
from fastpref.model.load import load_model
from fastpref.sizes import GIB
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.training.faults import out_of_memory
from tests.support.runs import LORA, write_config
from tests.support.tiny import config_for, examples, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MICROBATCH = "train.tokens_per_microbatch="
LITTLE = StepMemory(GIB, 0, 1, 2, 0, 0, 128 << 20, 0, layers=2, checkpointed=0, layout="tree")  # far below a GPU's size
CHECKPOINTED = replace(LITTLE, checkpointed=2)
MANY = (900, 900, 900, 900, 400)  # tokens of each example in the micro-batch
ONE = (900,)


def oversized(
    config: Config, memory: StepMemory, lengths: tuple[int, ...] = MANY, device: torch.device = CUDA, **options: Any
) -> OversizedStep:
    """Return a step that does not fit on a device of 24 GiB."""
    rows = [Example([0] * 100, ([0] * (length - 101), [0]), None, Origin("")) for length in lengths]
    microbatch = Microbatch(rows, False, sum(lengths), "made up")
    return OversizedStep(config, memory, microbatch, device, options.pop("capacity", 24 * GIB), **options)


# Without a count, by a rule of thumb: overrides, memory, lengths, options of the step, the first change.
FIRST: dict[str, tuple[list[str], StepMemory, tuple[int, ...], dict[str, Any], str]] = {
    "full fine-tuning that can never fit": (
        [], StepMemory(8 * GIB, 0, 8 * GIB, 16 * GIB, 8 * GIB, 0, 0, 0, 2, 0, "tree"), MANY, {}, "lora={}"
    ),
    "many examples at once": ([], LITTLE, MANY, {}, MICROBATCH + "2000"),
    "two examples at once": ([], LITTLE, (900, 100), {}, MICROBATCH + "900"),
    "one example at once": ([], LITTLE, ONE, {}, "train.checkpointing=true"),
    "one example, no layer checkpointed": (["train.checkpointing=false"], LITTLE, ONE, {}, "train.checkpointing=auto"),
    "no layer checkpointed, on a CPU": (
        ["train.checkpointing=false"], LITTLE, ONE, {"device": CPU}, "train.checkpointing=true"
    ),
    "one example, all layers checkpointed": ([], CHECKPOINTED, ONE, {}, "train.offload_activations=true"),
    "a model without checkpointing": ([], LITTLE, ONE, {"checkpointable": False}, "train.optimizer=adamw_8bit"),
    "and on a CPU": ([], CHECKPOINTED, ONE, {"device": CPU}, "train.optimizer=adamw_8bit"),
    "and moved": ([LORA, "train.offload_activations=true"], CHECKPOINTED, ONE, {}, "model.streaming=true"),
    "and streamed": (
        [LORA, "train.offload_activations=true", "model.streaming=true"], replace(CHECKPOINTED, streamed=2), ONE, {},
        "train.optimizer=adamw_8bit",
    ),
    "and no weights are frozen": (
        ["train.offload_activations=true"], CHECKPOINTED, ONE, {}, "train.optimizer=adamw_8bit"
    ),
    "and a copy stays on the GPU": (
        [LORA, "train.offload_activations=true", "reference.mode=copy", "reference.dtype=bfloat16"], CHECKPOINTED, ONE,
        {}, "train.optimizer=adamw_8bit",
    ),
    "paged": (
        [LORA, "train.offload_activations=true", "train.optimizer=paged_adamw"], replace(CHECKPOINTED, streamed=2), ONE,
        {}, "train.optimizer=paged_adamw_8bit",
    ),
    "lion": ([LORA, "train.optimizer=lion"], CHECKPOINTED, ONE, {"device": CPU}, "train.optimizer=lion_8bit"),
    "muon": (["train.optimizer=muon"], CHECKPOINTED, ONE, {"device": CPU}, "train.optimizer=adamw_8bit"),
    "adafactor": ([LORA, "train.optimizer=adafactor"], CHECKPOINTED, ONE, {"device": CPU}, "model.quantization=nf4"),
    "in 8 bits": ([LORA, "train.optimizer=adamw_8bit"], CHECKPOINTED, ONE, {"device": CPU}, "model.quantization=nf4"),
    "in 8 bits without adapters": (["train.optimizer=adamw_8bit"], CHECKPOINTED, ONE, {"device": CPU}, "lora={}"),
    "sharded": ([LORA], CHECKPOINTED, ONE, {"device": CPU, "sharded": True}, "tokens.max_length=48"),
    "stored quantised": (
        [LORA, "train.optimizer=adamw_8bit"], CHECKPOINTED, ONE, {"device": CPU, "quantised": True},
        "tokens.max_length=48",
    ),
    "in 4 bits": (
        [LORA, "train.optimizer=adamw_8bit", "model.quantization=nf4"], CHECKPOINTED, ONE, {"device": CPU},
        "tokens.max_length=48",
    ),
    "a copy": (["reference.mode=copy"], LITTLE, MANY, {}, "reference.mode=auto"),
    "rows of several copies of a prompt": (["train.layout=packed"], LITTLE, MANY, {}, "train.layout=auto"),
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


@pytest.mark.parametrize(("overrides", "memory", "lengths", "options", "first"), FIRST.values(), ids=FIRST)
def test_what_comes_first(
    path: Path, overrides: list[str], memory: StepMemory, lengths: tuple[int, ...], options: dict[str, Any], first: str
):
    """The first proposal is the expected override, and the config accepts it."""
    config = load_config(path, [*overrides, "train.tokens_per_microbatch=4000"])
    assert first_change(oversized(config, memory, lengths, **options)).overrides == (first,)
    load_config(path, [*overrides, first])


def counter(path: Path, parts: Mapping[str, int], *overrides: str) -> Callable[[tuple[str, ...]], StepMemory]:
    """Return a function that counts a step as the sum of its parts in GiB, as reduced by the config."""

    def count(more: tuple[str, ...]) -> StepMemory:
        config = load_config(path, [*overrides, *more])
        optimizer = parts.get("optimizer", 0) // (4 if config.train.optimizer == "adamw_8bit" else 1)
        weights = parts["weights"] // (4 if config.model.quantization == "nf4" else 1)
        weights = 1 if config.model.streaming is True else weights
        activations = parts["activations"] * (config.train.tokens_per_microbatch or 0) // 4000
        if config.train.checkpointing is True:
            activations //= 10
        if config.train.offload_activations:
            activations //= 2
        sizes = (weights, 0, 0, optimizer, 0, activations, 0, 0)
        return StepMemory(*(size * GIB for size in sizes), layers=2, checkpointed=0, layout="tree")

    return count


COUNTED = {
    "activations": ({"weights": 2, "activations": 30}, [MICROBATCH + "2000"], 17),
    "more of them": ({"weights": 2, "activations": 70}, [MICROBATCH + "1000"], 19),
    "layers too": ({"weights": 2, "activations": 400}, [MICROBATCH + "1000", "train.checkpointing=true"], 12),
    "layers in place of small micro-batches": (
        {"weights": 2, "activations": 110}, ["train.checkpointing=true"], 13,
    ),
    "frozen weights": ({"weights": 24, "activations": 0}, ["model.streaming=true"], 1),
    "frozen weights rather than moments": (
        {"weights": 20, "activations": 0, "optimizer": 4}, ["model.streaming=true"], 5,
    ),
    "and not for what smaller micro-batches save": (
        {"weights": 20, "activations": 3}, [MICROBATCH + "2000"], 21,
    ),
    "the optimizer": (
        {"weights": 14, "activations": 0, "optimizer": 40}, ["model.streaming=true", "train.optimizer=adamw_8bit"], 11,
    ),
    "and streaming is taken back": (
        {"weights": 10, "activations": 0, "optimizer": 40}, ["train.optimizer=adamw_8bit"], 20,
    ),
    "the optimizer alone": ({"weights": 1, "activations": 0, "optimizer": 40}, ["train.optimizer=adamw_8bit"], 11),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "overrides", "counted"), COUNTED.values(), ids=COUNTED)
def test_no_more_than_it_takes(path: Path, parts: dict[str, int], overrides: list[str], counted: int):
    """Changes are added until the step fits; those that save nothing or are no longer needed are left out."""
    options = [LORA, "train.tokens_per_microbatch=4000"]
    step = oversized(load_config(path, options), LITTLE)
    result = propose(step, counter(path, parts, *options), int(0.9 * 24 * GIB))
    assert list(result.overrides) == overrides
    assert result.memory is not None
    assert (result.memory.total, result.fits) == (counted * GIB, True)
    load_config(path, [LORA, *overrides])


def test_each_change_is_needed(path: Path):
    """A change that a later one makes needless is left out, whatever it saved before that: with adapters the moments
    of all weights are gone, in however few bits."""

    def count(more: tuple[str, ...]) -> StepMemory:
        config = load_config(path, [MICROBATCH + "900", *more])
        trained = 15 if config.lora is None else 0
        moments = 30 if config.lora is None else 1
        optimizer = moments // (4 if config.train.optimizer == "adamw_8bit" else 1)
        weights, adapters, gradients, moments = (size * GIB for size in (15, 1, trained, optimizer))
        return StepMemory(weights, adapters, gradients, moments, 0, 0, 0, 0, 2, 2, "tree")

    step = oversized(load_config(path, [MICROBATCH + "900"]), CHECKPOINTED, ONE)
    result = propose(step, count, int(0.9 * 24 * GIB))
    assert (result.overrides, result.fits) == (("lora={}",), True)


def test_what_it_says(path: Path):
    """If nothing fits, the message says so, and names the changes with which a run cannot be resumed."""
    options = [LORA, "train.tokens_per_microbatch=900"]
    step = oversized(load_config(path, options), replace(CHECKPOINTED, adapters=GIB // 4, streamed=2), ONE)
    assert out_of_memory(7, step, counter(path, {"weights": 400, "activations": 10}, *options)) == (
        "out of memory after step 7: the run holds weights 1.00 GiB, adapters 256.0 MiB, gradients 0.0 MiB, optimizer "
        "0.0 MiB, head workspace 128.0 MiB of 24.00 GiB, besides the activations of a micro-batch of 900 tokens. What "
        "takes least, and will hardly fit either (a step is counted at 102.00 GiB): model.quantization=nf4; a run "
        "cannot be resumed with model.quantization=nf4, so start a new one",
        [],
    )


def test_a_count_that_fits_was_wrong(path: Path):
    """A step that ran out of memory does not fit, even if the count says so: a smaller one is proposed."""
    options = [LORA, "train.tokens_per_microbatch=4000"]
    step = oversized(load_config(path, options), LITTLE, capacity=800 * GIB)
    assert out_of_memory(1, step, counter(path, {"weights": 1, "activations": 9}, *options))[1] == [MICROBATCH + "2000"]


@pytest.mark.parametrize("error", [RuntimeError("a value was asked for"), UserError("its code fails")])
def test_what_cannot_be_counted(path: Path, error: Exception):
    def fails(overrides: tuple[str, ...]) -> StepMemory:
        raise error

    step = oversized(load_config(path, [LORA, "train.tokens_per_microbatch=4000"]), LITTLE)
    for count in (fails, None):
        assert out_of_memory(1, step, count)[1] == [MICROBATCH + "2000"]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_change_lowers_the_count(tmp_path: Path, device: torch.device):
    """Counted on fake tensors, a real model's step is smaller with each of these changes."""
    config = config_for(save_model("llama", tmp_path), "lora={rank=2}", "train.tokens_per_microbatch=400")
    loaded = load_model(config, CPU)
    objective = Objective(loaded.policy, None, config.loss, loaded.layout, config.tokens_per_microbatch, 0, CPU)
    optimizer = make_optimizer(loaded.policy, config)
    step = replace(oversized_step(config, loaded, optimizer, objective, examples(6, seed=3)), device=device)
    count = step_counter(step, loaded)
    assert count is not None
    changes = (MICROBATCH + "40", "train.checkpointing=true", "tokens.max_length=8")
    assert all(count((change,)).total < count(()).total for change in changes)
    assert step_counter(replace(step, sharded=True), loaded) is None


def test_a_new_change_is_written_in_one_place(path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change that is added to the list is proposed by `fastpref estimate` and by a run that is out of memory."""
    monkeypatch.setattr(fit, "CHANGES", [Change("lora.target", lambda step: [["q_proj"]], ("optimizer", "gradients"))])
    estimator = Estimator(lambda more: load_config(path, ["lora={rank=64}", *more]), CUDA)
    assert proposal(estimator, Card.named(0.001)).overrides == ("lora.target=['q_proj']",)
    step = oversized(estimator.config, estimator.take())
    message, _ = out_of_memory(1, step, lambda overrides: estimator.take(*overrides))
    assert "lora.target=['q_proj']" in message
    assert "lora.target=['q_proj']" in out_of_memory(1, step, None)[0]
