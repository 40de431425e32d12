"""What every launch of a kernel has in common, seen on fake CUDA tensors: device, options, specialisation, no waits."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastpref.kernels import linear_logprob_launch as launch
from fastpref.kernels import linear_logprob_op as op
from fastpref.kernels.preference_loss_launch import pair_loss, row_loss
from fastpref.kernels.preference_loss_spec import LossSpec
from fastpref.memory.allocations import PeakStorage
from fastpref.ops import OUTPUTS
from tests.support.fake_gpu import DEVICE, FakeGpu, fake_gpu
from tests.support.problems import MODES

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="older fake tensors have no products with an out_dtype"
)
MIB = 2**20
HIDDEN, VOCABULARY = 64, 40_000  # five tiles of at least 8,192 columns in the workspace below
# N as it changes from batch to batch, around one and several blocks of rows.
LENGTHS = (1, 16, 17, 1000, 1001, 1002, 1003, 2304, 4999)
WALKS: dict[str, Any] = {
    "lean": {},
    "outputs": {"outputs": ",".join(OUTPUTS)},
    "softcap": {"softcap": 30.0},
    "bias": {"bias": True},
    "positions": {"positions": True},
}


def walk(
    n: int, mode: str, *, bias: bool = False, positions: bool = False, softcap: float | None = None, outputs: str = "",
    shape: tuple[int, int] = (VOCABULARY, HIDDEN), workspace: int = 20,
) -> int:  # fmt: skip
    """Call the operators of `linear_logprob` and of its backward pass for n rows of a larger batch.

    Autograd itself needs a torch with CUDA. Return the bytes that were allocated at once, apart from the inputs.
    """
    hidden, weight = (torch.empty(size, shape[1], dtype=torch.bfloat16, device=DEVICE) for size in (n, shape[0]))
    index = torch.zeros(2 * n, dtype=torch.int64, device=DEVICE)
    addend = torch.empty(shape[0], dtype=torch.bfloat16, device=DEVICE) if bias else None
    # Callers pass slices, whose addresses are aligned to an element and no more.
    targets = index[n:]
    place = targets if positions else None
    inputs = (hidden, [weight], targets, addend, place)
    grads = torch.empty(n + 4, device=DEVICE)[n % 4 :][:n]
    logits, rest = ("dense", softcap, 1.0, 1.0), (workspace * MIB, "triton")
    with PeakStorage() as memory:
        results = op.OperatorOutput._make(op.linear_logprob(*inputs, *logits, outputs, *rest, mode == "frozen"))
        if mode == "frozen":
            op.scale(results.grad, grads, place, n, hidden.dtype, "triton")
        if mode == "trainable":
            wanted = (True, True, bias)
            op.recompute(grads, *inputs, results.statistics, *logits, *rest, *wanted)
    return memory.peak


def losses(n: int) -> None:
    """Call the preference losses for n tokens."""

    def floats(count: int) -> torch.Tensor:
        return torch.empty(count + 4, device=DEVICE)[n % 4 :][:count]

    starts, lengths = torch.zeros(2, 4 + n % 2, dtype=torch.int64, device=DEVICE)[:, -4:]
    spec = LossSpec(("sigmoid",), (1.0,), reference=True, supervised=1.0)
    numbers = tuple(spec.numbers())
    for extra in (None, floats(2)):
        pair_loss(
            floats(n), starts, lengths, floats(n), None, extra, extra,
            {"sigmoid": 1.0}, spec.flags(), numbers, examples=None, nll_tokens=3.0,
        )  # fmt: skip
        labels = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        row_loss(floats(n), starts, lengths, floats(n), labels, floats(3)[0], floats(3), numbers, examples=None)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", WALKS)
def test_a_walk_runs_on_its_tensors_device_and_never_waits(gpu: FakeGpu, case: str, mode: str) -> None:
    """Every launch is on the tensors' device, and no operation makes the host wait: it can run ahead of the GPU."""
    walk(300, mode, **WALKS[case])
    assert {call.device for call in gpu.launches} == {DEVICE}
    assert gpu.waits == []
    assert len(gpu.launches) >= 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [300, 8192, 32768])
def test_memory_of_a_real_head(gpu: FakeGpu, n: int, mode: str) -> None:
    """In addition to the workspace a step takes a few tensors of hidden's size: O, g, and the gradient of hidden.

    A trained head takes its own gradient, and a slice of it in float32.
    """
    gpu.records = False
    shape = vocabulary, width = 128256, 4096  # Llama-3-8B
    peak = walk(n, mode, shape=shape, workspace=128)
    hidden = 2 * n * width
    own = (2 * vocabulary + 4 * 8192) * width + hidden if mode == "trainable" else 0
    assert peak <= 128 * MIB + own + (3 * hidden if mode != "no_grad" else 0) + 256 * n + MIB


def test_losses_run_on_their_tensors_device(gpu: FakeGpu) -> None:
    """So do the kernels of the preference losses, whose numbers are copied to a GPU once a run."""
    losses(100)
    assert [call.device for call in gpu.launches] == [DEVICE] * 4


def test_a_kernel_is_compiled_once_for_all_lengths(gpu: FakeGpu) -> None:
    """Whatever the number of rows and where slices begin, Triton sees one signature of each kernel and its constants.

    Another one would compile the main loop again in the middle of a run, as a variant that the compile report lacks.
    """
    signatures = defaultdict(set)
    for n in LENGTHS:
        gpu.launches.clear()
        for settings in WALKS.values():
            for mode in MODES:
                walk(n, mode, **settings)
        losses(n)
        for call in gpu.launches:
            constants = str(sorted((name, str(value)) for name, value in call.options.items()))
            dtypes = tuple(value.dtype for value in call.arguments if isinstance(value, torch.Tensor))
            signatures[call.name, constants, dtypes].add(call.key())
    assert len({name for name, *_ in signatures}) == 7
    several = {what: keys for what, keys in signatures.items() if len(keys) > 1}
    assert several == {}


def test_rounding_does_not_depend_on_the_environment(gpu: FakeGpu) -> None:
    """Every launch says whether a·b + c may be one instruction, whose default Triton takes from the environment."""
    walk(300, "frozen")
    losses(100)
    assert {call.options["enable_fp_fusion"] for call in gpu.launches} == {True}


def test_the_host_does_not_wait_is_a_check_that_can_fail(gpu: FakeGpu) -> None:
    """A copy of numbers from the host is seen, and a number read back is an error of the fake tensors."""
    torch.tensor([1.0, 2.0], device=DEVICE)
    assert len(gpu.waits) == 1
    with mock.patch.object(launch._Statistics, "of_no_columns", _copied_from_the_host):
        walk(300, "frozen")
    assert len(gpu.waits) == 2
    with pytest.raises(DataDependentOutputException):
        torch.zeros(1, device=DEVICE).item()


def _copied_from_the_host(rows: int, device: torch.device) -> launch._Statistics:
    return launch._Statistics(*torch.tensor([0.0] * 8, device=device)[:, None].repeat(1, rows).unbind(0))
