"""Forests, and the arguments that layers give their attention, for tests of the attentions that compute forests."""

from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastpref.data.forest import Forest, encode, lay_apart, lay_out
from fastpref.model.attention import LayerCall


def layout(*trees: tuple[int, tuple[int, ...]]) -> Forest:
    """Return the layout of consecutive trees of a prompt and its completions, each given as (prompt, completions)."""
    sequences, prompts = [], []
    for number, (prompt, completions) in enumerate(trees):
        for k, length in enumerate(completions):
            sequences.append(encode([number] * prompt + [1000 + k] * length))
            prompts.append(prompt)
    return lay_out(sequences, prompts).forest


def random_layout(seed: int) -> Forest:
    """Return a forest from very short to several blocks long, with nested beginnings; every third shares nothing."""
    rng = Random(seed)
    size = rng.choice((9, 60, 300))
    sequences: list[list[int]] = []
    for _ in range(rng.randint(1, 9)):
        source = rng.choice(sequences) if sequences else []
        own = [rng.randrange(1000) for _ in range(rng.randint(1, size))]
        sequences.append(source[: rng.randint(0, len(source))] + own)
    tokens = [encode(ids) for ids in sequences]
    return (lay_apart(tokens) if seed % 3 == 0 else lay_out(tokens, [rng.randint(0, len(s)) for s in sequences])).forest


EDGES = [
    layout((128, (128, 128))),
    layout((64, (64, 128)), (1, (1,))),
    layout((1, (1,))),
    layout((200, (312,))),
    layout((384, (1, 1, 126))),
]
LAYOUTS = EDGES + [random_layout(seed) for seed in range(24)]


CALL = LayerCall(4, 4, 16, 16, 0.0, None, None, None, False)
CALLS = {
    "plain": CALL,
    "grouped heads": replace(CALL, kv_heads=2),
    "three query heads a group": replace(CALL, heads=6, kv_heads=2),
    "scaled": replace(CALL, scaling=0.1),
    "window": replace(CALL, window=9),
    "window of a block": replace(CALL, window=128),
    "softcap": replace(CALL, softcap=3.0),
    "sinks": replace(CALL, sinks=True),
    "narrow values": replace(CALL, value_width=8),
    "everything": LayerCall(6, 2, 16, 16, 0.0, 0.2, 20, 2.0, True),
}


def inputs(call: LayerCall, length: int, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, width: int) -> Tensor:
        return torch.randn(1, length, heads, width, generator=generator).transpose(1, 2)

    made = [random(call.heads, call.width), random(call.kv_heads, call.width), random(call.kv_heads, call.value_width)]
    options: dict[str, Any] = {"sliding_window": call.window, "softcap": call.softcap, "scaling": call.scaling}
    return made, options | {"s_aux": torch.linspace(-2, 2, call.heads) if call.sinks else None}


def count(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted
