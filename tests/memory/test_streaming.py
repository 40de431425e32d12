"""The memory of a step with streamed layers: by shapes, on real tensors, and on GPUs that it fits or does not fit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from bench import cards
from fastpref.config import Config
from fastpref.data.example import Example
from fastpref.errors import UserError
from fastpref.kernels.head_weight import OffloadedWeight
from fastpref.memory import activations
from fastpref.memory import streaming as module
from fastpref.memory.allocations import PeakStorage
from fastpref.memory.estimate import CONTEXT, usable
from fastpref.memory.fake_stream import Copies, tables_of
from fastpref.memory.measured import oversized_step, step_counter
from fastpref.memory.step import StepMemory, count_step
from fastpref.memory.streaming import StreamedStep, choose_streaming, streaming_of
from fastpref.model.adapters.fresh import with_adapters
from fastpref.model.gradient_checkpointing import checkpoint_layers, decoder_layers
from fastpref.model.load import load_model
from fastpref.model.policy import Policy
from fastpref.model.streaming.pace import Card
from fastpref.model.streaming.stream import Streaming, stream_weights
from fastpref.sizes import GIB
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from tests.support.tiny import SIZES, config_for, examples, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA, ORPO = "lora={rank=3}", "loss.type=orpo"
LAYERS = 4


def shape(**changes: Any) -> PretrainedConfig:
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 512}
    return LlamaConfig(**SIZES | sizes | changes)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the config.json, without weights, of a model whose layers are large compared to its embeddings."""
    folder = tmp_path_factory.mktemp("deep")
    shape().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", ["quantization=nf4", "quantization=int8", "dtype=float32", "dtype=bfloat16"])
def test_slots_replace_what_is_streamed(deep: Path, bits: str):
    """The weights leave the device and only the slots come back; whatever else the step holds stays as it is, and
    each resident layer moves its own bytes from the host to the device."""
    config = config_for(deep, LORA, ORPO, f"model.{bits}", "tokens.max_length=8")
    held, line = count_step(config, CUDA), StreamedStep(count_step(config, CUDA, streaming=Streaming()))
    padding = 256 * 7 * 6 * LAYERS  # at most, of the tensors of each weight
    buffers = 3 * SIZES["vocab_size"] * 256 * 4  # of the head, if the peak is there
    assert (held.host, held.copied, held.streamed) == (0, 0, 0)
    for slots, resident in ((2, 0), (2, 2), (3, 1)):
        memory = count_step(config, CUDA, streaming=Streaming(slots, resident))
        assert memory.weights == pytest.approx(held.weights - memory.host + slots * memory.layer, abs=padding)
        same = ("adapters", "gradients", "optimizer", "reference", "checkpointed", "layout")
        assert all(getattr(memory, name) == getattr(held, name) for name in same)
        assert 0 <= (memory.total - memory.weights) - (held.total - held.weights) <= buffers
        expected = line.at(resident)
        assert memory.total == pytest.approx(expected.total + (slots - 2) * memory.layer, abs=padding)
        assert (memory.host, memory.layer) == (expected.host, expected.layer)
        assert memory.streamed == expected.streamed == LAYERS - resident
        assert memory.copied <= expected.copied


def test_weights_are_copied_twice_but_for_the_slots(deep: Path):
    """A step without a reference copies every streamed layer for the forward and for the backward pass, except those
    that are in slots at the turn, and the head once. Layers that all have a slot of their own are not copied again."""
    config = config_for(deep, LORA, ORPO, "tokens.max_length=8", "train.checkpointing=true")
    head = SIZES["vocab_size"] * 256 * 2
    for resident, layers in ((0, 2 * LAYERS - 2), (LAYERS - 2, 0)):
        memory = count_step(config, CUDA, streaming=Streaming(2, resident))
        assert memory.copied == layers * memory.layer + head


def test_inputs_of_layers_count_as_host_memory_if_they_are_moved(deep: Path):
    """`train.offload_activations` moves the inputs of all layers to the host."""
    config = config_for(deep, LORA, ORPO, "tokens.max_length=128")
    moved = count_step(config.but({"train.offload_activations": True}), CUDA)
    assert moved.host == LAYERS * 255 * 256 * 2
    assert moved.total < count_step(config, CUDA).total


