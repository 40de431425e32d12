"""The model of the head's time moves with its inputs as its page says."""

from dataclasses import replace

import pytest

from bench.roofline import CARDS, HEADS, PASSES, PYTHON, ROWS, Epilogue, Epilogues, bare_products, seconds
from fastpref.kernels.tiles import Tile

H100 = next(card for card in CARDS if card.name == "H100")
LLAMA = HEADS[0]


def kernels(n: int, v: int, instructions: int, *, fused: bool = True) -> Epilogues:
    epilogue = Epilogue(Tile(n, v, 64, 8, 3, fused=fused), instructions)
    return {"forward": epilogue, "exp": epilogue, "gradient": epilogue}


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("n", ROWS)
def test_no_pass_is_faster_than_its_products(n: int, what: str) -> None:
    """On every card and for every head the products alone, at the library's speed, take less."""
    for card in CARDS:
        for head in HEADS:
            time = seconds(card, head, n, kernels(128, 128, 2000), what=what)
            assert time > bare_products(card, head, n, count=PASSES[what])


def test_l2_limits_narrow_tiles() -> None:
    """A tile of 64×128 reads twice as much of L2 as one of 128×256; the library's product does not depend on it."""
    slow = replace(H100, l2_tbytes=H100.l2_tbytes / 2)

    def loss(tile: Epilogues) -> float:
        return seconds(slow, LLAMA, 8192, tile, what="reference") / seconds(H100, LLAMA, 8192, tile, what="reference")

    assert loss(kernels(64, 128, 1000)) > loss(kernels(128, 256, 4000)) > 1
    assert loss(kernels(64, 128, 1000, fused=False)) == 1


def test_an_epilogue_costs_its_instructions() -> None:
    """They follow the products, so twice as many take as much longer as they take."""
    times = [seconds(H100, LLAMA, 8192, kernels(128, 256, k), what="training") for k in (0, 3000, 6000)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0])
    assert times[1] > times[0]


def test_python_limits_small_heads() -> None:
    """A head that a GPU computes at once takes the time of its launches on the host."""
    time = seconds(H100, replace(LLAMA, hidden=64, vocab=8192), 16, kernels(128, 256, 0), what="training")
    assert time == pytest.approx(5 * PYTHON)
