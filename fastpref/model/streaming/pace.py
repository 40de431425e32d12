"""A model, not a measurement, of the time that streaming takes: at how many tokens copies hide behind computations.

A layer's forward pass takes 2 operations a weight and token. Its backward pass takes 4 with recomputation: frozen
weights get no gradient. Attention, adapters and the unpacking of 4 bits are left out, so a layer computes for longer
than here, and its copy hides earlier.
"""

import math
from dataclasses import dataclass

from torch import nn

from fastpref.model.streaming.layers import frozen_weights, padded

SHARE = 0.5  # of a card's peak that matrix products reach: assumed

# GB/s from host memory that copies reach in practice, by generation and lanes of PCIe: about four fifths of the limit.
LINKS = {"3.0 x8": 6.2, "3.0 x16": 12.5, "4.0 x8": 12.5, "4.0 x16": 25.0, "5.0 x8": 25.0, "5.0 x16": 50.0}


@dataclass(frozen=True)
class Card:
    """Public figures of a card."""

    name: str
    tflops: float  # dense products of bfloat16 that are summed in float32
    gib: int
    link: str  # of LINKS, with all of its lanes

    @property
    def bytes_per_second(self) -> float:
        return LINKS[self.link] * 1e9


# NVIDIA's white papers and data sheets. Where those give no figure for these products, it is 512 operations a clock of
# each multiprocessor at the boost clock, which are the figures of RTX 3090 and 4090. Laptops' clocks vary by model.
CARDS = (
    Card("RTX 3050 Laptop", 12.3, 4, "4.0 x8"),
    Card("RTX 3060", 25.5, 12, "4.0 x16"),
    Card("RTX 3090", 71.2, 24, "4.0 x16"),
    Card("RTX 4060", 30.2, 8, "4.0 x8"),
    Card("RTX 4070", 58.3, 12, "4.0 x16"),
    Card("RTX 4090", 165.2, 24, "4.0 x16"),
    Card("RTX 5090", 209.5, 32, "5.0 x16"),
    Card("A100", 312.0, 80, "4.0 x16"),
    Card("H100", 989.4, 80, "5.0 x16"),
)


@dataclass(frozen=True)
class LayerSize:
    """The bytes that a layer copies, and the weights that it computes with."""

    bytes: int  # in host memory, with padding
    weights: float  # that a token is multiplied with


def layer_size(layer: nn.Module, experts_per_token: int | None = None) -> LayerSize:
    """Return the size of a layer without adapters, also of a skeleton. Experts lie in one tensor, [experts, ., .]."""
    size, weights = 0, 0.0
    for weight in frozen_weights(layer):
        size += sum(padded(tensor.nbytes) for tensor in weight.tensors())
        shape = getattr(getattr(weight.parameter, "quant_state", None), "shape", weight.parameter.shape)
        chosen = (experts_per_token or shape[0]) / shape[0] if len(shape) == 3 else 1.0
        weights += math.prod(shape) * chosen
    return LayerSize(size, weights)


def card_named(name: str) -> Card | None:
    """Return the card that a device's name contains, such as "NVIDIA GeForce RTX 4090", if it is known here."""
    words, kinds = name.lower().split(), {"ti", "super", "laptop", "d"}
    for card in CARDS:
        own = card.name.lower().split()
        rest = [word for word in words if word not in own]
        if set(own) <= set(words) and not kinds & set(rest):
            return card
    return next((card for card in CARDS[-2:] if any(word.startswith(card.name.lower()) for word in words)), None)


def least_tokens(size: LayerSize, card: Card, *, forwards: int = 1, share: float = SHARE) -> int:
    """Return the least tokens a micro-batch at which the copies of a step hide behind its computations.

    `forwards` is 2 where the reference computes in the same sweep. A single forward pass decides, as the backward pass
    takes twice its operations.
    """
    operations = 2 * size.weights * min(forwards, 2)
    return math.ceil(size.bytes / card.bytes_per_second * card.tflops * 1e12 * share / operations)


def slowdown(size: LayerSize, card: Card, tokens: int, *, forwards: int = 1, share: float = SHARE) -> float:
    """Return the time of a step whose layers are streamed over that of one whose layers are resident: 1 if it hides."""
    product = 2 * size.weights * tokens / (card.tflops * 1e12 * share)
    passes, copy = (forwards * product, 2 * product), size.bytes / card.bytes_per_second
    return sum(max(computes, copy) for computes in passes) / sum(passes)
