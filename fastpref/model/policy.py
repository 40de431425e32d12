"""The policy: a module that computes the log-probabilities of a batch's scored tokens."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.data.batch import PreferenceBatch
from fastpref.model.attention import tree_keywords
from fastpref.model.body import body_of
from fastpref.model.head import Head, OwnLogits
from fastpref.model.noise import EmbeddingNoise
from fastpref.model.router import RouterLoss
from fastpref.ops import TokenLogprobs


class PolicyOutput(NamedTuple):
    tokens: TokenLogprobs  # of the M scored tokens
    router_loss: Tensor | None = None  # scalar, of a mixture of experts in training

    @property
    def logp(self) -> Tensor:
        """The log-probabilities of the M scored tokens."""
        return self.tokens.logp


class Policy(nn.Module):
    """A model's body and head, as one module.

    Only the positions that predict a scored token reach the head, and no logits are stored unless the model's own code
    makes them (`OwnLogits`). Accelerate prepares this module, so the hooks of data and model parallelism cover body and
    head together.
    """

    def __init__(self, backbone: nn.Module, head: Head | OwnLogits, router: RouterLoss | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # the classes that FSDP2 shards as units
        self.router = router
        self.noise: EmbeddingNoise | None = None  # on the embeddings of passes in training mode

    @classmethod
    def of(cls, model: PreTrainedModel, *, own_logits: bool = False) -> "Policy":
        """Return a policy that shares the modules of `model`. With `own_logits` the model's code makes the logits."""
        body = body_of(model)
        return cls(body, OwnLogits(model, body) if own_logits else Head(model), RouterLoss.of(model, body))

    def like(self, model: PreTrainedModel) -> "Policy":
        """Return the policy of another model of the same kind, or of the same model after PEFT has wrapped its head."""
        return Policy.of(model, own_logits=isinstance(self.head, OwnLogits))

    def generate(self, model: PreTrainedModel, **options: Any) -> Tensor:
        """Call `generate` of the model with these modules: FSDP2 gathers weights only in methods of its root module."""
        return model.generate(**options)  # pyright: ignore[reportCallIssue]

    def forward(self, batch: PreferenceBatch, outputs: tuple[str, ...] = ()) -> PolicyOutput:
        """Return the log-probabilities, and the named outputs of `linear_logprob`, of the M scored tokens."""
        routed = self.router is not None and self.training and torch.is_grad_enabled()
        output = self._body(batch, **({"output_router_logits": True} if routed else {}))
        hidden = output.last_hidden_state.flatten(0, 1)  # [B·T, H]
        tokens = self.head(hidden, batch.predictors, batch.targets, outputs)
        if batch.rows is not None:
            tokens = tokens.take(batch.rows)
        if self.router is None or not routed:
            return PolicyOutput(tokens)
        return PolicyOutput(tokens, self.router(output, batch.attention_mask))

    def hidden_states(self, batch: PreferenceBatch) -> Tensor:
        """Return the head's input [B·T, H]."""
        return self._body(batch).last_hidden_state.flatten(0, 1)

    def _body(self, batch: PreferenceBatch, **options: Any) -> Any:
        # Every model computes the positions of padded rows itself, and some models take none.
        layout: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.tree is not None:
            layout = tree_keywords(batch.tree, batch.input_ids.device) | {"position_ids": batch.position_ids}
        with self.noise.over(batch) if self.noise is not None and self.training else nullcontext():
            return self.backbone(input_ids=batch.input_ids, use_cache=False, **layout, **options)

    def make_noise(self, model: PreTrainedModel, alpha: float) -> None:
        """Add noise of this size to the embeddings of every pass in training mode."""
        self.noise = EmbeddingNoise(alpha)
        model.get_input_embeddings().register_forward_hook(self.noise)