def test_a_head_in_host_memory_has_two_buffers():
    """On a GPU a slice of the weight is copied while another is in use; the count has both, although a CPU has none."""
    weight = OffloadedWeight(torch.randn(100, 8), "cpu")
    copies = Copies()
    with PeakStorage() as count, copies.of_head():
        for first in range(0, 100, 40):
            weight.rows(first, min(first + 40, 100))
    assert (count.peak, copies.bytes) == (2 * 40 * 8 * 4, 100 * 8 * 4)
    with PeakStorage() as count:
        OffloadedWeight(weight.weight, "cpu").rows(0, 40)
    assert count.peak == 0


# --- on real tensors --------------------------------------------------------------------------------------------------


def really(config: Config, rows: Sequence[Example], streaming: Streaming) -> tuple[int, int]:
    """Return the bytes at the peak of a streamed step on real tensors, and the bytes in host memory."""
    model = load_model(config, CPU, trained=True).model
    count, copies = PeakStorage(), Copies()

    def on_host(size: int) -> torch.Tensor:
        with count.labelled(PeakStorage.HOST):
            return torch.empty(size, dtype=torch.uint8)

    with count, copies.of_head():
        stream = stream_weights(model, CPU, streaming, allocate=on_host)
        hosted = {id(w.parameter) for layer in stream.layers for w in layer.weights} | set(map(id, tables_of(model)))
        held = [*(p for p in model.parameters() if id(p) not in hosted), *model.buffers()]  # made before the count
        embeddings: Any = model.get_input_embeddings().weight
        head: Any = getattr(model.get_output_embeddings(), "weight")  # noqa: B009
        before = 0 if embeddings is head else embeddings.nbytes  # in host memory that was not allocated in the count
        with_adapters(config, model)
        policy = Policy.of(model)
        checkpoint_layers(model)
        optimizer = make_optimizer(policy, config)
        objective = Objective(policy, None, config.loss, "tree", config.tokens_per_microbatch, 0, CPU)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        count.start_again()
        objective.step(rows, lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
    return count.peak + sum(t.nbytes for t in held), count.host_peak + before


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(
    ("bits", "streaming"),
    [
        ("none", Streaming()),
        ("none", Streaming(3)),
        ("none", Streaming(2, 2)),
        ("nf4", Streaming()),
        ("int8", Streaming()),
    ],
    ids=str,
)
def test_fake_tensors_take_what_real_ones_take(tmp_path: Path, tied: bool, bits: str, streaming: Streaming):
    """The bytes of a streamed step on fake and on real tensors agree to 2 percent on the device, and to the byte in
    host memory."""
    made = shape(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(tmp_path)
    config = config_for(tmp_path, LORA, ORPO, f"model.quantization={bits}", "train.tokens_per_microbatch=400")
    rows = examples(5)
    device, host = really(config, rows, streaming)
    counted = count_step(config, CPU, examples=rows, streaming=streaming)
    assert counted.total == pytest.approx(device, rel=0.02)
    assert counted.host == host


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(deep: Path) -> tuple[StepMemory, StreamedStep]:
    config = config_for(deep, LORA, ORPO, "tokens.max_length=16")
    return count_step(config, CUDA), StreamedStep(count_step(config, CUDA, streaming=Streaming()))


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch, steps: tuple[StepMemory, StreamedStep]) -> None:
    """Let the choice take the counts of `steps`."""

    def count(config: Config, device: torch.device, *, streaming: Streaming | None = None) -> StepMemory:
        return steps[0] if streaming is None else steps[1].least

    monkeypatch.setattr(module, "count_step", count)


def chosen(
    folder: Path, patch: pytest.MonkeyPatch, room: int, *overrides: str, device: torch.device = CUDA, **options: Any
) -> tuple[Streaming | None, list[str]]:
    patch.setattr(module, "available", lambda device: room)
    lora = [] if "full" in overrides else [LORA]
    more = [override for override in overrides if override != "full"]
    config = config_for(folder, *lora, ORPO, "tokens.max_length=16", *more)
    return choose_streaming(config, device, **options)


@pytest.mark.usefixtures("counted_once")
def test_auto_streams_only_what_does_not_fit(
    deep: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[StepMemory, StreamedStep]
):
    """A GPU streams no layer if a step fits with all of them checkpointed, and otherwise as few as it must."""
    without, streamed = steps
    assert chosen(deep, monkeypatch, without.total) == (None, [])
    least, layer = streamed.least.total, streamed.least.layer
    assert chosen(deep, monkeypatch, without.total - 1)[0] is not None
    rooms = {least + layer: 1, least + layer - 1: 0, least: 0, least - 1: 0}
    for room, resident in rooms.items():
        result, (note,) = chosen(deep, monkeypatch, room)
        assert result == Streaming(resident=resident)
        assert note.startswith("streaming: a micro-batch copies at most ")
        assert ("will hardly fit" in note) == (room < least)
        assert "with all on the GPU it would take" in note
    result, (note,) = chosen(deep, monkeypatch, least + layer, "model.streaming=true")
    assert result == Streaming(resident=1)
    assert "with all on the GPU" not in note


def test_what_is_asked_for(deep: Path, monkeypatch: pytest.MonkeyPatch):
    """false never streams; true always does, on a CPU all layers; "auto" does not on a CPU."""
    assert chosen(deep, monkeypatch, 1, "model.streaming=false") == (None, [])
    assert chosen(deep, monkeypatch, 1, device=CPU) == (None, [])
    assert chosen(deep, monkeypatch, 1, "model.streaming=true", device=CPU) == (Streaming(), [])
    assert chosen(deep, monkeypatch, 1 << 50, "model.streaming=true")[0] == Streaming(resident=LAYERS - 2)


def test_microbatches_are_filled_until_they_hide_the_copies(
    deep: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[StepMemory, StreamedStep]
):
    """On a known card micro-batches get the tokens that hide the copies, if they fit and the user set no number."""
    least, longer = steps[1].least, 2048
    monkeypatch.setattr(module, "_card", lambda device: Card("a card", 100.0, 24, "4.0 x16"))
    monkeypatch.setattr(module, "least_tokens", lambda size, card: longer)

    def count(config: Config, device: torch.device, *, streaming: Streaming | None = None) -> StepMemory:
        more = 1000 if config.tokens_per_microbatch == longer else 0
        return steps[0] if streaming is None else replace(least, activations=least.activations + more)

    monkeypatch.setattr(module, "count_step", count)
    result, (note,) = chosen(deep, monkeypatch, least.total + 1000)
    assert result == Streaming(tokens=longer)
    assert "2,048 tokens" in note
    assert chosen(deep, monkeypatch, least.total + 999)[0] == Streaming()
    assert chosen(deep, monkeypatch, least.total + 1000, "train.tokens_per_microbatch=64")[0] == Streaming()
    longer = 8  # fewer than a micro-batch has
    assert chosen(deep, monkeypatch, least.total + 1000)[0] == Streaming()


COPY = ["loss.type=dpo", "reference.mode=copy"]


@pytest.mark.parametrize(
    ("overrides", "options", "why"),
    [([], {"sharded": True}, "FSDP"), (COPY, {}, r"a frozen copy \(reference\.mode"), (["full"], {}, None)],
    ids=["FSDP", "a copy", "full fine-tuning"],
)
def test_where_it_cannot_help(
    deep: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], options: dict[str, Any], why: str | None
):
    """Where streaming cannot help, "auto" leaves it off, and true is refused."""
    assert chosen(deep, monkeypatch, 1, *overrides, **options) == (None, [])
    if why is not None:  # the config refuses full fine-tuning
        with pytest.raises(UserError, match=rf"model\.streaming: {why}"):
            chosen(deep, monkeypatch, 1, *overrides, "model.streaming=true", **options)


