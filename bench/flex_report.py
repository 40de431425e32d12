"""Compile FlexAttention for every card and the heads of well-known models, without a card, and report the results.

    python -m bench.flex_report docs/attention.md

Inductor lowers the calls that the model's layers make, forward and backward, and Triton compiles its kernels for the
card. So shared memory, registers, spills and tensor-core instructions are those that the card would see. The command
fails if a kernel does not fit a card or misses its tensor cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from bench.absent_gpu import device
from bench.absent_gpu.card import CARDS, Card
from bench.markdown import filled

ROOT = Path(__file__).parent.parent
PASSES = ("forward", "backward")
ARCHITECTURES = tuple(architecture for architecture in CARDS if architecture >= 80)  # older ones get SDPA


@dataclass(frozen=True)
class Shape:
    """The properties of a layer that decide its kernels."""

    models: str
    heads: int
    kv_heads: int
    width: int
    softcap: float | None = None
    dtype: str = "bfloat16"


SHAPES = (
    Shape("Llama-3-8B, Qwen3-8B", 32, 8, 128),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("Qwen2.5-0.5B", 14, 2, 64),
    Shape("Gemma-2-2B", 8, 4, 256, 50.0),
    Shape("Gemma-3-1B", 4, 1, 256),
    Shape("Phi-3-mini", 32, 32, 96),
    Shape("SmolLM2-135M", 9, 3, 64),
    Shape("Llama-3-8B, Qwen3-8B", 32, 8, 128, dtype="float16"),
    Shape("Llama-3-8B, Qwen3-8B", 32, 8, 128, dtype="float32"),
    Shape("Gemma-3-1B", 4, 1, 256, dtype="float32"),
    Shape("SmolLM2-135M", 9, 3, 64, dtype="float32"),
)


@dataclass(frozen=True)
class Figures:
    """The compiler's results for a kernel."""

    shared: int  # bytes of shared memory
    registers: int
    spills: int  # bytes of local memory a thread
    products: int  # tensor-core instructions
    warps: int
    stages: int


@dataclass(frozen=True)
class Result:
    """A shape, compiled for a card."""

    card: Card
    shape: Shape
    fault: str | None  # why nothing was compiled
    kernels: dict[str, Figures]  # by PASSES

    def faults(self) -> list[str]:
        """List the reasons why the card could not compute the shape as it should."""
        if self.fault is not None:
            return [self.fault]
        reasons = []
        for name in PASSES:
            figures = self.kernels.get(name)
            if figures is None:
                reasons.append(f"{name}: there is no kernel")
                continue
            if figures.shared > self.card.limit:
                reasons.append(f"{name}: {figures.shared} bytes of shared memory, the card has {self.card.limit}")
            if not figures.products:
                reasons.append(f"{name}: no tensor-core instruction")
        return reasons


def compile_shapes(card: Card, shapes: Sequence[Shape], library: Path) -> Iterator[Result]:
    """Yield the results of a card. `library` is that of `absent_gpu.device.build`. Raises RuntimeError if none come."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = json.dumps([asdict(shape) for shape in shapes])
    command = [sys.executable, "-m", "bench.flex_worker", str(library), str(card.architecture), given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(shapes):
        raise RuntimeError(f"sm_{card.architecture}: {done.stderr[-3000:]}")
    for shape, line in zip(shapes, map(json.loads, lines), strict=True):
        yield Result(card, shape, line["fault"], {name: Figures(**found) for name, found in line["kernels"].items()})


def compile_all(architectures: Sequence[int] = ARCHITECTURES, shapes: Sequence[Shape] = SHAPES) -> list[Result]:
    """Return the results of all cards, each compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        library = device.build(Path(folder))
        cards = [CARDS[architecture] for architecture in architectures]
        found = pool.map(lambda card: list(compile_shapes(card, shapes, library)), cards)
        return [result for results in found for result in results]


def page(results: Sequence[Result]) -> str:
    """Return the Markdown page."""
    parts = [
        "# FlexAttention, compiled",
        "Written by `python -m bench.flex_report docs/attention.md` with torch "
        f"{version('torch').partition('+')[0]} and Triton {version('triton')}; no card was used. Inductor lowers the "
        "calls that a model's layers make, and Triton compiles its kernels for the card. Each kernel fits the shared "
        "memory of its card and multiplies on tensor cores: the command fails otherwise.",
        "Tiles are torch's own, except where these do not fit or spill thousands of bytes: for heads of more than 128 "
        "dimensions on cards with less than 200 KiB of shared memory a block, and for float32, which torch would "
        "multiply without tensor cores. GPUs of compute capability below 8.0, heads of more than 512 dimensions (256 "
        "in float32) and of less than 16 get SDPA, and a run says so when it starts.",
        _table(results),
    ]
    return filled("\n\n".join(parts) + "\n")


def _table(results: Sequence[Result]) -> str:
    lines = [
        "| card | models | heads, of keys, width | dtype | pass | shared KiB (limit) | registers | spilled bytes | "
        "tensor-core instructions | warps, stages |",
        "|---" * 10 + "|",
    ]
    for result in results:
        card, shape = result.card, result.shape
        for name, found in result.kernels.items():
            lines.append(
                f"| sm_{card.architecture} | {shape.models} | {shape.heads}, {shape.kv_heads}, {shape.width} | "
                f"{shape.dtype} | {name} | {found.shared / 1024:.0f} ({card.block}) | {found.registers} | "
                f"{found.spills} | {found.products} | {found.warps}, {found.stages} |"
            )
    return "\n".join(lines)


def main() -> None:
    if (why := device.obstacle()) is not None:
        raise SystemExit(f"flex_report: {why}")
    results = compile_all()
    wrong = [f"sm_{r.card.architecture}, {r.shape}: {'; '.join(r.faults())}" for r in results if r.faults()]
    if wrong:
        raise SystemExit("\n".join(wrong))
    Path(sys.argv[1]).write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
