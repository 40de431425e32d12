"""FlexAttention for the layers of known models, each compiled anew, against SDPA.

A model's first layer that does not compile would otherwise decide what the next one finds in the compiler's caches.
"""

import time
from collections.abc import Iterator

import torch

from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    from fastpref.model.attention import LayerCall

    def call(heads: int, kv: int, width: int, window: int | None = None, cap: float | None = None, sinks: bool = False):
        return LayerCall(heads, kv, width, width, 0.0, width**-0.5, window, cap, sinks)

    layers = {
        "tiny": call(4, 2, 16),
        "Llama 3, Qwen 3": call(32, 8, 128),
        "Qwen 2.5 7B": call(28, 4, 128),
        "SmolLM2": call(9, 3, 64),
        "Phi-3": call(32, 32, 96),
        "gpt-oss, sliding, sinks": call(64, 8, 64, 128, sinks=True),
        "Gemma 2": call(8, 4, 256, cap=50.0),
        "Gemma 2, sliding": call(8, 4, 256, 4096, 50.0),
        "Gemma 3, sliding": call(4, 1, 256, 512),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for name, layer in layers.items():
            if layer.width <= sizes.attention and (name == "tiny") == (sizes.device == "cpu"):
                what = f"{name}, {str(dtype).removeprefix('torch.')}"
                yield what, lambda layer=layer, dtype=dtype: _layer(sizes, layer, dtype)


def _layer(sizes: Sizes, layer: object, dtype: torch.dtype) -> Outcome:
    from fastpref.model.attention_choice import FLEX, why_not

    torch._dynamo.reset()
    began = time.perf_counter()
    why = why_not(FLEX, [layer], dtype, torch.device(sizes.device))  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - began
    if sizes.device == "cpu":
        return Outcome(note=f"left out: {why}")
    if why is not None:
        return Outcome(note=f"SDPA: {why}", right=None if "differs" not in why else False)
    return Outcome({"s to compile and compare": seconds}, right=True)
