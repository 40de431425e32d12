"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961, eq. 4–6)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.model.body import around_body, with_states


@dataclass(frozen=True)
class RouterLoss:
    """A model's own loss for its routers, and the coefficient in its config.

    The model computes the loss from its body's output, so its config may name the number of experts as it likes.
    """

    coefficient: float
    model: PreTrainedModel
    body: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel, body: nn.Module) -> "RouterLoss | None":
        """The router loss of a model; None if it has none, or if its coefficient is 0."""
        config: Any = model.config.get_text_config()
        coefficient = getattr(model, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", None)
        takes = "output_router_logits" in inspect.signature(type(model).forward).parameters
        return cls(float(coefficient), model, body) if coefficient and takes else None

    def __call__(
        self,
        output: Any,  # of the body, with the router logits of each layer, [B·T, experts]
        attention_mask: Tensor | None,  # [B, T] where there is padding
    ) -> Tensor | None:
        """The loss without the coefficient, a scalar. None if no layer of the model has routed anything."""
        return router_loss(self.model, self.body, output, attention_mask=attention_mask)


def router_loss(model: Callable[..., Any], body: nn.Module, output: Any, **options: Any) -> Tensor | None:
    """What the model's own code computes from the router logits in its body's output: a scalar, or None without any.

    It is experts · Σ over experts of (share of tokens sent there) · (mean probability of it): the number of experts
    that a token is sent to, if they are balanced.

    Args:
        model: the causal language model, or its forward.
        body: its body, as `body_of` finds it.
        output: of the body, with the router logits of each layer, [B·T, experts].
        options: further keywords of the model's forward, such as an attention mask [B, T] where there is padding.
    """
    if not getattr(output, "router_logits", None):
        return None
    one = with_states(output, output.last_hidden_state[:1, :1])  # one token is enough for the head, which has no part
    return around_body(model, body, one, output_router_logits=True, **options).aux_loss
