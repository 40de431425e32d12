"""The search for the largest step that fits a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastpref.config import load_config
from fastpref.memory.estimate import Estimator
from fastpref.memory.largest import largest_microbatch, longest_rows, search
from fastpref.memory.process import Card, process
from tests.support.command_line import run_command, succeed
from tests.support.runs import write_config
from tests.support.tiny import model_config

LORA = "lora={rank=2}"

ROOMS: dict[str, tuple[Callable[[int], float], int, int, int | None]] = {
    "a line": (lambda n: 1000 - n, 64, 131072, 1000),
    "a line with a step": (lambda n: 5000 - n - 900 * (n > 3000), 64, 131072, 4100),
    "a curve": (lambda n: 10**8 - n * n, 64, 131072, 10_000),
    "nothing fits": (lambda n: -n, 64, 131072, None),
    "all fits": (lambda n: 1e9 - n, 64, 8192, 8192),
    "exactly": (lambda n: 8192 - n, 64, 8192, 8192),
    "no room to search": (lambda n: 1, 64, 32, None),
    "examples": (lambda n: 13.5 - n, 1, 16, 13),
    "one example": (lambda n: 1.5 - n, 1, 16, 1),
    "one of one": (lambda n: 1, 1, 1, 1),
}


@pytest.mark.parametrize(("room", "least", "most", "wanted"), ROOMS.values(), ids=ROOMS)
def test_the_search(room: Callable[[int], float], least: int, most: int, wanted: int | None):
    """The result has room, the next number has none, and few numbers are tried."""
    tried = []

    def counted(number: int) -> float:
        tried.append(number)
        return room(number)

    found = search(counted, least, most)
    assert len(tried) == len(set(tried)) <= 24
    if wanted is None:
        assert found is None
        return
    assert found is not None
    assert room(found) >= 0
    assert wanted - max(least, wanted // 64) <= found <= wanted


def test_the_largest_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The steps that are found fit, and those with the next length and one more example do not; the command prints
    their overrides, which the config accepts."""
    monkeypatch.chdir(tmp_path)
    shape = model_config("llama")
    shape.hidden_size, shape.intermediate_size, shape.max_position_embeddings = 128, 512, 2048
    shape.save_pretrained(tmp_path / "shape")
    path = write_config(tmp_path)
    options = [LORA, f"model.name={tmp_path}/shape", "tokens.max_length=256", "train.batch=64"]
    estimator = Estimator(lambda more: load_config(path, [*options, *more]), torch.device("cuda"))
    room = process(estimator.take_longest("tokens.max_length=700", "train.tokens_per_microbatch=1399")).high
    card = Card(1, room, room)
    rows, microbatch = longest_rows(estimator, card), largest_microbatch(estimator, card)
    assert rows is not None
    assert microbatch is not None
    assert 600 <= rows.amount <= 800  # gaps of the allocator, which grow by 20 MiB, are much of this step
    for largest in (rows, microbatch):
        assert process(largest.memory).high <= room
        assert process(estimator.take_longest(*largest.overrides)) == process(largest.memory)
    longer = f"tokens.max_length={rows.amount + 64}", f"train.tokens_per_microbatch={2 * (rows.amount + 64) - 1}"
    for more in (longer, (f"train.tokens_per_microbatch={(microbatch.amount + 1) * 511}",)):
        assert process(estimator.take_longest(*more)).high > room
    said = succeed("estimate", path, *options, "--largest", "--card", "80").out
    assert "The longest rows that fit 80 GB for certain: 2,048 tokens, which is what the model was made for" in said
    assert "The largest micro-batch of rows of 256 tokens: 64 pairs, which is train.batch" in said
    assert f"\n  train.tokens_per_microbatch={64 * 511}" in said
    refused = run_command("estimate", path, *options, "--largest", "--cpu")
    assert (refused.status, "leave out --cpu" in refused.err) == (2, True)
