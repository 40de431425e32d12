"""The model of the time of streaming: its formulas by hand, and the cards it knows."""

import pytest
import torch
from torch import nn

from fastpref.model.streaming.layers import StreamedLayer, frozen_weights
from fastpref.model.streaming.pace import CARDS, LINKS, Card, LayerSize, card_named, layer_size, least_tokens, slowdown

CARD = Card("a card", tflops=10.0, gib=4, link="3.0 x16")  # 12.5 GB/s
SIZE = LayerSize(bytes=1_250_000, weights=1e6)  # which takes 0.1 ms to copy


def test_a_copy_hides_behind_as_long_a_forward_pass() -> None:
    """0.1 ms are 5e8 operations at half of 10 TFLOP/s: 250 tokens of 2e6 operations, or 125 with a reference."""
    assert [least_tokens(SIZE, CARD, forwards=forwards) for forwards in (1, 2)] == [250, 125]
    assert least_tokens(SIZE, CARD, share=1.0) == 500


@pytest.mark.parametrize(
    ("tokens", "forwards", "expected"),
    [
        (250, 1, 1.0),
        (1000, 1, 1.0),
        (125, 2, 1.0),
        (125, 1, (0.1 + 0.1) / (0.05 + 0.1)),  # only the backward pass hides its copy
        (25, 1, (0.1 + 0.1) / (0.01 + 0.02)),
    ],
)
def test_what_streaming_costs(tokens: int, forwards: int, expected: float) -> None:
    assert slowdown(SIZE, CARD, tokens, forwards=forwards) == pytest.approx(expected)


def test_a_layers_size_is_what_its_buffer_takes() -> None:
    """Padding counts, vectors do not; of experts a token is multiplied with those that it is routed to."""
    layer = nn.Sequential(nn.Linear(5, 7), nn.Linear(64, 8))
    layer.experts = nn.Parameter(torch.zeros(4, 3, 10))
    assert layer_size(layer, 2) == LayerSize(256 + 2048 + 512, 35 + 512 + 60)
    streamed = StreamedLayer(list(frozen_weights(layer)), lambda size: torch.empty(size, dtype=torch.uint8))
    assert layer_size(layer).bytes == streamed.nbytes


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", "RTX 3050 Laptop"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI300X", None),
    ],
)
def test_cards_are_known_by_their_name(name: str, card: str | None) -> None:
    """A variant of a card has other figures, so it is unknown."""
    found = card_named(name)
    assert (found and found.name) == card


def test_figures_are_plausible() -> None:
    """Every card has a known link, and twice the lanes or a generation more carry twice as much."""
    assert all(card.link in LINKS for card in CARDS)
    for generation in ("3.0", "4.0", "5.0"):
        assert LINKS[f"{generation} x16"] == pytest.approx(2 * LINKS[f"{generation} x8"], rel=0.01)
    assert LINKS["5.0 x16"] == 2 * LINKS["4.0 x16"] == 4 * LINKS["3.0 x16"]
