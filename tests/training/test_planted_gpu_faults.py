"""Mistakes that only a card would show, planted in a training step: the trace on fake CUDA tensors names each one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastpref.errors import UserError
from fastpref.kernels import linear_logprob_triton
from fastpref.kernels.tiles import interpreted
from fastpref.losses import token_loss
from fastpref.training import start
from tests.support.trace import traced
from tests.support.traced_runs import traced_run

KERNEL: Any = linear_logprob_triton._scale_kernel
HERE = "tests/training/test_planted_gpu_faults.py"
Planted = Callable[[Tensor], Any]  # is called with the log-probabilities of the policy


def number(logp: Tensor) -> None:
    logp.sum().item()


def truth(logp: Tensor) -> bool:
    return bool((logp < 0).all())


def numbers(logp: Tensor) -> None:
    logp.tolist()


def host_copy(logp: Tensor) -> None:
    logp.cpu()


def device_copy(logp: Tensor) -> None:
    torch.tensor([0.0, 1.0], device=logp.device)


def waiting_copy(logp: Tensor) -> None:
    torch.zeros(3).to(logp.device)


def mask(logp: Tensor) -> Any:
    return logp[logp < 0]


def count(logp: Tensor) -> None:
    (logp < 0).nonzero()


def distinct(logp: Tensor) -> None:
    torch.equal(logp, logp)


def synchronised(logp: Tensor) -> None:
    torch.cuda.synchronize()


def host_index(logp: Tensor) -> Any:
    return logp[torch.arange(3)]


def unnumbered_device(logp: Tensor) -> None:
    if logp.device != torch.device("cuda"):  # also if it is "cuda:0"
        logp.cpu()


def float32_product(logp: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return torch.outer(logp, logp) @ logp[:, None]


def float32_attention(logp: Tensor) -> None:
    states = logp.float()[None, None, :, None].expand(1, 1, -1, 8)
    with torch.autocast("cuda", enabled=False):
        torch.nn.functional.scaled_dot_product_attention(states, states, states)


FAULTS = [
    (number, "wait"), (truth, "wait"), (numbers, "wait"), (host_copy, "wait"), (device_copy, "wait"),
    (waiting_copy, "wait"), (mask, "wait"), (count, "wait"), (distinct, "wait"), (synchronised, "wait"),
    (host_index, "device"), (unnumbered_device, "wait"), (float32_product, "float32"), (float32_attention, "float32"),
]  # fmt: skip


@contextmanager
def planted(fault: Planted) -> Iterator[None]:
    """Let the loss of pairs call a function inside the block."""
    fused = token_loss.fused_loss

    def called(logp: Tensor, *args: Any) -> Any:
        fault(logp)
        return fused(logp, *args)

    with mock.patch.object(token_loss, "fused_loss", called):
        yield


def test_every_planted_fault_is_named(tmp_path: Path):
    """Each mistake in the loss is found in the step and in the evaluation, at its place, once for each micro-batch."""

    def everything(logp: Tensor) -> None:
        for fault, _ in FAULTS:
            fault(logp)

    with planted(everything):
        run = traced_run(tmp_path, "loss.type=orpo", "lora={rank=4}")
    for part in (run.step, run.evaluation):
        found, microbatches = part.counted(), part.launched("_pair_kernel")
        assert microbatches > 0
        for fault, kind in FAULTS:
            assert found[kind, f"{HERE}:{fault.__qualname__}"] == microbatches, fault.__name__


def test_nothing_is_found_elsewhere(tmp_path: Path):
    """What waits for nothing is no event: copies that do not block, masks by `where`, and half-precision products."""

    def harmless(logp: Tensor) -> list[Tensor]:
        return [
            torch.zeros(3).to(logp.device, non_blocking=True),
            torch.where(logp < 0, logp, 0.0).sum(),
            logp[torch.arange(3, device=logp.device)] + torch.tensor(1.0),
            torch.outer(logp, logp).bfloat16() @ logp[:, None].bfloat16(),
            logp.double().to(torch.device("cuda")),
        ]

    with planted(harmless):
        run = traced_run(tmp_path, "loss.type=orpo", "lora={rank=4}")
    assert not [event for event in run.step.events if event.place.startswith(HERE)]


def test_tensors_of_two_devices_do_not_meet(tmp_path: Path):
    """A sum with a tensor of the host fails, as on a card."""
    with (
        planted(lambda logp: logp + torch.zeros(len(logp))),
        pytest.raises(UserError, match=r"cuda:0 and cpu|cuda:0, cpu"),
    ):
        traced_run(tmp_path, "loss.type=orpo", "lora={rank=4}")


def test_a_trace_leaves_the_kernels_as_they_were():
    """Kernels run in the interpreter after a trace if they did before: Triton's knobs are also in the environment."""
    before = interpreted()
    with traced():
        assert not interpreted()
    assert interpreted() == before


def test_a_weight_trained_in_half_precision_is_named(tmp_path: Path):
    def halved(policy: torch.nn.Module, config: Any, **options: Any) -> torch.optim.Optimizer:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return make(policy, config, **options)

    make = start.make_optimizer
    with mock.patch.object(start, "make_optimizer", halved):
        run = traced_run(tmp_path, "loss.type=orpo", "lora={rank=4}")
    assert run.step.counted()["half", "accelerate/optimizer.py:AcceleratedOptimizer.step"] == 1


LAUNCHES: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("one argument too few", {"out": ...}, TypeError),
    ("a name that the kernel does not have", {"BLOCK": 4}, TypeError),
    ("a constant that is a tensor", {"BLOCK_H": torch.zeros(())}, AssertionError),
    ("a number past 32 bits", {"width": 2**40}, AssertionError),
    ("a list", {"stride_out": [3]}, AssertionError),
]


@pytest.mark.parametrize(("fault", "changes", "error"), LAUNCHES, ids=[case[0] for case in LAUNCHES])
def test_a_wrong_launch_fails(fault: str, changes: dict[str, Any], error: type[Exception]):
    names = list(KERNEL.arg_names)
    with traced() as trace:
        rows = torch.empty(4, 8, device="cuda")
        given = dict(zip(names, [rows, rows[:, 0], rows, rows, rows, 8, 8, 8])) | {"BLOCK_H": 4}
        KERNEL[(4, 1)](**given, num_warps=4)
        assert [launch.kernel for launch in trace.launches] == ["_scale_kernel"]
        changed = {name: value for name, value in (given | changes).items() if value is not ...}
        if ... in changes.values():
            changed.pop(names[4])
        with pytest.raises(error):
            KERNEL[(4, 1)](**changed)


@pytest.mark.parametrize("grid", [(0, 1), (4, 65536), (4.0, 1)])
def test_a_grid_that_a_card_refuses_fails(grid: tuple[Any, ...]):
    with traced():
        rows = torch.empty(4, 8, device="cuda")
        with pytest.raises(AssertionError):
            KERNEL[grid](rows, rows[:, 0], rows, rows, rows, 8, 8, 8, BLOCK_H=4)


def test_a_tensor_of_the_host_in_a_launch_is_named():
    with traced() as trace:
        rows = torch.empty(4, 8, device="cuda")
        KERNEL[(4, 1)](rows, torch.empty(4), rows, rows, rows, 8, 8, 8, BLOCK_H=4)
        assert [event.kind for event in trace.events] == ["device"]
