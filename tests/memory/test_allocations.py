"""What `PeakStorage` counts. Sizes are in float32 elements of four bytes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref.memory.allocations import PeakStorage

X = torch.arange(1.0, 101.0)  # exists before any context


def in_place() -> Tensor:
    return torch.empty(100).fill_(1).mul_(2)


def overlapping_views() -> list[Tensor]:
    x = torch.empty(100)
    return [x, x[10:], x.view(10, 10).t(), x.detach()]


def resized_out() -> Tensor:
    return torch.add(X, 1, out=torch.empty(0))


def shrinking() -> Tensor:
    return torch.empty(100).sum()


def chain() -> Tensor:
    return ((X + 1) * 2).exp()


@pytest.mark.parametrize(
    ("create", "current", "peak"),
    [
        (lambda: torch.empty(100), 100, 100),
        (lambda: torch.empty(100, dtype=torch.float64), 200, 200),
        (lambda: torch.tensor([1.0, 2.0, 3.0]), 3, 3),
        (lambda: [torch.empty(100), torch.empty(50)], 150, 150),
        (lambda: X, 0, 0),
        (lambda: X[3:].view(97, 1), 0, 0),
        (lambda: X.add_(0), 0, 0),
        (lambda: X + 1, 100, 100),
        (lambda: X.clone()[:1], 100, 100),
        (in_place, 100, 100),
        (overlapping_views, 100, 100),
        (resized_out, 100, 100),
        (shrinking, 1, 101),
        (chain, 100, 200),
    ],
)
def test_counts_new_storages_once(create: Callable[[], object], current: int, peak: int) -> None:
    """A new storage counts once by its size, whatever views it has; storages from before the context never count."""
    with PeakStorage() as memory:
        kept = create()
        assert memory.current == 4 * current
        del kept
        assert memory.current == 0
    assert memory.peak == 4 * peak


def test_a_view_keeps_its_storage_counted() -> None:
    """A storage counts until its last tensor is freed."""
    with PeakStorage() as memory:
        whole = torch.empty(100)
        part = whole[:1]
        del whole
        assert memory.current == 400
        del part
        assert memory.current == 0


def test_a_tensor_kept_by_the_graph_counts() -> None:
    """A tensor that only autograd holds counts until the backward pass frees it."""
    x = X.clone().requires_grad_()
    with PeakStorage() as memory:
        loss = x.exp().sum()  # autograd keeps the unnamed result of exp
        assert memory.current == 400 + 4
        loss.backward()
        assert memory.current == 400 + 4  # the gradient exists, and the result of exp is freed
        assert memory.peak == 2 * 400 + 2 * 4  # the result of exp and the gradient; the loss and its gradient
        x.grad = None
    del loss
    assert memory.current == 0


def test_freeing_after_the_context_counts() -> None:
    """`current` falls when a tensor that outlives the context is freed; the peak stays."""
    with PeakStorage() as memory:
        x = torch.empty(100)
    torch.empty(1000)
    assert (memory.current, memory.peak) == (400, 400)
    del x
    assert (memory.current, memory.peak) == (0, 400)


def test_reused_addresses_are_counted_anew() -> None:
    """Many short-lived tensors, which share addresses, never add up."""
    with PeakStorage() as memory:
        for size in range(1, 2000):
            torch.empty(size % 37 + 1)
    assert (memory.current, memory.peak) == (0, 4 * 37)


def test_contexts_nest() -> None:
    """An inner context counts what is made inside it; the outer one counts everything."""
    with PeakStorage() as outer:
        first = torch.empty(100)
        with PeakStorage() as inner:
            second = torch.empty(50)
        assert (inner.current, outer.current) == (200, 600)
        del first, second
    assert (inner.current, outer.current) == (0, 0)
