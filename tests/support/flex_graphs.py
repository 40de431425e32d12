"""FlexAttention compiled on a CPU, to its graphs and no further, with the gradients that torch has for GPUs only."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from fastpref.model import flex_attention
from fastpref.model.flex_kernel import compiled


class Graphs:
    """The graphs that were compiled, which run as torch's definition of FlexAttention."""

    def __init__(self) -> None:
        self._backend = CompileCounterWithBackend("eager")
        self.attend = compiled(self._backend)

    def __len__(self) -> int:
        return len(self._backend.graphs)

    @property
    def fused(self) -> int:
        """The number of graphs that hold FlexAttention as one operator, for which Inductor has a kernel."""
        nodes = (node for graph in self._backend.graphs for node in graph.graph.nodes if node.op == "call_function")
        return sum(node.target is torch.ops.higher_order.flex_attention for node in nodes)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Let FlexAttention be compiled on a CPU as on a GPU, and yield its graphs."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    made = Graphs()

    def kernel(device: str) -> Any:
        return made.attend

    monkeypatch.setattr(flex_attention, "_flex", kernel)
    yield made
    torch._dynamo.reset()
