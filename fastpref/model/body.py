"""A causal language model's body, and the rest of the model's own code run on a given output of it.

The policy runs the body in its own layout. If this package does not know how the model computes logits or a
load-balancing loss from the body's output, the model's own `forward` does it, with a body that returns a given output.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastpref.errors import UserError

_NAMES = ("model", "transformer", "decoder", "backbone")  # of bodies in models whose prefix names something else

TOWERS = re.compile(r"vision|visual|audio|image")  # in the names of parts that do not read text


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the module whose `last_hidden_state` is the head's input. Raises UserError if the model has none."""
    for name in (getattr(model, "base_model_prefix", ""), *_NAMES):
        body = getattr(model, name, None) if name else None
        if isinstance(body, nn.Module) and body is not model:
            return body
    raise UserError(f"{model.config.model_type} models have no body apart from their head")


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a model or its body computes. Its weights may be streamed from host memory."""
    return module.device if isinstance(module, PreTrainedModel) else next(module.parameters()).device


def numbered(device: torch.device) -> torch.device:
    """Return a GPU with its number: Accelerate's device is "cuda", which does not equal the "cuda:0" of its tensors."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def around_body(model: Callable[..., Any], body: nn.Module, output: Any, **options: Any) -> Any:
    """Return the result of a model, or its forward, with further options, and with a body that returns `output`.

    The body is that of `body_of`; its output is a `ModelOutput` with [B, T, H] in `last_hidden_state`.
    """
    ids = output.last_hidden_state.new_zeros(output.last_hidden_state.shape[:2]).long()
    own = vars(body).get("forward")
    vars(body)["forward"] = lambda *args, **kwargs: output
    try:
        return model(input_ids=ids, use_cache=False, **options)
    finally:
        del vars(body)["forward"]
        if own is not None:
            vars(body)["forward"] = own
