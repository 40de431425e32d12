"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of training passes, ±α/√(L·d).

d is the width, and L the number of tokens of a token's sequence, without padding, as in the authors' code; transformers
takes the width of the padded row. A token that several sequences share has one noise, and the longest one's L.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.data.batch import PreferenceBatch
from fastpref.errors import UserError


class EmbeddingNoise:
    """A hook of a model's embeddings, which adds noise to what they return inside `over` in training mode."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.added = 0  # calls of the embeddings that got noise
        self._lengths: Tensor | None = None  # [B, T]

    @contextmanager
    def over(self, batch: PreferenceBatch) -> Iterator[None]:
        """Let the embeddings of a batch have noise inside the block."""
        before, self._lengths = self._lengths, _lengths(batch)
        try:
            yield
        finally:
            self._lengths = before

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._lengths is None or not module.training:
            return output
        if not isinstance(output, Tensor) or output.shape[:2] != self._lengths.shape:
            raise UserError("train.neftune_alpha: this model's embeddings are not those of the row; leave the key out")
        self.added += 1
        most = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * most.to(output.dtype)[..., None]


def _lengths(batch: PreferenceBatch) -> Tensor:
    """Return the tokens of each token's longest sequence, [B, T] float32, and at least 1."""
    if batch.tree is None:
        assert batch.attention_mask is not None
        return batch.attention_mask.sum(1, keepdim=True).clamp(min=1).expand_as(batch.input_ids).float()
    return batch.tree.longest().to(batch.input_ids.device, non_blocking=True)[None]