def test_packed_weights_of_others_are_not_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only dense weights and those of bitsandbytes are streamed."""
    shape(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}).save_pretrained(tmp_path)
    assert chosen(tmp_path, monkeypatch, 1) == (None, [])
    with pytest.raises(UserError, match=r"stored quantised \(gptq, 4 bits\) cannot be streamed"):
        chosen(tmp_path, monkeypatch, 1, "model.streaming=true")


@pytest.mark.usefixtures("counted_once")
def test_the_host_must_have_room(deep: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[StepMemory, StreamedStep]):
    """If host memory lacks, the message says how much; "auto" then leaves streaming off, and says so."""
    least = steps[1].least
    for free, missing in ((least.host, False), (least.host - (3 << 20), True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if not missing:
            assert chosen(deep, monkeypatch, least.total)[0] == Streaming()
            continue
        result, (note,) = chosen(deep, monkeypatch, least.total)
        assert result is None
        assert "streaming: off" in note
        assert "3.0 MiB are missing" in note
        with pytest.raises(UserError, match=r"model\.streaming: it keeps .* 3\.0 MiB are missing"):
            chosen(deep, monkeypatch, least.total, "model.streaming=true")


def test_a_model_that_cannot_be_counted(deep: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a count true streams all layers, and "auto" none."""

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr(module, "count_step", fails)
    assert chosen(deep, monkeypatch, 1) == (None, [])
    result, (note,) = chosen(deep, monkeypatch, 1, "model.streaming=true")
    assert result == Streaming()
    assert "cannot be counted beforehand (RuntimeError)" in note


