"""The hooks of streamed layers: every layer has its numbers in its backward pass, whatever its output is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpref.model.streaming.stream import WeightStream

CPU = torch.device("cpu")
WIDTH, LAYERS = 8, 5


class Layer(nn.Module):
    """A residual layer of frozen weights with a trained vector, which makes its output by `finish`."""

    def __init__(self, finish: Callable[[Tensor], Any]):
        super().__init__()
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(2))
        self.scale, self.finish = nn.Parameter(torch.randn(WIDTH)), finish

    def forward(self, hidden: Any) -> Any:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.finish(hidden + self.down(torch.tanh(self.up(hidden)) * self.scale))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda hidden: hidden,
    "a tuple": lambda hidden: (hidden, hidden.sum().detach()),
    "a view in a tuple": lambda hidden: (hidden.view(2, 3, WIDTH), 7),
    "a view": lambda hidden: hidden.view(-1, WIDTH).view(2, 3, WIDTH),
    "a slice": lambda hidden: torch.cat([hidden, hidden])[:2],
}


def in_order(layers: list[nn.Module], hidden: Any) -> Any:
    for layer in layers:
        hidden = layer(hidden)
    return hidden[0] if isinstance(hidden, tuple) else hidden


def changed_in_place(layers: list[nn.Module], hidden: Any) -> Any:
    for layer in layers:
        hidden = in_order([layer], hidden).mul_(1.25)
    return hidden


def layers_twice(layers: list[nn.Module], hidden: Any) -> Any:
    return in_order([*layers[:3], *layers, layers[1]], hidden)


def layers_left_out(layers: list[nn.Module], hidden: Any) -> Any:
    return in_order(layers[::2], hidden)


def losses_of_the_middle(layers: list[nn.Module], hidden: Any) -> Any:
    """As a router's loss: a gradient comes to each layer's output from the loss, too."""
    total = torch.zeros(())
    for layer in layers:
        hidden = layer(hidden)
        total = total + hidden.pow(2).sum()
    return hidden + total


def recomputed(layers: list[nn.Module], hidden: Any) -> Any:
    for layer in layers:
        hidden = checkpoint(layer, hidden, use_reentrant=False)
    return in_order([nn.Identity()], hidden)


def recomputed_in_pairs(layers: list[nn.Module], hidden: Any) -> Any:
    """Two layers in one checkpoint: the recomputation runs forwards through both."""
    for first in range(0, len(layers), 2):
        hidden = checkpoint(in_order, layers[first : first + 2], hidden, use_reentrant=False)
    return hidden


PASSES = [in_order, layers_twice, layers_left_out, losses_of_the_middle, recomputed, recomputed_in_pairs]
CASES = [(passes, output) for passes in PASSES for output in OUTPUTS if "tuple" not in output or passes in PASSES[:3]]


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize(("passes", "output"), [*CASES, *((changed_in_place, output) for output in OUTPUTS)])
def test_a_backward_pass_has_the_right_numbers(passes: Callable[..., Tensor], output: str, slots: int) -> None:
    """Outputs and gradients of streamed layers have the bits of resident ones, twice."""
    found: list[list[Tensor | None]] = []
    for streamed in (False, True):
        torch.manual_seed(0)
        layers: list[nn.Module] = [Layer(OUTPUTS[output]) for _ in range(LAYERS)]
        hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
        if streamed:
            WeightStream(layers, CPU, slots)
        for _ in range(2):
            result = passes(layers, hidden)
            result.sum().backward()
        scales = [p.grad for layer in layers for p in layer.parameters() if p.requires_grad]
        found.append([result.detach(), hidden.grad, *scales])
    for resident, ours in zip(*found, strict=True):
        assert (resident is None) == (ours is None)
        assert resident is None or ours is None or torch.equal(resident, ours)
