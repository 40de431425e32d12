"""Optimizers: the state of every kind is restored where it was."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from torch import Tensor, nn

from fastpref.run.state import read_state, write_state
from fastpref.step.optimizer import load_state

KINDS = {"paged_adamw": (AdamW, PagedAdamW), "paged_adamw_8bit": (AdamW8bit, PagedAdamW8bit)}
SHAPES = ((400, 256), (64, 65), (7,))  # of at least 1e5 entries, which are paged, of 8 bits, and of neither


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer: Any, weights: list[nn.Parameter], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def paging(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the optimizer make buffers as on a GPU, with the mark of bitsandbytes. Return those made."""
    made = []

    def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.full(parameter.shape, 7, dtype=dtype)
        tensor.is_paged = parameter.numel() >= 1e5  # pyright: ignore[reportAttributeAccessIssue]
        made.append(tensor)
        return tensor

    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    monkeypatch.setattr(optimizer, "prefetch_state", lambda parameter: None)
    return made


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_paged_moments_are_paged_again(kind: str, prepared: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """After loading, every moment lies in a buffer of the optimizer's own making, with its numbers, and later steps
    are those of an optimizer that was not stopped."""
    plain, paged = KINDS[kind]
    whole, stopped = parameters(), parameters()
    first, other = (plain(weights, lr=1e-2) for weights in (whole, stopped))
    steps(first, whole, 3, seed=1)
    steps(other, stopped, 3, seed=1)
    write_state(tmp_path, {"optimizer": other.state_dict()})
    resumed = paged(stopped, lr=1e-2)
    given = Accelerator().prepare_optimizer(resumed) if prepared else resumed
    made = paging(resumed, monkeypatch)
    moves: list[bool] = []
    load = resumed.load_state_dict
    monkeypatch.setattr(
        resumed, "load_state_dict", lambda s, move_to_device=True: (moves.append(move_to_device), load(s))[1]
    )
    load_state(given, read_state(tmp_path)["optimizer"])
    assert moves == [False]  # nothing goes to the GPU as a whole
    states = [resumed.state[weight] for weight in stopped]
    assert [state[name].is_paged for state in states for name in ("state1", "state2")] == [True] * 2 + [False] * 4
    assert {id(state[name]) for state in states for name in ("state1", "state2")} == {id(tensor) for tensor in made}
    for weight, state in zip(whole, states):
        for name, value in first.state[weight].items():
            assert torch.equal(state[name], value) if isinstance(value, Tensor) else state[name] == value
    tables = [state["qmap1"] for state in states if "qmap1" in state]
    assert all(table is tables[0] for table in tables)
    steps(first, whole, 2, seed=2)
    steps(resumed, stopped, 2, seed=2)
    assert all(map(torch.equal, whole, stopped))
