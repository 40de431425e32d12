"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961, eq. 4–6)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.model.body import around_body


@dataclass(frozen=True)
class RouterLoss:
    """A model's own loss for its routers, and the coefficient in its config.

    The model's code computes the loss from its body's output, so no key of its config needs to be known here.
    """

    coefficient: float
    model: PreTrainedModel
    body: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel, body: nn.Module) -> "RouterLoss | None":
        """Return the router loss of a model, or None if it has none or its coefficient is 0."""
        config: Any = model.config.get_text_config()
        coefficient = getattr(model, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", None)
        takes = "output_router_logits" in inspect.signature(type(model).forward).parameters
        return cls(float(coefficient), model, body) if coefficient and takes else None

    def __call__(self, output: Any, attention_mask: Tensor | None) -> Tensor | None:
        """Return `router_loss` without the coefficient, for a mask [B, T] or None if there is no padding."""
        return router_loss(self.model, self.body, output, attention_mask=attention_mask)


def router_loss(model: Callable[..., Any], body: nn.Module, output: Any, **options: Any) -> Tensor | None:
    """Compute the router loss by the model's own code from its body's output: a scalar, or None without router logits.

    It is experts · Σ over experts of (share of tokens routed to it) · (its mean probability). With balanced experts it
    equals the number of experts per token.

    The output has the router logits of each layer, [B·T, experts]; the other arguments are those of `around_body`.
    """
    router_logits = getattr(output, "router_logits", None)
    if not router_logits:
        return None
    # One token is enough for the head, whose result is not used.
    one = type(output)(last_hidden_state=output.last_hidden_state[:1, :1], router_logits=router_logits)
    return around_body(model, body, one, output_router_logits=True, **options).aux_loss
