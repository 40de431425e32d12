"""A streamed model computes what the resident one does, bit for bit, and its layers are copied no more than needed."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BitsAndBytesConfig

from fastpref.errors import UserError
from fastpref.memory.activations import checkpoint_activations
from fastpref.model.adapters.fresh import with_adapters
from fastpref.model.files import model_config
from fastpref.model.head import OwnLogits
from fastpref.model.load import Loaded, load_model, pretrained
from fastpref.model.precision import in_float32
from fastpref.model.streaming import room
from fastpref.model.streaming.layers import frozen_weights
from fastpref.model.streaming.pinned import pinned
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_of, stream_weights
from fastpref.model.streaming.tables import computes_on
from fastpref.model.streaming.transfers import HostTransfers
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer
from fastpref.step.reference import make_reference
from tests.support.tiny import config_for, save_model, sharing_examples, sharing_lists, unlabelled

CPU, META = torch.device("cpu"), torch.device("meta")
LAYERS = 5
LORA = "lora={rank=3, dropout=0.1}"
BUDGET = 120  # tokens: several micro-batches a step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: save_model(kind, tmp_path_factory.mktemp(kind), layers=LAYERS))


def loaded_by(folder: Path, streaming: Streaming | None, *overrides: str) -> Loaded:
    torch.manual_seed(1)
    return load_model(config_for(folder, *overrides), CPU, streaming=streaming)


def outcome(folder: Path, streaming: Streaming | None, *overrides: str) -> tuple[Any, ...]:
    """Return the metrics, the gradients and the trained weights of two steps with an evaluation between them."""
    loaded = loaded_by(folder, streaming, *overrides)
    config = config_for(folder, *overrides)
    if loaded.stream is not None:
        spoil(loaded.stream)
    with torch.no_grad():
        for parameter in loaded.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint_activations(config, loaded, CPU)
    reference = make_reference(config, loaded)[0] if config.loss.uses_reference else None
    objective = Objective(loaded.policy, reference, config.loss, loaded.layout, BUDGET, 0, CPU)
    rows = sharing_lists(7) if config.loss.listwise else sharing_examples(7, single=not config.loss.paired)
    rows = unlabelled(rows) if config.loss.supervised else rows
    optimizer, found = make_optimizer(loaded.policy, config), []
    torch.manual_seed(2)
    for _ in range(2):
        metrics, work = objective.step(rows, lambda loss: loss.backward(), token_metrics=True)
        assert work.microbatches > 1
        trained = {name: p for name, p in loaded.policy.named_parameters() if p.requires_grad}
        found += [metrics.result(), {name: p.grad for name, p in trained.items()}]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found += [objective.evaluate(rows, 4).result(), {name: p.detach().clone() for name, p in trained.items()}]
        loaded.policy.train()
    return tuple(found)


def spoil(stream: WeightStream) -> None:
    """Let copies come from elsewhere, and fill the buffers with NaN, so that a computation that reads them shows."""
    transfers: Any = stream.schedule.transfers
    transfers.sources = [source.clone() for source in transfers.sources]
    for layer in stream.layers:
        layer.host.fill_(255)


def assert_same(streamed: Any, resident: Any) -> None:
    for ours, theirs in zip(streamed, resident, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not _equal(ours[name], theirs[name])] == []


def _equal(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) and isinstance(theirs, Tensor) else ours == theirs


WAYS = (Streaming(), Streaming(slots=3), Streaming(resident=2), Streaming(slots=3, resident=1))
STEPS: dict[str, tuple[str, list[str], tuple[Streaming, ...]]] = {
    **{loss: ("llama", [f"loss.type={loss}", LORA], WAYS[:1])
       for loss in ("ipo", "kto", "orpo", "simpo", "cpo", "pl", "lipo", "sft")},
    "dpo": ("llama", [LORA], WAYS),
    "nf4": ("llama", [LORA, "model.quantization=nf4"], WAYS[1:3]),
    "int8": ("llama", [LORA, "model.quantization=int8"], WAYS[2:]),
    "rsLoRA": ("llama", ["lora={rank=3, rslora=true}", "train.layout=padded"], WAYS[:1]),
    "DoRA": ("llama", ["lora={rank=3, dora=true}"], WAYS[:1]),
    "DoRA on nf4": ("llama", ["lora={rank=3, dora=true}", "model.quantization=nf4"], WAYS[3:]),
    "checkpointed": ("llama", [LORA, "train.checkpointing=true"], WAYS[:2]),
    "checkpointed nf4": ("llama", ["lora={rank=3}", "train.checkpointing=true", "model.quantization=nf4"], WAYS[:1]),
    "bfloat16": ("llama", [LORA, "model.dtype=bfloat16"], WAYS[:1]),
    "a head with LoRA": ("llama", ['lora={rank=3, target=["all-linear", "lm_head"]}'], WAYS[:1]),
    "tied, a head with LoRA": ("llama-tied", ['lora={rank=3, target=["all-linear", "lm_head"]}'], WAYS[:1]),
    "a trained head": ("llama", ['lora={rank=3, modules_to_save=["lm_head"]}'], WAYS[:1]),
    "trained embeddings": ("llama", ['lora={rank=3, modules_to_save=["embed_tokens"]}'], WAYS[:1]),
    "trained MLPs": ("llama", ['lora={rank=3, target=["q_proj"], modules_to_save=["mlp"]}'], WAYS[:1]),
    "a trained layer": ("llama", ['lora={rank=3, target=["q_proj"], modules_to_save=["layers.2"]}'], WAYS[:1]),
    "tied": ("llama-tied", [LORA], WAYS[:1]),
    "gemma2": ("gemma2", [LORA], WAYS[1:2]),
    "gemma3": ("gemma3", [LORA, "model.quantization=nf4"], WAYS[:1]),
    "mixtral": ("mixtral", ["lora={rank=3}"], WAYS[:1]),
    "experts in nf4": ("mixtral", ["lora={rank=3}", "model.quantization=nf4"], WAYS[1:3]),
    "experts in int8": ("mixtral", ["lora={rank=3}", "model.quantization=int8"], WAYS[:1]),
    "experts in nf4, checkpointed": (
        "qwen3-moe", ['lora={rank=3, target=["q_proj"]}', "train.checkpointing=true", "model.quantization=nf4"],
        WAYS[:1],
    ),
    "gpt2": ("gpt2", [LORA], WAYS[:1]),
    "gpt-oss": ("gpt-oss", ["lora={rank=3}"], WAYS[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_streamed_step_is_the_resident_one(saved: Callable[[str], Path], name: str):
    """Metrics, gradients, updated weights and an evaluation are equal, bit for bit, with any slots and residents.

    No pass reads a layer's host memory, which a GPU could not.
    """
    kind, overrides, ways = STEPS[name]
    resident = outcome(saved(kind), None, *overrides)
    assert any(gradient is not None and gradient.any() for gradient in resident[1].values())
    for streaming in ways:
        assert_same(outcome(saved(kind), streaming, *overrides), resident)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_is_stored_quantised(saved: Callable[[str], Path], tmp_path: Path, bits: int):
    """bitsandbytes' own format on disk is streamed as it is: with its scales, and without quantising again."""
    options = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    load = AutoModelForCausalLM.from_pretrained
    load(saved("llama"), quantization_config=options, dtype=torch.float32).save_pretrained(tmp_path)
    assert_same(outcome(tmp_path, Streaming(), LORA), outcome(tmp_path, None, LORA))


