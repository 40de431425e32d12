"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961, eq. 4–6)."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.model.body import around_body, with_states


@dataclass(frozen=True)
class RouterLoss:
    """A model's own loss for its routers, and the coefficient that its config trains it with.

    The model computes it from what its body returns, so its names for the number of experts are its own affair.
    """

    coefficient: float
    model: PreTrainedModel
    body: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel, body: nn.Module) -> "RouterLoss | None":
        """None for a model without a router loss, or with a coefficient of 0."""
        config: Any = model.config.get_text_config()
        coefficient = getattr(model, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", None)
        takes = "output_router_logits" in inspect.signature(type(model).forward).parameters
        return cls(float(coefficient), model, body) if coefficient and takes else None

    def __call__(
        self,
        output: Any,  # of the body, with the router logits of each layer, [B·T, experts]
        attention_mask: Tensor | None,  # [B, T] where there is padding
    ) -> Tensor | None:
        """experts · Σ over experts of (share of tokens sent there) · (mean probability of it): a scalar, 1·active if
        balanced, without the coefficient. None if no layer of the model has routed anything."""
        if not getattr(output, "router_logits", None):
            return None
        one = with_states(output, output.last_hidden_state[:1, :1])  # the head has nothing to do with it
        return around_body(
            self.model, self.body, one, attention_mask=attention_mask, output_router_logits=True
        ).aux_loss
