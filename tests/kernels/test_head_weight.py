"""Heads that return their weight by rows: the rows are right, and every kind of head gives the same results."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref import linear_logprob
from fastpref.kernels import head_weight, linear_logprob_torch
from fastpref.kernels.head_weight import (
    CastWeight,
    DenseWeight,
    FourBitWeight,
    HeadWeight,
    OffloadedWeight,
    WidenedWeight,
    assemble,
)
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.ops import LoraWeight
from tests.support.problems import assert_same
from tests.support.queues import Recorder, beside_kernels, faults

N, H, V, R = 13, 64, 211, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


Params4bit: Any = bitsandbytes.nn.Params4bit


def four_bit(quant_type: str, nested: bool) -> FourBitWeight:
    weight = tensor(V, H, seed=1) / 4
    quantized = Params4bit(weight, requires_grad=False, quant_type=quant_type, compress_statistics=nested, blocksize=64)
    return FourBitWeight.of(quantized.to(DEVICE))


def offloaded() -> OffloadedWeight:
    return OffloadedWeight(tensor(V, H, seed=1).cpu() / 4, DEVICE)


HEADS: dict[str, Callable[[], HeadWeight]] = {
    "dense": lambda: DenseWeight(tensor(V, H, seed=1) / 4),
    "nf4": lambda: four_bit("nf4", nested=False),
    "nf4 with nested scales": lambda: four_bit("nf4", nested=True),
    "fp4": lambda: four_bit("fp4", nested=False),
    "host": offloaded,
    "cast": lambda: HEADS["dense"]().read_as(torch.bfloat16),
    "cast nf4": lambda: CastWeight(four_bit("nf4", nested=True), torch.float16),
    "cast host": lambda: offloaded().read_as(torch.bfloat16),
    "widened": lambda: WidenedWeight(DenseWeight(tensor(V, H, seed=1) / 4), tensor(V, R, seed=2)),
    "widened nf4": lambda: WidenedWeight(four_bit("nf4", nested=True), tensor(V, R, seed=2)),
    "widened host": lambda: WidenedWeight(offloaded(), tensor(V, R, seed=2)),
    "cast widened host": lambda: HEADS["widened host"]().read_as(torch.bfloat16),
}


@pytest.mark.parametrize("head", HEADS)
def test_slices_and_rows_are_those_of_the_whole(head: str) -> None:
    """However the vocabulary is cut, the slices join to the whole weight, and gathered rows are its rows."""
    weight = HEADS[head]()
    whole = weight.rows(0, V)
    assert tuple(whole.shape) == weight.shape
    assert whole.dtype == weight.dtype
    assert whole.device.type == torch.device(DEVICE).type
    for step in (1, 7, 64, V):
        parts = [weight.rows(a, min(a + step, V)).clone() for a in range(0, V, step)]
        assert torch.equal(torch.cat(parts), whole)
    index = torch.tensor([0, V - 1, 5, 5, 100], device=DEVICE)
    assert torch.equal(weight.gather(index), whole[index])


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_its_tensors_and_its_kind(head: str) -> None:
    """`assemble` makes the same head from its kind and its tensors."""
    weight = HEADS[head]()
    again = assemble(weight.kind, weight.tensors)
    for name in ("shape", "dtype", "kind", "copies"):
        assert getattr(again, name) == getattr(weight, name), name
    assert torch.equal(again.rows(0, V), weight.rows(0, V))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    """Slices equal the weight as bitsandbytes dequantises it, in the requested dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight = tensor(V, H, seed=1, dtype=dtype)
    params = Params4bit(weight, requires_grad=False, quant_type=quant_type, compress_statistics=nested).to(DEVICE)
    assert torch.equal(FourBitWeight.of(params).rows(0, V), dequantize_4bit(params.data, params.quant_state))
    assert FourBitWeight.of(params, torch.float16).rows(0, 2).dtype == torch.float16


