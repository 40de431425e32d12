"""Checks that a model can be streamed, and that the host's memory has room for it."""

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.model.packed import lies_quantised, of_bitsandbytes, own_quantization
from fastpref.model.skeleton import materialise, skeleton
from fastpref.model.streaming.layers import frozen_weights
from fastpref.model.streaming.stream import streamable_layers
from fastpref.sizes import in_words


def obstacle(config: Config, architecture: PretrainedConfig) -> str | None:
    """Return why the frozen weights of a config cannot be streamed, as a clause that begins with a noun, or None."""
    own = own_quantization(architecture)
    if config.lora is None:
        return "only frozen weights can stay in host memory, and without a [lora] table all are trained"
    if config.loss.uses_reference and config.reference.mode == "copy":
        return 'the frozen copy of reference.mode = "copy" would stay on the GPU; set reference.mode = "auto"'
    if config.tokens.add:
        return "the trained rows of tokens.add, and the tables that they belong to, lie on the GPU"
    if own is not None and not of_bitsandbytes(own):
        return f"weights that are stored quantised ({lies_quantised(architecture)}) cannot be streamed"
    return None


def check_before_loading(config: Config, architecture: PretrainedConfig, dtype: torch.dtype) -> None:
    """Raise UserError for a model that cannot be streamed or has no room in host memory, before its weights are read.

    The memory of a model whose code cannot run without weights is not counted here, but in `check_buffers`.
    """
    if why := obstacle(config, architecture):
        raise UserError(f"model.streaming: {why}; set it to false")
    try:
        model = skeleton(config.but({"lora": None}), architecture, dtype).model
        with FakeTensorMode():
            materialise(model)
            needed = weights_nbytes(model)
    except UserError:
        raise
    except Exception:  # the code of a model may read numbers when it is made
        return
    smaller = own_quantization(architecture) is None and config.model.quantization == "none"
    _check(needed, "weights in host memory", 'set model.quantization to "nf4", ' if smaller else "")


def check_buffers(model: PreTrainedModel) -> None:
    """Raise UserError if a model in host memory leaves no room for the largest buffer, which takes a layer's place."""
    _check(
        max(map(weights_nbytes, streamable_layers(model))), "a layer in host memory a second time, one after another"
    )


def weights_nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights as they are stored, with the scales of quantised ones."""
    distinct = {id(weight.parameter): weight for weight in frozen_weights(module)}
    return sum(tensor.nbytes for weight in distinct.values() for tensor in weight.tensors())


def missing_on_host(needed: int, what: str, advice: str = "") -> str | None:
    """Return a sentence on how much host memory lacks for `needed` bytes, or None if they are free."""
    free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return (
        f"it keeps {in_words(needed)} of {what}, and {in_words(free)} are free: {in_words(needed - free)} are missing. "
        f"Close other programs, {advice}or take a smaller model"
    )


def _check(needed: int, what: str, advice: str = "") -> None:
    if missing := missing_on_host(needed, what, advice):
        raise UserError(f"model.streaming: {missing}")
