"""What looks at all numbers of a model takes little memory, and finds every number that is none."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from fastpref.memory.allocations import PeakStorage
from fastpref.model.precision import in_float32, is_finite
from fastpref.training.faults import not_finite
from tests.support.tiny import model_config

ROWS, WIDTH = 3001, 1024  # 12 MiB in float32
PLACES = {"first": (0, 0), "inside": (1500, 77), "last": (ROWS - 1, WIDTH - 1)}


@pytest.fixture(scope="module")
def large() -> Tensor:
    return torch.ones(ROWS, WIDTH)


@pytest.mark.parametrize("form", ["whole", "transposed", "cut"])
@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_any_number_is_found(large: Tensor, number: float, place: str | None, form: str):
    """One NaN or infinity is found wherever it is, and none where there is none."""
    tensor = large.clone()
    if place is not None:
        tensor[PLACES[place]] = number
    viewed = {"whole": tensor, "transposed": tensor.t(), "cut": tensor[:, 1:]}[form]
    assert is_finite(viewed) == (place is None or (form == "cut" and place == "first"))


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.0), torch.ones(0), torch.ones(0, 4), torch.ones(3, dtype=torch.uint8), torch.ones(2, 3).bfloat16()],
)
def test_any_shape_and_dtype_is_taken(tensor: Tensor):
    assert is_finite(tensor)
    assert not tensor.is_floating_point() or tensor.dim() or not is_finite(tensor * math.nan)


class Policy(nn.Module):
    """A policy of one large frozen weight and one small trained one."""

    def __init__(self, frozen: Tensor):
        super().__init__()
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.trained = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("loss", [math.nan, 0.5])
@pytest.mark.parametrize("spoilt", ["frozen", "trained", "neither"])
def test_a_fault_is_looked_for_with_little_memory(large: Tensor, spoilt: str, loss: float, monkeypatch: Any):
    """A fault's message takes no temporary tensor of a frozen weight's size. Trained weights are looked at first, and
    frozen ones only if the loss is not finite: float16 overflows until its loss scale is found."""
    policy = Policy(large.clone())
    if spoilt != "neither":
        getattr(policy, spoilt).data.view(-1)[1] = math.nan
    evaluate = lambda *_: SimpleNamespace(result=lambda: {"loss": 0.5})  # noqa: E731
    looked: list[int] = []
    monkeypatch.setattr("fastpref.training.faults.is_finite", lambda t: (looked.append(t.numel()), is_finite(t))[1])
    with PeakStorage() as memory:
        message = not_finite(3, loss, math.inf, [], SimpleNamespace(policy=policy, evaluate=evaluate))  # pyright: ignore[reportArgumentType]
    assert memory.largest <= large.nbytes / 2
    assert memory.peak <= large.nbytes
    seen = spoilt == "trained" or (spoilt == "frozen" and math.isnan(loss))
    assert (f"the weights themselves are not finite: {spoilt}" in message) == seen
    assert looked == ([2] if spoilt == "trained" or loss == 0.5 else [2, large.numel()])


@pytest.mark.parametrize("able", [True, False])
def test_a_model_that_cannot_compute_in_float32_keeps_its_dtype(able: bool):
    """A device may lack a product in float32: then comparisons are in the model's own dtype, and it stays as it was."""
    architecture: Any = model_config("llama")
    model: Any = LlamaForCausalLM(architecture).bfloat16().eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def only_half(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dtype == torch.float32:
            raise RuntimeError("Expected inputs of BF16 type")

    if not able:
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(only_half)
    with in_float32(model) as exact:
        assert exact is able
        assert model.dtype == (torch.float32 if able else torch.bfloat16)
        model(input_ids=torch.tensor([[1, 2]]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.dtype == torch.bfloat16