def test_four_bits_in_broken_rows_are_refused() -> None:
    """4-bit weights whose rows end inside a block are refused, because single rows cannot be dequantised."""
    params = Params4bit(tensor(20, 40, seed=1), requires_grad=False, quant_type="nf4").to(DEVICE)
    with pytest.raises(ValueError, match="rows of 40 are not whole blocks of 64"):
        FourBitWeight.of(params)
    unquantized = Params4bit(tensor(20, 64, seed=1), requires_grad=False)
    with pytest.raises(ValueError, match="not quantised yet"):
        FourBitWeight.of(unquantized)


@pytest.mark.parametrize("workspace_mb", [0.02, 128])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ["nf4 with nested scales", "host"])
def test_a_walk_over_any_head_is_the_same(head: str, backend: str, workspace_mb: float) -> None:
    """Values and gradients are those of the whole weight as a tensor, and values are the same without gradients."""
    weight = HEADS[head]()
    dense = weight.rows(0, V)
    targets = torch.arange(N, device=DEVICE) * 16
    found = {}
    for name, given in (("rows", weight), ("tensor", dense)):
        hidden = tensor(N, H, seed=3).requires_grad_()
        keywords: Any = {"outputs": ("entropy", "is_top1"), "workspace_mb": workspace_mb, "backend": backend}
        result = linear_logprob(hidden, given, targets, **keywords)
        (result.logp * torch.linspace(-1, 1, N, device=DEVICE)).sum().backward()
        with torch.no_grad():
            plain = linear_logprob(hidden, given, targets, **keywords)
        assert hidden.grad is not None
        found[name] = (*[value.detach() for value in (*result, *plain) if value is not None], hidden.grad)
    for ours, theirs in zip(found["rows"], found["tensor"], strict=True):
        assert_same(ours, theirs)


def test_a_cast_is_of_the_original_weight() -> None:
    """A weight that is read in one dtype and then in another is rounded once; 4 bits are dequantised to it."""
    for name in ("dense", "nf4", "widened", "host"):
        weight = HEADS[name]()
        again = weight.read_as(torch.bfloat16).read_as(torch.float16)
        assert torch.equal(again.rows(3, 9), weight.rows(3, 9).half())
        assert weight.read_as(torch.bfloat16).read_as(weight.dtype).kind == weight.kind
        assert weight.read_as(weight.dtype) is weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_cast_weight_trains_the_original(base: torch.dtype, backend: str) -> None:
    """The gradient of a weight that is read in half precision has the weight's own dtype, and float32 accuracy."""
    start, targets = tensor(V, H, seed=1, dtype=base) / 4, torch.arange(N, device=DEVICE) * 16
    hidden = tensor(N, H, seed=3, dtype=torch.bfloat16)
    exact = start.bfloat16().double().requires_grad_()
    linear_logprob_naive(hidden.double(), exact, targets).logp.sum().backward()
    leaf = start.clone().requires_grad_()
    head = DenseWeight(leaf).read_as(torch.bfloat16)
    linear_logprob(hidden, head, targets, backend=backend, workspace_mb=0.05).logp.sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == base
    # The triton backend stores ∂loss/∂logits in the dtype of the products, as torch's autocast does.
    coarse = base == torch.bfloat16 or backend == "triton"
    assert (leaf.grad - exact.grad).norm() <= (5e-3 if coarse else 1e-6) * exact.grad.norm()