def test_a_run_that_is_out_of_memory_counts_its_stream(tmp_path: Path):
    """A streamed run holds the slots and what is not streamed on its device; its steps count as streamed, and
    all layers as checkpointed."""
    config = config_for(save_model("llama", tmp_path), LORA, ORPO, "train.tokens_per_microbatch=400")
    model = load_model(config, CPU, trained=True).model
    before = sum(p.nbytes for p in model.parameters())
    stream = stream_weights(model, CPU, Streaming())
    wrapped = with_adapters(config, model)
    policy = Policy.of(model)
    loaded: Any = SimpleNamespace(
        model=model, wrapped=wrapped, policy=policy, layout="tree", liger=False, stream=stream
    )
    objective = Objective(policy, None, config.loss, "tree", config.tokens_per_microbatch, 0, CPU)
    step = oversized_step(config, loaded, make_optimizer(policy, config), objective, examples(3))
    norms = 5 * SIZES["hidden_size"] * 4
    slots = sum(map(len, stream.slots))
    assert (step.memory.weights, step.memory.host, step.memory.streamed) == (norms + slots, before - norms, 2)
    count = step_counter(step, loaded)
    assert count is not None
    assert [count(changes).streamed for changes in ((), ("model.streaming=false",))] == [2, 0]
    assert streaming_of(loaded) == Streaming()
    assert activations.checkpoint_activations(config, loaded, CUDA) == []
    assert all(layer.gradient_checkpointing for layer in decoder_layers(model))


# --- cards ------------------------------------------------------------------------------------------------------------


def whole(name: str, tokens: int, **train: Any) -> tuple[float, float]:
    """Return the GiB of a step on the device and on the host, from two counts of a few layers."""
    few, more = (cards.counted(name, tokens, layers=layers, **train) for layers in (3, 4))
    others = cards.MODELS[name][1][2] - 3
    device, host = few.total + (more.total - few.total) * others, few.host + (more.host - few.host) * others
    return (device + CONTEXT) / GIB, host / GIB


MOVED: dict[str, Any] = {"offload_activations": True}


@pytest.mark.parametrize(
    ("name", "tokens", "train", "device", "host"),
    [
        ("Llama-3-8B", 2048, MOVED, 2.5, 7),
        ("Llama-3-8B", 512, {}, 2.0, 6),
        ("Qwen3-14B", 2048, MOVED, 3.5, 12),
        ("Qwen3-32B", 2048, {}, 8 * 0.9, 20),
        ("Llama-3-70B", 2048, MOVED | {"optimizer": "adamw_8bit"}, 6.0, 45),
    ],
)
def test_what_large_models_take(name: str, tokens: int, train: dict[str, Any], device: float, host: float):
    """With all layers streamed, a step of a pair takes at most this many GiB, with the CUDA context."""
    assert usable(4) > 2.5 * GIB
    counted = whole(name, tokens, **train)
    assert counted[0] <= device
    assert counted[1] <= host