def test_logits_by_the_models_own_code(tmp_path: Path):
    """A model whose head is its own code computes the same with that head in host memory."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    resident, streamed = (outcome(tmp_path, way, "lora={rank=3}", "loss.type=simpo") for way in (None, Streaming()))
    assert isinstance(loaded_by(tmp_path, Streaming(), LORA).policy.head, OwnLogits)
    assert_same(streamed, resident)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(("slots", "resident"), [(2, 0), (3, 0), (2, 2), (LAYERS, 0), (LAYERS + 1, 1)])
def test_a_micro_batch_copies_each_layer_at_most_twice(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, slots: int, resident: int, checkpointing: str
):
    """Forward and backward copy every streamed layer once, except those that are still in slots at the turns."""
    copied: list[int] = []
    real = HostTransfers.copy
    monkeypatch.setattr(
        HostTransfers, "copy", lambda self, layer, slot: (copied.append(layer), real(self, layer, slot))
    )
    overrides = ["lora={rank=3}", "loss.type=simpo", f"train.checkpointing={checkpointing}"]
    loaded = loaded_by(saved("llama"), Streaming(slots, resident), *overrides)
    config = config_for(saved("llama"), *overrides)
    checkpoint_activations(config, loaded, CPU)
    objective = Objective(loaded.policy, None, config.loss, loaded.layout, 10_000, 0, CPU)
    streamed, counts = LAYERS - resident, []
    for _ in range(3):
        copied.clear()
        assert objective.step(sharing_examples(4), lambda loss: loss.backward())[1].microbatches == 1
        counts.append(len(copied))
    assert counts[0] <= 2 * streamed - min(slots, streamed)
    assert counts[1:] == [2 * (streamed - min(slots, streamed))] * 2  # the first layers are in slots already
    assert loaded.stream is not None
    assert len(loaded.stream.slots) == min(slots, streamed)


# --- memory ----------------------------------------------------------------------------------------------------------


def storages(layer: nn.Module) -> list[weakref.ref[Any]]:
    return [weakref.ref(t.untyped_storage()) for weight in frozen_weights(layer) for t in weight.tensors()]


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_host_memory_holds_each_layer_once(saved: Callable[[str], Path], kind: str):
    """When a layer's buffer is allocated, the tensors of all layers before it are freed."""
    config = config_for(saved("llama"), LORA, f"model.quantization={kind}")
    model = pretrained(config.model, model_config(config.model), torch.float32, CPU)
    layers: Any = model.model.layers
    before, alive = [storages(layer) for layer in layers], []

    def allocate(size: int) -> Tensor:
        gc.collect()
        alive.append([any(storage() is not None for storage in layer) for layer in before])
        return pinned(size)

    stream = stream_weights(model, CPU, Streaming(), allocate=allocate)
    assert alive[:LAYERS] == [[place >= made for place in range(LAYERS)] for made in range(LAYERS)]
    assert not any(storage() is not None for layer in before for storage in layer)
    assert stream.nbytes == sum(room.weights_nbytes(layer) for layer in layers) + _padding(stream)


