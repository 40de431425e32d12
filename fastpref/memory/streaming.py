"""The choice of how much of a model is streamed: nothing if a step fits without, else as many layers stay as fit."""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.memory.fake_stream import tables_of
from fastpref.memory.fit import available
from fastpref.memory.step import StepMemory, count_step
from fastpref.model.files import model_config
from fastpref.model.load import Loaded, weight_dtype
from fastpref.model.skeleton import materialise, skeleton
from fastpref.model.streaming.pace import Card, card_named, layer_size, least_tokens
from fastpref.model.streaming.room import missing_on_host, obstacle
from fastpref.model.streaming.stream import Streaming, streamable_layers
from fastpref.sizes import in_words

_FEWEST = 2  # layers that are streamed if any are


@dataclass(frozen=True)
class StreamedStep:
    """The memory of a step as a line: each resident layer adds its bytes to the device, and takes them from the host.

    `least` is the step with all layers streamed.
    """

    least: StepMemory

    def resident(self, room: int) -> int:
        """Return the largest number of resident layers with which a step takes at most `room` bytes, or 0."""
        spare = max(0, room - self.least.total)
        return max(0, min(spare // max(1, self.least.layer), self.least.streamed - _FEWEST))

    def at(self, resident: int) -> StepMemory:
        """Return the memory of a step with a number of resident layers."""
        moved = resident * self.least.layer
        return replace(
            self.least,
            weights=self.least.weights + moved,
            host=self.least.host - moved,
            copied=self.least.copied - 2 * moved,  # for the forward and for the backward pass
            streamed=self.least.streamed - resident,
        )


def choose_streaming(
    config: Config, device: torch.device, *, sharded: bool = False
) -> tuple[Streaming | None, list[str]]:
    """Return how much of a model a run streams, or None for a model that lies on the device, and notes on it.

    With `model.streaming = "auto"` a run streams on a GPU only, and only if the longest micro-batch does not fit there
    otherwise. As many layers as fit stay on the GPU. Call this before the model is loaded. Raises UserError if
    `model.streaming` is true and the model cannot be streamed, or not with the free memory of the host.
    """
    wanted = config.model.streaming
    if wanted is False:
        return None, []
    why = "FSDP shards the weights over several GPUs" if sharded else obstacle(config, model_config(config.model))
    if why and wanted is True:
        raise UserError(f"model.streaming: {why}; set it to false")
    if why or (wanted == "auto" and device.type != "cuda"):
        return None, []
    if device.type != "cuda":
        return Streaming(), []
    room = available(device)
    try:
        without = count_step(config, device) if wanted == "auto" else None
        if without is not None and without.total <= room:
            return None, []
        step, tokens = StreamedStep(count_step(config, device, streaming=Streaming())), _hiding(config, device)
        if tokens is not None:
            larger = config.but({"train.tokens_per_microbatch": tokens})
            full = StreamedStep(count_step(larger, device, streaming=Streaming()))
            step, tokens = (full, tokens) if full.least.total <= room else (step, None)
    except UserError:
        if wanted is True:
            raise
        return None, []
    except Exception as error:  # a model's code may read the values of tensors, which fake tensors do not have
        uncounted = f"the memory of a step cannot be counted beforehand ({type(error).__name__})"
        return (Streaming(), [f"streaming: all layers; {uncounted}"]) if wanted is True else (None, [])
    resident = step.resident(room)
    chosen = step.at(resident)
    if missing := missing_on_host(chosen.host, "a step in host memory"):
        if wanted is True:
            raise UserError(f"model.streaming: {missing}")
        return None, [f"streaming: off, although a step will hardly fit the GPU: {missing}"]
    return Streaming(resident=resident, tokens=tokens), [_note(chosen, without, room, tokens)]


def _card(device: torch.device) -> Card | None:
    return card_named(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else None


def _hiding(config: Config, device: torch.device) -> int | None:
    """Return how many tokens a micro-batch needs so that its computations hide the copies, by the model in `pace.py`.

    None if micro-batches are so large already, if the config sets their size, or on a GPU that the model does not know.
    """
    card = _card(device)
    if card is None or config.train.tokens_per_microbatch is not None:
        return None
    model = skeleton(config.but({"lora": None}), model_config(config.model), weight_dtype(config, device)).model
    with FakeTensorMode():
        materialise(model)
    tokens = least_tokens(layer_size(streamable_layers(model)[0]), card)
    return tokens if tokens > config.tokens_per_microbatch else None


def _note(chosen: StepMemory, without: StepMemory | None, room: int, tokens: int | None) -> str:
    why = "" if without is None else f"; with all on the GPU it would take {in_words(without.total)}"
    filled = "" if tokens is None else f"; micro-batches have {tokens:,} tokens, which should hide the copies"
    verdict = "" if chosen.total <= room else ", and will hardly fit"
    return (
        f"streaming: a micro-batch copies at most {in_words(chosen.copied)} to the GPU, and a step takes "
        f"{in_words(chosen.total)} of {in_words(room)}{verdict}{why}{filled}"
    )


def in_host_memory(loaded: Loaded) -> int:
    """Return the bytes of a streamed model's parameters that stay in host memory."""
    model, stream = loaded.model, loaded.stream
    if stream is None:
        return 0
    hosted = [weight.parameter for layer in stream.layers for weight in layer.weights] + tables_of(model)
    return sum(parameter.nbytes for parameter in {id(parameter): parameter for parameter in hosted}.values())


def streaming_of(loaded: Loaded) -> Streaming | None:
    """Return how much of a loaded model is streamed, or None if it lies on its device."""
    if (stream := loaded.stream) is None:
        return None
    return Streaming(len(stream.slots), len(stream.decoder_layers) - len(stream.layers))
