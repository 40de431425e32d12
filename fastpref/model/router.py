"""The load-balancing loss of a mixture of experts (Switch Transformers, arXiv 2101.03961, eq. 4–6)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class RouterLoss:
    """A model's own function for it, and the coefficient that its config trains it with."""

    coefficient: float
    experts: int
    active: int  # experts a token
    function: Callable[..., Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "RouterLoss | None":
        """None for a model without routers, or with a coefficient of 0."""
        config: Any = model.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if not coefficient or function is None:
            return None
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        return cls(float(coefficient), experts, config.num_experts_per_tok, function)

    def __call__(
        self,
        router_logits: tuple[Tensor, ...],  # of each layer, [B·T, experts]
        attention_mask: Tensor | None,  # [B, T] where there is padding
    ) -> Tensor:
        """experts · Σ over experts of (share of tokens sent there) · (mean probability of it): a scalar, 1·active if
        balanced, without the coefficient."""
        return self.function(router_logits, self.experts, self.active, attention_mask)
