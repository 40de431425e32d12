"""The policy: one module from a batch to the log-probabilities of its scored tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.data.batch import PreferenceBatch
from fastpref.model.attention import tree_keywords
from fastpref.model.head import Head
from fastpref.model.router import RouterLoss
from fastpref.ops import TokenLogprobs


class PolicyOutput(NamedTuple):
    tokens: TokenLogprobs  # of the N scored tokens
    router_loss: Tensor | None = None  # scalar, of a mixture of experts in training

    @property
    def logp(self) -> Tensor:
        """[N]"""
        return self.tokens.logp


class Policy(nn.Module):
    """A model's body and head. Only the places that predict a scored token reach the head; logits never exist.

    It is what Accelerate prepares, so the hooks of data and model parallelism cover body and head together.
    """

    def __init__(self, backbone: nn.Module, head: Head, router: RouterLoss | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # what FSDP2 shards by itself
        self.router = router

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Policy":
        """The policy that shares the modules of `model`."""
        return cls(getattr(model, model.base_model_prefix), Head(model), RouterLoss.of(model))

    def generate(self, model: PreTrainedModel, **options: Any) -> Tensor:
        """`model.generate`, of the model with these modules: FSDP2 gathers weights for methods of its root alone."""
        return model.generate(**options)  # pyright: ignore[reportCallIssue]

    def forward(self, batch: PreferenceBatch, outputs: tuple[str, ...] = ()) -> PolicyOutput:
        """Log-probabilities, and the optional outputs of `linear_logprob`, of the N scored tokens."""
        routed = self.router is not None and self.training and torch.is_grad_enabled()
        found = self._body(batch, **({"output_router_logits": True} if routed else {}))
        hidden = found.last_hidden_state.flatten(0, 1)  # [B·T, H]
        tokens = self.head(hidden, batch.predictors, batch.targets, outputs)
        if self.router is None or not routed:
            return PolicyOutput(tokens)
        return PolicyOutput(tokens, self.router(found.router_logits, batch.attention_mask))

    def hidden_states(self, batch: PreferenceBatch) -> Tensor:
        """[B·T, H], what the head is given."""
        return self._body(batch).last_hidden_state.flatten(0, 1)

    def _body(self, batch: PreferenceBatch, **options: Any) -> Any:
        layout: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.tree is not None:
            layout = tree_keywords(batch.tree, batch.input_ids.device)
        return self.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **layout, **options
        )
