"""Layers in host memory and in slots: the same bits of every kind of weight, and no second copy of them."""

import gc
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from bitsandbytes import nn as bnb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastpref.memory.allocations import PeakStorage
from fastpref.model.quantize import keep_weights_as_loaded
from fastpref.model.streaming.layers import StreamedLayer, frozen_weights, ready_to_copy
from fastpref.model.streaming.stream import Streaming, WeightStream, stream_weights, streamable_layers
from tests.support.tiny import VOCABULARY, model_config

CPU = torch.device("cpu")
BNB: Any = bnb
IDS = torch.arange(3, 3 + 22).reshape(2, 11) % VOCABULARY


def dense(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = model_config(kind)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * 3
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def quantised(replace: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = model_config("qwen2")  # which has biases
    config.hidden_size, config.intermediate_size = 64, 128
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer in streamable_layers(model):
        for parent in list(layer.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, replace(module))
    keep_weights_as_loaded(model)
    return model


def four_bit(nested: bool) -> Callable[[nn.Linear], nn.Module]:
    def replace(module: nn.Linear) -> nn.Module:
        new: Any = BNB.Linear4bit(module.in_features, module.out_features, module.bias is not None, quant_type="nf4")
        weight: Any = BNB.Params4bit(
            module.weight.data, compress_statistics=nested, quant_type="nf4", module=new, blocksize=64
        )
        new.weight, new.bias = weight.to("cpu"), module.bias
        return new

    return replace


def eight_bit(module: nn.Linear) -> nn.Module:
    new: Any = BNB.Linear8bitLt(
        module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False
    )
    weight: Any = BNB.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
    new.weight, new.bias = weight.to("cpu"), module.bias
    return new


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: dense("llama"),
    "tied": lambda: dense("llama-tied"),
    "biases": lambda: dense("qwen2"),
    "Conv1D": lambda: dense("gpt2"),
    "experts": lambda: dense("mixtral"),
    "experts with biases": lambda: dense("gpt-oss"),
    "a scaled embedding": lambda: dense("gemma3"),
    "nf4": lambda: quantised(four_bit(nested=False)),
    "nf4, nested": lambda: quantised(four_bit(nested=True)),
    "int8": lambda: quantised(eight_bit),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def tensors(layer: nn.Module) -> list[Tensor]:
    return [tensor for weight in frozen_weights(layer) for tensor in weight.tensors()]


def lies_in(tensor: Tensor, buffer: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected))


def allocate(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@every_kind
def test_a_layer_is_the_same_in_its_buffer_and_in_its_slot(kind: str) -> None:
    """Modules read the slot between `enter` and `leave`, and the buffer otherwise: the same bits and output."""
    model = KINDS[kind]()
    expected, layer = logits(model), streamable_layers(model)[1]
    ready_to_copy(layer)
    before = [tensor.clone() for tensor in tensors(layer)]
    streamed = StreamedLayer(list(frozen_weights(layer)), allocate)
    slot = torch.zeros(streamed.nbytes + 100, dtype=torch.uint8)
    slot[: streamed.nbytes] = streamed.host
    streamed.give_slot(slot)
    for move, place in ((lambda: None, streamed.host), (streamed.enter, slot), (streamed.leave, streamed.host)):
        move()
        found = tensors(layer)
        assert same(found, before)
        assert all(lies_in(tensor, place) for tensor in found)
        assert all(tensor.data_ptr() % 4 == 0 for tensor in found)
        assert torch.equal(logits(model), expected)
    streamed.enter()
    slot.zero_()
    assert not torch.equal(logits(model), expected)  # nothing else is read


@every_kind
def test_a_layer_takes_the_place_of_its_weights(kind: str) -> None:
    """Afterwards its weights exist once, in the buffer."""
    gc.collect()
    with PeakStorage() as memory:
        layers = streamable_layers(KINDS[kind]())
        gc.collect()
        ready_to_copy(layers[1])
        before, weights = memory.current, sum(tensor.nbytes for tensor in tensors(layers[1]))
        streamed = StreamedLayer(list(frozen_weights(layers[1])), allocate)
        gc.collect()
        assert memory.current - before == streamed.nbytes - weights


@every_kind
def test_vectors_stay(kind: str) -> None:
    """Norms and biases stay where they are: copies of them cost more than they save."""
    model = KINDS[kind]()
    layer = streamable_layers(model)[0]
    weights = list(frozen_weights(layer))
    streamed = {id(weight.parameter) for weight in weights}
    stay = [parameter for parameter in layer.parameters() if id(parameter) not in streamed]
    assert stay
    assert all(parameter.dim() == 1 for parameter in stay)
    assert len(streamed) == len(weights)


@every_kind
@pytest.mark.parametrize("resident", [0, 1])
def test_a_streamed_model_is_the_same(kind: str, resident: int) -> None:
    """Its output has the same bits; and whoever reads its weights between two passes finds the right ones."""
    model = KINDS[kind]()
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    stream = stream_weights(model, CPU, Streaming(resident=resident), allocate=allocate)
    for _ in range(2):
        assert same(list(model.state_dict().values()), list(state.values()))
        assert list(model.state_dict()) == list(state)
        assert torch.equal(logits(model), expected)
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    assert stream.schedule.current == 0
    assert same(list(model.state_dict().values()), list(state.values()))


def test_a_module_of_two_layers_is_in_both() -> None:
    model = KINDS["nf4, nested"]()
    layers: list[Any] = streamable_layers(model)
    layers[2].mlp = layers[0].mlp
    expected = logits(model)
    stream_weights(model, CPU, Streaming(), allocate=allocate)
    assert torch.equal(logits(model), expected)


@every_kind
def test_everything_has_its_place(kind: str) -> None:
    """Tables and layers lie in host memory, also what a table computes with; all else, and the model, on the device."""
    model, meta = KINDS[kind](), torch.device("meta")
    stream: WeightStream = stream_weights(model, meta, Streaming(), allocate=allocate)
    assert model.device == meta
    embeddings, head = cast(Any, model.get_input_embeddings()), cast(Any, model.get_output_embeddings())
    hosted = {id(tensor) for tensor in (*embeddings.parameters(), *embeddings.buffers(), head.weight)}
    hosted |= {id(weight.parameter) for layer in stream.layers for weight in layer.weights}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == ("cpu" if id(tensor) in hosted else "meta"), name
    assert all(slot.device == meta for slot in stream.slots)
    assert sum(len(slot) for slot in stream.slots) < stream.nbytes
    assert embeddings(IDS).device == meta


def test_the_slots_are_as_large_as_their_largest_layer() -> None:
    """Layer k lies in slot k mod S, so layers of other sizes do not enlarge every slot."""
    layers = [nn.Sequential(nn.Linear(width, 64, bias=False)) for width in (64, 8, 32, 16)]
    sizes = [64 * 64 * 4, 64 * 16 * 4]
    assert [len(slot) for slot in WeightStream(layers, CPU, 2).slots] == sizes
    assert [layer.nbytes for layer in WeightStream(layers, CPU, 9).layers] == [64 * w * 4 for w in (64, 8, 32, 16)]
