"""The sizes of every block."""

from dataclasses import dataclass
from typing import Literal

from bench.problems import SHAPES, Shape


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama with random weights."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    product: int  # rows and columns of the plain matrix products
    copied: int  # bytes of the plain copies
    heads: tuple[Shape, ...]  # whose numbers are checked
    checked_rows: int  # scored tokens of these
    timed: tuple[Shape, ...]  # heads that are timed
    rows: tuple[int, ...]  # numbers of scored tokens that are timed
    repeats: int
    attention: int  # head widths above this are left out
    models: tuple[Llama, ...]  # whose steps are timed
    pairs: int  # of a step
    prompt: int  # tokens
    completion: int  # tokens
    device: Literal["cuda", "cpu"] = "cuda"


_SHAPES = {shape.model: shape for shape in SHAPES}
GPU = Sizes(
    product=8192,
    copied=1 << 30,
    heads=tuple(_SHAPES[model] for model in ("Llama-3-8B", "Gemma-2-2B", "Qwen2.5-7B", "SmolLM2-135M")),
    checked_rows=2048,
    timed=tuple(_SHAPES[model] for model in ("Llama-3-8B", "Gemma-2-2B")),
    rows=(2048, 8192, 32768),
    repeats=10,
    attention=256,
    models=(
        Llama("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256),
        Llama("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
    ),
    pairs=4,
    prompt=512,
    completion=512,
)
TINY = Sizes(
    product=64,
    copied=1 << 16,
    heads=(Shape("tiny", 32, 130), Shape("tiny, softcap", 48, 130, softcap=5.0)),
    checked_rows=70,
    timed=(Shape("tiny", 32, 130),),
    rows=(40,),
    repeats=2,
    attention=32,
    models=(Llama("tiny", 64, 128, 3, 4, 2, 256),),
    pairs=1,
    prompt=6,
    completion=5,
    device="cpu",
)