def _padding(stream: Any) -> int:
    return sum(-t.nbytes % 256 for layer in stream.layers for weight in layer.weights for t in weight.tensors())


PLACES: dict[str, tuple[str, list[str]]] = {
    "LoRA": ("llama", ["lora={rank=2}"]),
    "DoRA": ("llama", ["lora={rank=2, dora=true}"]),
    "DoRA on nf4": ("llama", ["lora={rank=2, dora=true}", "model.quantization=nf4"]),
    "int8": ("llama", ["lora={rank=2}", "model.quantization=int8"]),
    "head": ("llama", ['lora={rank=2, target=["all-linear", "lm_head"]}']),
    "trained": ("llama", ['lora={rank=2, target=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "mlp"]}']),
    "a trained layer": ("llama", ['lora={rank=2, target=["q_proj"], modules_to_save=["layers.1"]}']),
    "gemma3": ("gemma3", ['lora={rank=2, modules_to_save=["embed_tokens"]}']),
    "mixtral": ("mixtral", ["lora={rank=2}"]),
}


@pytest.mark.parametrize(
    ("name", "resident"), [*((name, 0) for name in PLACES), *((name, 2) for name in ("LoRA", "int8", "trained"))]
)
def test_only_frozen_weights_stay_in_host_memory(saved: Callable[[str], Path], name: str, resident: int):
    """Adapters, trained copies, norms and resident layers are on the device; streamed layers and tables are not.

    The device is "meta", whose tensors have a place but no numbers.
    """
    kind, overrides = PLACES[name]
    config = config_for(saved(kind), *overrides)
    model = pretrained(config.model, model_config(config.model), torch.float32, CPU)
    stream = stream_weights(model, META, Streaming(resident=resident))
    hosted = {id(weight.parameter) for layer in stream.layers for weight in layer.weights}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    hosted |= {id(table.weight) for table in tables if table is not None}
    with_adapters(config, model)
    stream.move_rest(model)
    assert model.device == META
    wrong = [name for name, p in model.named_parameters() if (p.device == CPU) != (id(p) in hosted)]
    assert wrong == []
    buffers = [name for name, buffer in model.named_buffers() if buffer.device == CPU]
    assert all(name.endswith("embed_scale") for name in buffers)  # which multiplies rows in host memory
    for module in model.modules():
        state = getattr(module, "state", None)
        scales = [getattr(module.weight, "SCB", None), state.SCB] if state is not None else []
        assert len({scale.device for scale in scales if scale is not None}) == (state is not None)


