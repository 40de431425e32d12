"""What is advised when there is no memory: as little as it takes by the count, the cheapest first."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config, load_config
from fastpref.memory.advice import advice, step_counter
from fastpref.model.load import load_model
from fastpref.training.faults import Held
from tests.support.runs import LORA, write_config
from tests.support.tiny import config_for, examples, save_model

GIB = 1 << 30
HELD = Held(8 * GIB, 8 * GIB, 16 * GIB, 8 * GIB, 128 << 20, 4000, 900, 24 * GIB, False)
LOW = replace(HELD, weights=GIB, gradients=1, optimizer=2, reference=0)
ONE = replace(LOW, tokens=900)  # one example at once
TWICE = replace(ONE, checkpointing=True)
MICROBATCH = "train.tokens_per_microbatch="

# By a rule of thumb, where nothing can be counted.
FIRST: dict[str, tuple[list[str], Held, str]] = {
    "full fine-tuning that can never fit": ([], HELD, "lora={}"),
    "many examples at once": ([], LOW, MICROBATCH + "2000"),
    "two examples at once": ([], replace(LOW, tokens=1000), MICROBATCH + "900"),
    "one example at once": ([], ONE, "train.checkpointing=true"),
    "one example, twice computed": ([], TWICE, "train.offload_activations=true"),
    "and on a CPU": ([], replace(TWICE, on_cpu=True), "train.optimizer=adamw_8bit"),
    "and moved": ([LORA, "train.offload_activations=true"], TWICE, "train.optimizer=adamw_8bit"),
    "paged": (
        [LORA, "train.offload_activations=true", "train.optimizer=paged_adamw"],
        TWICE,
        "train.optimizer=paged_adamw_8bit",
    ),
    "in 8 bits": ([LORA, "train.optimizer=adamw_8bit"], replace(TWICE, on_cpu=True), "model.quantization=nf4"),
    "in 8 bits without adapters": (["train.optimizer=adamw_8bit"], replace(TWICE, on_cpu=True), "lora={}"),
    "sharded": ([LORA], replace(TWICE, on_cpu=True, sharded=True), "tokens.max_length=48"),
    "in 4 bits": (
        [LORA, "train.optimizer=adamw_8bit", "model.quantization=nf4"],
        replace(TWICE, on_cpu=True),
        "tokens.max_length=48",
    ),
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


@pytest.mark.parametrize(("overrides", "held", "said"), FIRST.values(), ids=FIRST)
def test_what_comes_first(path: Path, overrides: list[str], held: Held, said: str):
    """The advice is an override that the config takes."""
    config = load_config(path, [*overrides, "train.tokens_per_microbatch=4000"])
    assert advice(config, held, None).overrides == (said,)
    load_config(path, [*overrides, said])


def size(config: Config, parts: Mapping[str, int]) -> int:
    """Bytes of a step that would be the sum of its parts, in GiB, each for as long as a config has it."""
    optimizer = parts.get("optimizer", 0) // (4 if config.train.optimizer == "adamw_8bit" else 1)
    weights = parts["weights"] // (4 if config.model.quantization == "nf4" else 1)
    activations = parts["activations"] * (config.train.tokens_per_microbatch or 0) // 4000
    if config.train.checkpointing is True:
        activations //= 10
    if config.train.offload_activations:
        activations //= 2
    return (weights + optimizer + activations) * GIB


COUNTED = {
    "activations": ({"weights": 2, "activations": 30}, [MICROBATCH + "2000"], 17),
    "more of them": ({"weights": 2, "activations": 70}, [MICROBATCH + "1000"], 19),
    "layers too": ({"weights": 2, "activations": 400}, [MICROBATCH + "900", "train.checkpointing=true"], 11),
    "the optimizer": ({"weights": 10, "activations": 0, "optimizer": 20}, ["train.optimizer=adamw_8bit"], 15),
    "weights": ({"weights": 24, "activations": 0}, ["model.quantization=nf4"], 6),
}


@pytest.mark.parametrize(("parts", "overrides", "counted"), COUNTED.values(), ids=COUNTED)
def test_no_more_than_it_takes(path: Path, parts: dict[str, int], overrides: list[str], counted: int):
    """Changes are added until a step fits; those that save nothing are left out."""
    config = load_config(path, [LORA, "train.tokens_per_microbatch=4000"])
    found = advice(config, LOW, lambda changed: size(changed, parts))
    assert list(found.overrides) == overrides
    assert (found.size, found.fits) == (counted * GIB, True)
    load_config(path, [LORA, *overrides])


def test_what_it_says(path: Path):
    """Where nothing fits it says so, and which of the changes a run cannot be resumed with."""
    config = load_config(path, [LORA, "train.tokens_per_microbatch=900"])
    parts = {"weights": 400, "activations": 10}
    assert str(advice(config, TWICE, lambda changed: size(changed, parts))) == (
        "What takes least, and will hardly fit either (a step is counted at 102.00 GiB): model.quantization=nf4; a run "
        "is not resumed with model.quantization=nf4, so start a new one"
    )


def test_a_count_that_fits_was_wrong(path: Path):
    """What did not fit does not fit, whatever the device's size: less than that is looked for."""
    config = load_config(path, [LORA, "train.tokens_per_microbatch=4000"])
    found = advice(
        config, replace(LOW, device=800 * GIB), lambda changed: size(changed, {"weights": 1, "activations": 9})
    )
    assert found.overrides == (MICROBATCH + "2000",)


def test_what_cannot_be_counted(path: Path):
    def fails(config: Config) -> int:
        raise RuntimeError("a value was asked for")

    config = load_config(path, [LORA, "train.tokens_per_microbatch=4000"])
    assert advice(config, LOW, fails).overrides == (MICROBATCH + "2000",)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_change_lowers_the_count(tmp_path: Path, device: str):
    """Counted on fake tensors, a real model's step is smaller by each change that could help it."""
    folder = save_model("llama", tmp_path)
    rows = examples(6, seed=3)
    changes: list[dict[str, Any]] = [
        {},
        {"train": {"tokens_per_microbatch": 40}},
        {"train": {"checkpointing": True}},
        {"tokens": {"max_length": 8}},
    ]
    options = config_for(folder, "lora={rank=2}", "train.tokens_per_microbatch=400")
    count = step_counter(load_model(options, torch.device("cpu")), rows, torch.device(device), sharded=False)
    assert count is not None
    sizes = []
    for change in changes:
        changed = options
        for table, values in change.items():
            changed = changed.model_copy(update={table: getattr(changed, table).model_copy(update=values)})
        sizes.append(count(changed))
    assert all(small < sizes[0] for small in sizes[1:])
