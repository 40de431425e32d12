"""Streaming on a card: the same numbers, less memory, copies beside kernels. `pytest -m gpu` runs these tests.

No assertion depends on a time: where two queues must run beside each other, one of them is held up until it is seen.
"""

import gc
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fastpref.kernels.head_weight import DenseWeight, OffloadedWeight
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.head import Head
from fastpref.model.quantize import quantization_config
from fastpref.model.streaming.pinned import pinned
from fastpref.model.streaming.schedule import Schedule
from fastpref.model.streaming.stream import Streaming, move_model, stream_weights
from fastpref.model.streaming.transfers import CudaTransfers
from fastpref.ops import LoraWeight, linear_logprob

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
LONG = 2_000_000_000  # clock cycles: about a second, which a copy of some MiB does not take
LAYERS, HIDDEN = 8, 512
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
IDS = torch.arange(2 * 96, device="cpu").reshape(2, 96) * 37 % 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


def load(folder: str, quantization: Any, streaming: Streaming | None, checkpointed: int = LAYERS) -> Any:
    """Return a model with adapters that are filled with the same numbers, on the card or streamed to it."""
    settings: BitsAndBytesConfig | None = quantization_config(quantization, torch.bfloat16)
    load: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": settings, "device_map": {"": "cpu"}}
    model: Any = LlamaForCausalLM.from_pretrained(folder, **load)
    if streaming is None:
        move_model(model, GPU)  # with the bits that were quantised in host memory, as the streamed one
    else:
        stream_weights(model, GPU, streaming)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape) * 0.02).to(GPU)
    if checkpointed:
        checkpoint_layers(model, checkpointed)
    return wrapped.train()


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    loss = model(input_ids=IDS.to(GPU), labels=IDS.to(GPU), use_cache=False).loss
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("checkpointed", [0, 3, LAYERS])
@pytest.mark.parametrize("streaming", [Streaming(2), Streaming(3), Streaming(2, resident=3)], ids=str)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_streamed_step_is_a_resident_one(
    folder: str, quantization: str, streaming: Streaming, checkpointed: int
) -> None:
    """Losses and gradients of three steps differ by no more than rounding."""
    models = [load(folder, quantization, kind, checkpointed) for kind in (None, streaming)]
    for _ in range(3):
        (expected, theirs), (found, ours) = map(step, models)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_a_streamed_model_generates_the_same(folder: str) -> None:
    """With a KV cache, and with training before and after."""
    models = [load(folder, "none", kind) for kind in (None, Streaming())]
    for _ in range(2):
        texts = []
        for model in models:
            step(model)
            model.eval()
            with torch.no_grad():
                texts.append(model.generate(input_ids=IDS[:1, :9].to(GPU), max_new_tokens=12, do_sample=False))
            model.train()
        assert torch.equal(*texts)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_peak_falls_by_what_is_streamed(folder: str, quantization: str) -> None:
    """All layers but the slots leave the card, and nothing comes in their place."""
    peaks, streamed = [], 0
    for kind in (None, Streaming()):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = load(folder, quantization, kind)
        step(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(model)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if kind is None:
            layers: Any = model.base_model.model.model.layers
            streamed = sum(p.nbytes for p in layers.parameters() if p.dim() > 1 and not p.requires_grad)
        del model
    saved = streamed * (LAYERS - 2) / LAYERS
    assert peaks[0] - peaks[1] > 0.95 * saved


# --- queues -----------------------------------------------------------------------------------------------------------


def transfers(count: int, slots: int, size: int = 1 << 22) -> tuple[CudaTransfers, list[Tensor]]:
    """Return transfers of buffers that are filled with their number, and their slots."""
    sources = [pinned(size).fill_(layer + 1) for layer in range(count)]
    places = [torch.zeros(size, dtype=torch.uint8, device=GPU) for _ in range(slots)]
    return CudaTransfers(sources, places), places


def test_a_copy_runs_beside_a_kernel() -> None:
    """While the current layer's kernel runs, the next layer arrives; the slot of the current one stays as it is."""
    made, places = transfers(3, 2)
    schedule, done = Schedule(3, 2, made), torch.cuda.Event()
    schedule.arrive(0, 1)
    torch.cuda._sleep(LONG)
    found = places[0].max()
    done.record()
    made._arrived[1].synchronize()
    assert not done.query()  # the kernel has not ended, but the next layer is there
    schedule.arrive(1, 1)  # which queues the copy of layer 2 into the slot of layer 0
    assert not made._arrived[0].query()
    done.synchronize()
    assert int(found) == 1
    schedule.arrive(2, 1)
    assert int(places[0].max()) == 3


def test_a_kernel_waits_for_its_copy() -> None:
    made, places = transfers(2, 2)
    with torch.cuda.stream(made._stream):
        torch.cuda._sleep(LONG)
    schedule = Schedule(2, 2, made)
    schedule.arrive(0, 1)
    found = places[0].min()
    assert not made._arrived[0].query()
    assert int(found) == 1


@pytest.mark.parametrize("slots", [2, 3])
def test_any_order_reads_the_right_numbers(slots: int) -> None:
    """Hundreds of arrivals with kernels and delays in between, and the host never waits: no number is wrong."""
    draw, layers = Random(0), 6
    made, places = transfers(layers, slots)
    schedule, wrong = Schedule(layers, slots, made), torch.zeros((), dtype=torch.int64, device=GPU)
    for _ in range(400):
        layer = draw.randrange(layers)
        schedule.arrive(layer, draw.choice((1, -1)))
        if draw.random() < 0.3:
            torch.cuda._sleep(draw.randrange(1_000_000))
        if draw.random() < 0.3:
            with torch.cuda.stream(made._stream):
                torch.cuda._sleep(draw.randrange(1_000_000))
        for _ in range(draw.randrange(3)):
            wrong += (places[schedule.slot(layer)] != layer + 1).sum()
    assert int(wrong) == 0


def test_slots_are_not_given_away_while_a_copy_is_under_way() -> None:
    """A stream that is dropped in the middle of a copy writes into no other tensor."""
    made, places = transfers(2, 2)
    with torch.cuda.stream(made._stream):
        torch.cuda._sleep(LONG // 4)
    made.copy(0, 0)
    size, kept = len(places[0]), made.sources  # whose end would wait for the copy
    del made, places
    other = torch.zeros(size, dtype=torch.uint8, device=GPU)
    torch.cuda.synchronize()
    assert int(other.max()) == 0
    assert int(kept[0][0]) == 1


# --- locked memory, and the head --------------------------------------------------------------------------------------


def test_memory_is_locked_until_it_is_freed() -> None:
    """A buffer counts as pinned, a copy from it returns before it ends, and its pages can be locked again."""
    for _ in range(3):
        buffer = pinned(10_000_001)
        assert buffer.is_pinned()
        assert buffer[256:512].is_pinned()
        torch.cuda._sleep(LONG // 4)
        there, done = buffer.to(GPU, non_blocking=True), torch.cuda.Event()
        done.record()
        assert not done.query()
        torch.cuda.synchronize()
        assert there.shape == buffer.shape
        del buffer


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_in_host_memory_is_one_on_the_card(lora: bool) -> None:
    """Values and gradients are the same, and the head is never on the card as a whole."""
    rows, width, vocabulary, rank = 300, 512, 65_536, 8
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(torch.bfloat16)
    host = pinned(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)
    factors = [(torch.randn(shape) / 30).to(GPU).requires_grad_() for shape in ((rank, width), (vocabulary, rank))]
    hidden = torch.randn(rows, width, device=GPU, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=GPU)
    leaves, found = [hidden, *(factors if lora else [])], []
    for base in (DenseWeight(weight.to(GPU)), OffloadedWeight(host, GPU)):
        head: Any = LoraWeight(base, lora_A=factors[0], lora_B=factors[1], scaling=2.0) if lora else base
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logp = linear_logprob(hidden, head, targets, workspace_mb=16).logp
        gradients = torch.autograd.grad(logp.sum(), leaves)
        peak = torch.cuda.max_memory_allocated() - before
        found.append((logp.detach(), *gradients))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
    assert lora or peak < weight.nbytes


def test_tables_are_reached_on_the_card(folder: str) -> None:
    """The fused head takes its weight from locked memory; a generated token's logits are those of a resident head."""
    resident, streamed = (load(folder, "none", kind) for kind in (None, Streaming()))
    head = Head(streamed.base_model.model)
    weight, _ = head.weight_and_bias()
    assert isinstance(weight, OffloadedWeight)
    assert weight.weight.is_pinned()
    hidden = torch.randn(3, HIDDEN, device=GPU, dtype=torch.bfloat16)
    module: nn.Module = resident.base_model.model.lm_head
    torch.testing.assert_close(streamed.base_model.model.lm_head(hidden), module(hidden), rtol=1e-2, atol=1e-2)
