"""The inputs of the head benchmarks: shapes of real models, and random tensors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100  # the label of positions that are not scored


@dataclass(frozen=True)
class Shape:
    """The shape of a model's head and of a step's tokens."""

    model: str
    hidden: int  # H
    vocab: int  # V
    softcap: float | None = None
    pairs: int = 1  # P
    length: int = 512  # T, tokens of a padded sequence
    prompt: int = 256  # prompt tokens among them, which are not scored

    @property
    def positions(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def scored(self) -> int:
        return 2 * self.pairs * (self.length - self.prompt)


SHAPES = (
    Shape("SmolLM2-135M", 576, 49152),
    Shape("Qwen2.5-0.5B", 896, 151936),
    Shape("Qwen2.5-7B", 3584, 152064),
    Shape("Llama-3.2-1B", 2048, 128256),
    Shape("Llama-3-8B", 4096, 128256),
    Shape("Gemma-2-2B", 2304, 256000, softcap=30.0),
)


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [2P, T, H], requires grad; chosen rows first
    reference_hidden: Tensor  # [2P, T, H], of the reference model, whose head is the same
    weight: Tensor  # [V, H]; requires grad if the head is trained
    labels: Tensor  # [2P, T] int64, IGNORED where nothing is scored
    token_weights: Tensor  # [2P, T] float32, of both signs, 0 where nothing is scored
    softcap: float | None

    @property
    def scored(self) -> Tensor:
        """Return which positions are scored, [2P, T] bool."""
        return self.labels != IGNORED

    def as_float64(self) -> "Problem":
        return replace(
            self,
            hidden=self.hidden.detach().double().requires_grad_(self.hidden.requires_grad),
            reference_hidden=self.reference_hidden.double(),
            weight=self.weight.detach().double().requires_grad_(self.weight.requires_grad),
            token_weights=self.token_weights.double(),
        )


def make_problem(shape: Shape, dtype: torch.dtype, device: str, *, trained: bool = False, seed: int = 0) -> Problem:
    """Make random inputs with logits of order one, as of an untrained head, and a reference close to the policy."""
    generator = torch.Generator(device).manual_seed(seed)  # a host takes minutes for the numbers of a large head
    size = (2 * shape.pairs, shape.length)

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator, device=device)

    hidden = normal(*size, shape.hidden)
    labels = torch.randint(shape.vocab, size, generator=generator, device=device)
    labels[:, : shape.prompt] = IGNORED
    weights = torch.linspace(-1, 1.5, labels.numel(), device=device).view(size) * (labels != IGNORED)
    return Problem(
        hidden=hidden.to(dtype).requires_grad_(),
        reference_hidden=(hidden + 0.02 * normal(*size, shape.hidden)).to(dtype),
        weight=(normal(shape.vocab, shape.hidden) / shape.hidden**0.5).to(dtype).requires_grad_(trained),
        labels=labels,
        token_weights=weights,
        softcap=shape.softcap,
    )
