"""A causal language model's body, and the model's own code around what its body returns.

The policy runs the body in a layout of its own. Where this package does not know how the model turns the body's output
into logits or a load-balancing loss, the model's own `forward` does it, with a body that returns a given output.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError

_NAMES = ("model", "transformer", "decoder", "backbone")  # of bodies in models whose prefix names something else


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` is the head's input. Raises UserError for a model without such a part."""
    for name in (getattr(model, "base_model_prefix", ""), *_NAMES):
        body = getattr(model, name, None) if name else None
        if isinstance(body, nn.Module) and body is not model:
            return body
    raise UserError(f"{model.config.model_type} models have no body apart from their head")


def around_body(model: Callable[..., Any], body: nn.Module, output: Any, **options: Any) -> Any:
    """The result of the model's own forward if its body returns `output`.

    Args:
        model: the causal language model, or its forward.
        body: its body, as `body_of` finds it.
        output: a body's output (a `ModelOutput`), [B, T, H] in `last_hidden_state`.
        options: further keywords of the model's forward.
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


def with_states(output: Any, hidden: Tensor) -> Any:
    """A body's output with other hidden states, [B, T, H], and nothing else that belongs to the old ones."""
    kept = {name: value for name, value in output.items() if name == "router_logits"}
    return type(output)(last_hidden_state=hidden, **kept)
