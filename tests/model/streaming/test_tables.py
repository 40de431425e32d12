"""Tables in host memory: embeddings gathered there, and a head that is copied some rows at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpref.model.streaming import tables
from fastpref.model.streaming.tables import computes_on, keep_embeddings, keep_head

META = torch.device("meta")


def allocate(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@pytest.mark.parametrize("call", [lambda m, ids: m(ids), lambda m, ids: m(input=ids)], ids=["position", "keyword"])
def test_embeddings_are_gathered_on_the_host(call: Any) -> None:
    """Rows come from host memory, and are returned on the device; a gradient would go back the same way."""
    module, ids = nn.Embedding(11, 4), torch.tensor([[3, 0, 10]])
    expected = module(ids)
    keep_embeddings(module, torch.device("cpu"))
    assert torch.equal(call(module, ids), expected)
    keep_embeddings(module, META)
    assert call(module, ids).device == META
    assert module.weight.device.type == "cpu"


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_moves_to_locked_memory(tied: bool) -> None:
    """It stays the same parameter, so that tied embeddings move with it."""
    head, embeddings = nn.Linear(8, 29, bias=False), nn.Embedding(29, 8)
    if tied:
        embeddings.weight = head.weight
    before, buffers = head.weight.detach().clone(), []
    keep_head(head, META, lambda size: buffers.append(allocate(size)) or buffers[0])
    assert torch.equal(head.weight, before)
    assert head.weight.data_ptr() == buffers[0].data_ptr()
    assert (embeddings.weight.data_ptr() == buffers[0].data_ptr()) is tied
    assert computes_on(head) == META
    assert computes_on(nn.Linear(2, 2)) is None
    assert head(torch.empty(3, 5, 8, device=META)).shape == (3, 5, 29)


@pytest.mark.parametrize("rows", [7, 29, 100])
def test_a_product_some_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values and its gradient are those of the whole product, however many rows are on the device at once."""
    monkeypatch.setattr(tables, "_ROWS", rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8, dtype=torch.float64).requires_grad_(), torch.randn(29, 8, dtype=torch.float64)
    factors = torch.randn(3, 5, 29, dtype=torch.float64)
    found: Any = tables._HostProduct.apply(hidden, weight)
    expected = linear(hidden, weight)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((value * factors).sum(), hidden)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_backward_pass_keeps_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass frees what it has copied, and the backward pass copies it again."""
    monkeypatch.setattr(tables, "_ROWS", 10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tables._HostProduct.apply(torch.randn(2, 8).requires_grad_(), torch.randn(29, 8))
    assert kept == []