@pytest.mark.parametrize("of", ["load", "stream"])
def test_the_device_is_that_of_its_tensors(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, of: str):
    """A GPU without an index is the current one from the start, so that it equals the device of its tensors."""
    monkeypatch.setattr(f"fastpref.model.{'load' if of == 'load' else 'streaming.stream'}.with_index", lambda _: CPU)
    config, gpu = config_for(saved("llama"), LORA), torch.device("cuda")
    if of == "load":
        model = load_model(config, gpu, streaming=Streaming()).model
    else:
        model = pretrained(config.model, model_config(config.model), torch.float32, CPU)
        stream_weights(model, gpu, Streaming())
    stream, head = stream_of(model), model.get_output_embeddings()
    assert stream is not None
    assert head is not None
    assert [model.device, stream.device, computes_on(head)] == [CPU] * 3


def test_a_copy_of_a_layer_keeps_to_the_one_stream(saved: Callable[[str], Path]):
    """PEFT copies modules that are trained; with its hooks, a copy must not copy all host buffers."""
    stream = loaded_by(saved("llama"), Streaming(), LORA).stream
    assert stream is not None
    assert copy.deepcopy([stream])[0] is stream


def test_half_precision_is_not_widened_in_host_buffers(saved: Callable[[str], Path]):
    """The trial of layouts computes a streamed model in its own dtype, because its slots have no room for another."""
    loaded = loaded_by(saved("llama"), Streaming(), LORA, "model.dtype=bfloat16")
    with in_float32(loaded.model) as exact:
        assert not exact
    assert loaded.layout == "tree"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_missing_host_memory_is_told_before_weights_are_read(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """The message says how much is missing; a model that cannot be counted beforehand is checked before its buffers."""

    def free(count: int) -> None:
        monkeypatch.setattr(room.psutil, "virtual_memory", lambda: type("", (), {"available": count}))

    def unread(*args: Any) -> None:
        raise AssertionError("weights were read")

    whole = room.weights_nbytes(loaded_by(saved("llama"), None, LORA).model)
    with monkeypatch.context() as patch:
        patch.setattr("fastpref.model.load.pretrained", unread)
        free(whole - 1024 * 1024 // 10)
        with pytest.raises(UserError, match=r"llama.*model\.streaming: .* host memory.* 0\.1 MiB are missing"):
            loaded_by(saved("llama"), Streaming(), LORA)
    monkeypatch.setattr(room, "skeleton", unread)  # code that cannot run without numbers
    free(whole)
    loaded_by(saved("llama"), Streaming(), LORA)
    free(1000)
    with pytest.raises(UserError, match=r"model\.streaming: it keeps .* of a layer"):
        loaded_by(saved("llama"), Streaming(), LORA)


def test_the_count_beforehand_is_that_of_the_loaded_weights(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """The count before loading equals the bytes of the weights that are then loaded, scales included."""
    counted: list[int] = []
    monkeypatch.setattr(room, "_check", lambda needed, *rest: counted.append(needed))
    for kind in ("none", "nf4", "int8"):
        config = config_for(saved("llama"), LORA, f"model.quantization={kind}")
        room.check_before_loading(config, model_config(config.model), torch.float32)
        model = pretrained(config.model, model_config(config.model), torch.float32, CPU)
        assert counted.pop() == room.weights_nbytes(model)


REFUSED = {
    "one layer": ("llama", 1, r"1 of the 1 layers of this llama model would be streamed, and at least two are"),
    "none is called": ("llama", LAYERS, r"model\.layers\.\* cannot be streamed, because the code of llama models does"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """A model with too few layers, or whose layers no pass reaches, is refused by name."""
    kind, layers, message = REFUSED[name]
    folder = save_model(kind, tmp_path, layers=layers)
    if name == "none is called":
        monkeypatch.setattr("fastpref.model.streaming.stream.WeightStream._before", lambda *args: None)
    with pytest.raises(UserError, match=message):
        loaded_by(folder, Streaming(), LORA)


def test_weights_of_other_methods_are_refused(saved: Callable[[str], Path], tmp_path: Path):
    """Weights that lie in GPTQ's or another method's format are refused before they are read."""
    folder = save_model("llama", tmp_path)
    config = model_config(config_for(folder).model)
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config.save_pretrained(folder)
    with pytest.raises(UserError, match=r"stored quantised \(gptq, 4 bits\)"):
        loaded_by(folder, Streaming(), LORA)
