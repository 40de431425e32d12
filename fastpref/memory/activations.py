"""The choice of the layers that have gradient checkpointing: as few as the step needs to fit the device."""

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.memory.fit import available
from fastpref.memory.measured import as_loaded
from fastpref.memory.step import count_step
from fastpref.memory.streaming import streaming_of
from fastpref.model.gradient_checkpointing import (
    can_be_checkpointed,
    checkpoint_layers,
    decoder_layers,
    in_host_memory,
    layers_needed,
)
from fastpref.model.load import Loaded
from fastpref.sizes import in_words


def checkpoint_activations(config: Config, loaded: Loaded, device: torch.device, *, sharded: bool = False) -> list[str]:
    """Turn on gradient checkpointing as `train.checkpointing` and `train.offload_activations` say. Return notes on it.

    The memory of a model that will be `sharded` cannot be counted, so "auto" then checkpoints all of its layers; so it
    does on a GPU if layers are streamed, because the memory is better spent on layers that need no copies. Raises
    UserError for offloading on a CPU, and for a model without gradient checkpointing if the config asks for it.
    """
    offload = config.train.offload_activations
    config = as_loaded(config, loaded)
    if offload and device.type == "cpu":
        raise UserError("train.offload_activations: on a CPU activations are in host memory already; leave the key out")
    if not can_be_checkpointed(loaded.model):
        kind = f"{loaded.model.config.model_type} models have no gradient checkpointing"
        if config.train.checkpointing is True:
            raise UserError(f"train.checkpointing: {kind} in transformers; leave the key out, or set it to false")
        if offload:
            raise UserError(f"train.offload_activations: {kind} in transformers; leave the key out")
        return [f"gradient checkpointing: off, because {kind} in transformers"] if device.type != "cpu" else []
    layers = max(1, len(decoder_layers(loaded.model)))
    every = config.train.checkpointing == "auto" and (
        sharded or (device.type != "cpu" and streaming_of(loaded) is not None)
    )
    count, why = (layers, "") if every else _choose(config, layers, device)
    checkpoint_layers(loaded.model, count, saving=in_host_memory(device) if offload else None)
    moved = ", with their inputs in host memory" if offload and count else ""
    said = why or moved or (config.train.checkpointing is True and device.type == "cpu")  # which usually has none
    return [f"gradient checkpointing: {count} of {layers} layers{moved}{why}"] if said else []


def _choose(config: Config, layers: int, device: torch.device) -> tuple[int, str]:
    wanted = config.train.checkpointing
    if wanted != "auto" or device.type != "cuda":
        return layers if wanted is True or (wanted == "auto" and device.type != "cpu") else 0, ""
    try:
        return fewest_layers(config, layers, device, available(device))
    except UserError:
        raise
    except Exception as error:  # a model's code may read the values of tensors, which fake tensors do not have
        return layers, f"; the memory of a step cannot be counted beforehand ({type(error).__name__})"


def fewest_layers(config: Config, layers: int, device: torch.device, room: int) -> tuple[int, str]:
    """Return the fewest checkpointed layers with which the longest micro-batch fits `room` bytes, and a reason."""
    without = count_step(config, device, layers=0).total
    if without <= room:
        return 0, f"; a step takes {in_words(without)} of {in_words(room)}"
    but_one = count_step(config, device, layers=layers - 1).total
    needed = f"{in_words(without)} without it and {in_words(but_one)} with {layers - 1} layers"
    return layers_needed(layers, without, but_one, room), f"; a step would take {needed}, of {in_words(room)}"
