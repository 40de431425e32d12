"""A model of how TRL 1.16 computes the head of a step on a GPU, for a comparison of memory.

It follows TRL's source code and does not run it. DPO, KTO and SFT work in tiles of 4,096 tokens and 32,768 columns,
with the gradient of the hidden states in float32. ORPO, SimPO and CPO make the logits of every position of the padded
rows, which Accelerate copies to float32. They compute a log-softmax, whose backward pass makes a gradient of the same
size, and for the supervised term a cross-entropy over the chosen rows.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.config.losses import SimPO
from fastpref.model.adapters.fused import unfuse_lora
from fastpref.model.body import body_of
from fastpref.model.head import Head
from fastpref.model.policy import Policy
from fastpref.model.router import RouterLoss
from fastpref.ops import TokenLogprobs

VERSION = "1.16"
_TOKENS, _COLUMNS = 4096, 32768  # the size of a tile


def as_trl(config: Config) -> Config:
    """Return the config of TRL's step: padded rows in one micro-batch, and a copy as reference if all is trained.

    TRL has all weights on the device, and gradient checkpointing on all layers by default.
    """
    update: dict[str, Any] = {"train.layout": "padded", "train.tokens_per_microbatch": sys.maxsize}
    update |= {"model.streaming": False, "train.checkpointing": True, "train.offload_activations": False}
    if config.lora is None and config.loss.uses_reference:
        update["reference.mode"] = "copy"
    return config.but(update)


def trl_policy(config: Config) -> Callable[[PreTrainedModel], Policy]:
    """Return a `make_policy` for `count_step` that gives a policy TRL's head and PEFT's own LoRA layers."""
    supervised = not isinstance(config.loss, SimPO)

    def make(model: PreTrainedModel) -> Policy:
        unfuse_lora(model)
        tiled = config.loss.uses_reference or config.loss.supervised
        head: Any = _Chunked(model) if tiled else FullLogits(model, supervised)
        body = body_of(model)
        return Policy(body, head, RouterLoss.of(model, body))

    return make


class FullLogits(nn.Module):
    """A head that makes the logits of every position."""

    def __init__(self, model: PreTrainedModel, supervised: bool):
        super().__init__()
        self.head, self._supervised = Head(model), supervised

    def forward(self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenLogprobs:
        logits = self.head.logits(hidden)  # [B·T, V], the chosen rows first
        loss = logits.new_zeros(())
        if self._supervised:
            chosen = logits[: len(logits) // 2 - 1].contiguous()
            loss = functional.cross_entropy(chosen, torch.zeros(len(chosen), dtype=torch.int64))
        logps = FusedLogSoftmax.apply(logits[:-1])
        return TokenLogprobs(logps[(positions - 1).clamp(min=0)] + 0 * loss, None, None, None, None)


class FusedLogSoftmax(torch.autograd.Function):
    """A function to one number per row that saves the logits for the backward pass, which makes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:  # [N, V]
        ctx.save_for_backward(logits)
        return logits.new_zeros(len(logits))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.empty_like(*ctx.saved_tensors)


class _Chunked(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.head = Head(model)

    def forward(self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenLogprobs:
        weight = self.head.module.weight
        return TokenLogprobs(_Tiles.apply(hidden[positions], weight), None, None, None, None)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:  # [N, H], [V, H]
        ctx.save_for_backward(hidden, weight)
        _tile(hidden, weight)
        return torch.zeros(len(hidden))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight = ctx.saved_tensors
        sums = [torch.empty(t.shape) if needed else None for t, needed in zip((hidden, weight), ctx.needs_input_grad)]
        tile = _tile(hidden, weight)
        gradients = [None if s is None else s.to(t.dtype) for s, t in zip(sums, (hidden, weight))]
        del tile
        return tuple(gradients)


def _tile(hidden: Tensor, weight: Tensor) -> Tensor:
    tile = hidden.new_empty((min(len(hidden), _TOKENS), _COLUMNS))
    weight[:_COLUMNS].to(hidden.dtype)
    return tile