USUAL_STEP = head_weight.STEP  # before a test changes it


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("rank", [1, 7, 8, 16, 33])
def test_rows_of_a_widened_head_are_whole_vectors(rank: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rank, rows of hidden states and weights begin at multiples of 16 entries, and the zeros between
    change results by rounding only."""
    strides, walk = [], linear_logprob_torch.walk_vocabulary

    def watched(hidden: Tensor, weight: HeadWeight, targets: Tensor, *args: Any, **options: Any) -> Any:
        strides.extend(rows.stride(0) for rows in (hidden, weight.rows(0, 5), weight.gather(targets)))
        return walk(hidden, weight, targets, *args, **options)

    def run(step: int) -> list[Tensor]:
        monkeypatch.setattr(head_weight, "STEP", step)
        leaves = [
            tensor(*shape, seed=at).requires_grad_() for at, shape in enumerate([(N, width), (rank, width), (V, rank)])
        ]
        head = LoraWeight(tensor(V, width, seed=9) / 4, leaves[1], leaves[2], 0.5)
        logp = linear_logprob(leaves[0], head, torch.arange(N, device=DEVICE) * 16, backend="torch").logp
        return [logp.detach(), *torch.autograd.grad((logp * torch.linspace(-1, 1, N, device=DEVICE)).sum(), leaves)]

    unpadded = run(1)
    monkeypatch.setattr(linear_logprob_torch, "walk_vocabulary", watched)
    for ours, theirs in zip(run(USUAL_STEP), unpadded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert strides
    assert [stride for stride in strides if stride % 64] == []


OPTIONS = {"plain": {}, "all": {"softcap": 2.5, "logit_scale": 1.3, "temperature": 0.8}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("workspace_mb", [0.01, 128])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("base", ["tensor", "nf4"])
def test_lora_on_the_head(base: str, dropout: bool, backend: str, workspace_mb: float, options: str) -> None:
    """Log-probabilities and the gradients of hidden, A and B are those of autograd on full logits in float64."""
    weight: Any = tensor(V, H, seed=1) / 4 if base == "tensor" else four_bit("nf4", nested=True)
    dense = weight if isinstance(weight, Tensor) else weight.rows(0, V)
    targets, scaling = torch.arange(N, device=DEVICE) * 16, 0.7
    kept = (tensor(N, H, seed=6) > 0).float() * 2 if dropout else torch.ones(N, H, device=DEVICE)
    start = {"hidden": tensor(N, H, seed=3), "lora_A": tensor(R, H, seed=4), "lora_B": tensor(V, R, seed=5) / 8}
    coefficients = torch.linspace(-1, 1, N, device=DEVICE)

    exact = {name: leaf.double().requires_grad_() for name, leaf in start.items()}
    inner = (exact["hidden"] * kept.double()) @ exact["lora_A"].T * scaling
    wide_hidden, wide_weight = torch.cat([exact["hidden"], inner], 1), torch.cat([dense.double(), exact["lora_B"]], 1)
    truth = linear_logprob_naive(wide_hidden, wide_weight, targets, **OPTIONS[options])
    (truth.logp * coefficients).sum().backward()

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    head = LoraWeight(weight, leaves["lora_A"], leaves["lora_B"], scaling, lambda h: h * kept)
    keywords: Any = OPTIONS[options] | {"workspace_mb": workspace_mb, "backend": backend}
    found = linear_logprob(leaves["hidden"], head, targets, outputs=("entropy",), **keywords)
    (found.logp * coefficients).sum().backward()
    torch.testing.assert_close(found.logp.double(), truth.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, truth.entropy.float(), rtol=1e-4, atol=1e-4)
    expect_gradients(leaves, exact, 1e-5)


def expect_gradients(leaves: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    for name, leaf in leaves.items():
        expected = exact[name].grad
        assert leaf.grad is not None
        assert expected is not None
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_on_a_half_precision_head(backend: str) -> None:
    """PEFT keeps adapters in float32 for a bfloat16 head: their gradients are float32 and accurate."""
    start = {"lora_A": tensor(R, H, seed=4), "lora_B": tensor(V, R, seed=5) / 8}
    weight, hidden = (tensor(V, H, seed=1) / 4).bfloat16(), tensor(N, H, seed=3, dtype=torch.bfloat16)
    targets = torch.arange(N, device=DEVICE) * 16
    exact = {name: leaf.double().requires_grad_() for name, leaf in start.items()}
    merged = weight.double() + exact["lora_B"] @ exact["lora_A"]
    linear_logprob_naive(hidden.double(), merged, targets).logp.sum().backward()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    head = LoraWeight(weight, leaves["lora_A"], leaves["lora_B"])
    linear_logprob(hidden, head, targets, backend=backend).logp.sum().backward()
    expect_gradients(leaves, exact, 0.02)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lora_A": torch.zeros(R, H + 1)}, ValueError, r"lora_A \(3, 65\) and lora_B \(211, 3\) do not fit a weight"),
    ({"lora_B": torch.zeros(V, R + 1)}, ValueError, r"lora_B \(211, 4\) do not fit"),
    ({"lora_A": None}, TypeError, "lora_A must be a torch.Tensor, got NoneType"),
    ({"base": torch.zeros(V)}, ValueError, r"weight must have 2 dimensions, got shape \(211,\)"),
    ({"base": torch.zeros(V, 2)}, ValueError, "do not fit a weight"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG)
def test_a_wrong_adapter_is_refused(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    """The message names the tensors and their shapes."""
    right: dict[str, Any] = {"base": torch.zeros(V, H), "lora_A": torch.zeros(R, H), "lora_B": torch.zeros(V, R)}
    with pytest.raises(kind, match=message):
        linear_logprob(torch.zeros(N, H), LoraWeight(**right | wrong), torch.zeros(N, dtype=torch.int64))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)], ids=repr)
def test_a_gpu_needs_no_index(device: torch.device | str, adapted: bool) -> None:
    """Rows in host memory are accepted beside hidden states on the GPU, however the GPU is named."""
    with mock.patch("torch.cuda.Stream"), FakeTensorMode(allow_non_fake_inputs=True):
        hidden, targets = torch.empty(N, H, device="cuda"), torch.zeros(N, dtype=torch.int64, device="cuda")
        base: Any = OffloadedWeight(torch.empty(V, H), device)
        if adapted:
            base = LoraWeight(base, torch.empty(R, H, device="cuda"), torch.empty(V, R, device="cuda"))
        assert linear_logprob(hidden, base, targets).logp.device == torch.device("cuda", 0)


def test_another_gpu_is_still_refused() -> None:
    with mock.patch("torch.cuda.Stream"), FakeTensorMode(allow_non_fake_inputs=True):
        hidden, targets = torch.empty(N, H, device="cuda:1"), torch.zeros(N, dtype=torch.int64, device="cuda:1")
        with pytest.raises(ValueError, match="weight is on cuda:0, hidden is on cuda:1"):
            linear_logprob(hidden, OffloadedWeight(torch.empty(V, H), "cuda"), targets)


@pytest.mark.parametrize("forgets", ["", "compute", "copy"])
@pytest.mark.parametrize("rows", [64, 100, V])
def test_tiles_in_host_memory_arrive_before_they_are_used(
    rows: int, forgets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two walks over a head: no timing of copies and products changes a tile, and copies run beside products.

    A fault is found where a queue forgets to wait for the other one.
    """
    recorder, weight, places = Recorder(forgets=forgets), torch.randn(V, H), iter(range(2))
    recorder.layers = {weight[first:].data_ptr(): first for first in range(V)}
    fake = SimpleNamespace(device=torch.device, cuda=recorder.cuda)
    fake.empty_like = lambda part, device: recorder.slot(next(places), torch.empty_like(part))
    monkeypatch.setattr(head_weight, "torch", fake)
    head: Any = OffloadedWeight(weight, "cuda")
    for first in 2 * [*range(0, V, rows)]:
        tile = head.rows(first, min(first + rows, V))
        recorder.read(tile.place, first)
        assert torch.equal(tile.tensor, weight[first : first + rows])
    writes = [entry for entry in recorder.log if entry.action == "write"]
    assert len(writes) == (1 if rows == V else 2 * -(-V // rows))
    assert bool(faults(recorder.log)) is (bool(forgets) and (forgets == "compute" or rows < V))
    assert len(beside_kernels(recorder.log)) >= len(writes) - 2
