"""Which layers' activations are kept and which computed again: as few as the step needs to fit the device."""

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.memory.step import count_step
from fastpref.model.gradient_checkpointing import (
    can_be_checkpointed,
    checkpoint_layers,
    decoder_layers,
    in_host_memory,
    layers_needed,
)
from fastpref.model.load import Loaded

# Of the whole device: what the allocator cannot use between its blocks, and what libraries take inside an operation.
MARGIN = 0.1


def checkpoint_activations(config: Config, loaded: Loaded, device: torch.device, *, sharded: bool = False) -> list[str]:
    """Checkpoint the model's layers as `train.checkpointing` and `train.offload_activations` say. What to tell of it.

    What a model that will be `sharded` takes of a device is not counted: then "auto" is all of its layers. Raises
    UserError where activations lie in host memory anyway, and for a model that cannot be checkpointed if it shall be.
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
        return [f"activations of all layers are kept: {kind}"] if device.type != "cpu" else []
    layers = max(1, len(decoder_layers(loaded.model)))
    count, why = (layers, "") if sharded and config.train.checkpointing == "auto" else _choose(config, layers, device)
    checkpoint_layers(loaded.model, count, saving=in_host_memory(device) if offload else None)
    moved = ", their inputs in host memory" if offload and count else ""
    return [f"activations of {count} of {layers} layers are computed twice{moved}{why}"] if why or moved else []


def as_loaded(config: Config, loaded: Loaded) -> Config:
    """What to count by: whether a model has liger's kernels is found out when it is loaded."""
    return config.but({"model.liger": loaded.liger and "auto"})


def _choose(config: Config, layers: int, device: torch.device) -> tuple[int, str]:
    wanted = config.train.checkpointing
    if wanted != "auto" or device.type != "cuda":
        return (layers if wanted is True or (wanted == "auto" and device.type != "cpu") else 0), ""
    try:
        return fewest_layers(config, layers, device, _available(device))
    except UserError:
        raise
    except Exception as error:  # a model's code may ask for the values of tensors, which fake ones have not
        return layers, f", as the step cannot be counted beforehand ({type(error).__name__})"


def fewest_layers(config: Config, layers: int, device: torch.device, available: int) -> tuple[int, str]:
    """How many layers to checkpoint so that a step of the longest micro-batch takes no more than `available` bytes
    with everything that is held, and why."""
    without = count_step(config, device, layers=0).total
    if without <= available:
        return 0, f": a step takes {_gib(without)} of {_gib(available)}"
    but_one = count_step(config, device, layers=layers - 1).total
    why = f": a step would take {_gib(without)} with none and {_gib(but_one)} with {layers - 1}, of {_gib(available)}"
    return layers_needed(layers, without, but_one, available), why


def _available(device: torch.device) -> int:
    """What this process has and may still take, less the margin."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - int(MARGIN * total)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
