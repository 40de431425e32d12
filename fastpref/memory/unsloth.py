"""A model of how Unsloth 2026.10 computes a step on a GPU, for a comparison of memory.

It follows Unsloth's source code and does not run it. Losses of preferences score completion tokens in chunks, and
layers have kernels of their own: both count as if they took what fastpref's take, the smaller number where the code
leaves a choice. Supervised training computes the cross-entropy and its gradient in chunks of tokens, which together
have at most half of the free memory and at most 4 GiB, at 16 bytes a logit. Rows are TRL's, and gradient checkpointing
keeps the inputs of layers in host memory. Before 2026.10, preferences made the logits of every position (issue 5291).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.memory.trl import as_trl
from fastpref.model.body import body_of
from fastpref.model.head import Head
from fastpref.model.policy import Policy
from fastpref.model.router import RouterLoss
from fastpref.ops import TokenLogprobs
from fastpref.sizes import GIB

VERSION = "2026.10"
_LOGIT = 16  # bytes of a logit's copies in a chunk
_MOST = 4 * GIB  # bytes of a chunk; half of the free memory if that is less, which is not known here


def as_unsloth(config: Config) -> Config:
    """Return the config of Unsloth's step: TRL's rows, fused layers, and the inputs of layers in host memory."""
    return as_trl(config).but({"train.offload_activations": True, "model.liger": "auto"})


def unsloth_policy(config: Config) -> Callable[[PreTrainedModel], Policy]:
    """Return a `make_policy` for `count_step` that gives a policy Unsloth's head."""
    return _supervised_policy if config.loss.supervised else Policy.of


def _supervised_policy(model: PreTrainedModel) -> Policy:
    body, head = body_of(model), _Fused(model)
    return Policy(body, cast(Any, head), RouterLoss.of(model, body))


class _Fused(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.head = Head(model)

    def forward(self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenLogprobs:
        return TokenLogprobs(_Chunks.apply(hidden, self.head.module.weight)[positions], None, None, None, None)


class _Chunks(torch.autograd.Function):
    """A function to one number per row, which computes the gradients in its forward pass, one chunk after the other."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:  # [N, H], [V, H]
        gradients = [
            torch.empty_like(t) if needed else None for t, needed in zip((hidden, weight), ctx.needs_input_grad)
        ]
        rows = max(1, min(len(hidden), _MOST // (_LOGIT * len(weight))))
        chunk = hidden.new_empty((rows, len(weight), _LOGIT), dtype=torch.uint8)
        if gradients[1] is not None:
            torch.empty_like(weight)  # of a chunk, before it is added
        del chunk
        ctx.save_for_backward(*[gradient for gradient in gradients if gradient is not None])
        ctx.needed = [gradient is not None for gradient in gradients]
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = iter(ctx.saved_tensors)
        return tuple(next(saved) if needed else None for needed in ctx.needed)
