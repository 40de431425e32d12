"""Check what every kernel compiles to on every card, and write it as a page, without a card.

    python -m bench.compile_report docs/kernels.md

`compiled.py` compiles them, and `roofline.py` has the page's model of the head's time.
"""

import os
import sys
from itertools import groupby
from pathlib import Path

import triton

from bench import roofline
from bench.compiled import SHARED_LIMIT, Compiled, compile_all, variants
from bench.markdown import filled

# Bytes a thread that may be spilled: by an epilogue, where their loads and stores are some percent of its instructions,
# and by a kernel that has none.
EPILOGUE_LIMIT, OTHER_LIMIT = 512, 16


def faults(c: Compiled) -> list[str]:
    """List the reasons why a kernel does not fit its card.

    On all cards it may not need too much shared memory, and a kernel that multiplies needs tensor cores. The rest holds
    for NVIDIA cards; spills on AMD cards are in the table. There a loop that multiplies may not spill, and all else
    little. Matrices move 16 bytes at a time.
    """
    v, limit = c.variant, SHARED_LIMIT[c.variant.architecture]
    reasons = []
    if c.shared > limit * 1024:
        reasons.append(f"{c.shared} bytes of shared memory, the card has {limit} KiB")
    if v.multiplies and not c.products and not (v.architecture == "gfx1100" and v.dtype == "fp32"):  # it has none
        reasons.append("no tensor-core instruction")
    if isinstance(v.architecture, str):
        return reasons
    if v.multiplies and not c.copies:
        reasons.append("no asynchronous copy")
    if c.spills_inside:
        reasons.append(f"{c.spills_inside} bytes spilled in the loop that multiplies")
    if c.spills > (OTHER_LIMIT if v.tile is None else EPILOGUE_LIMIT):
        reasons.append(f"{c.spills} bytes spilled")
    wide = sum(bits * number for bits, number in c.stores.items() if bits >= 128) // 8
    if wide < v.stored:
        reasons.append(f"{wide} of {v.stored} bytes stored 16 or more at a time")
    copied = v.name in ("rescale", "gradient", "scale")
    if (copied and 16 in c.loads) or ((copied or v.reads_product) and max(c.loads) < 128):
        reasons.append(f"loads of {min(c.loads)} to {max(c.loads)} bits")
    return reasons


def page(compiled: list[Compiled]) -> str:
    """Return the Markdown page."""
    parts = [
        "# Kernels, compiled",
        "Written by `python -m bench.compile_report docs/kernels.md` with Triton "
        f"{triton.__version__}; no card was used. The command fails unless all kernels fit the card's shared memory, "
        "every one that multiplies does so on tensor cores and, on NVIDIA cards, with asynchronous copies and without "
        f"spilling a register in the loop that multiplies. Outside that loop a thread spills at most {EPILOGUE_LIMIT} "
        f"bytes, in other kernels {OTHER_LIMIT}, and matrices are loaded and stored 16 bytes at a time. This holds for "
        "hidden sizes that are multiples of 16.",
        "## The main loop",
        "`_walk_kernel` in all its modes: without a bias, a softcap and optional outputs, with one of these, and with "
        "all. *Inside* are bytes that a thread spills in the loop that multiplies, *outside* those in the epilogue, "
        "once a tile. *Instructions* are those outside that loop. A product's shape is that of one instruction. On "
        "Turing the library multiplies, and the kernel is the epilogue alone.",
        _walk_table([c for c in compiled if c.variant.tile is not None]),
        "## The other kernels",
        "Registers a thread; bytes spilled in brackets, if any.",
        _helper_table([c for c in compiled if c.variant.tile is None]),
        roofline.section(compiled),
    ]
    return filled("\n\n".join(parts) + "\n")


def _card(architecture: int | str) -> str:
    return architecture if isinstance(architecture, str) else f"sm_{architecture}"


def _walk_table(compiled: list[Compiled]) -> str:
    columns = (
        "card", "dtype", "mode", "epilogue", "tile N×V×H, warps, stages", "registers", "spilled bytes inside",
        "outside", "shared KiB (limit)", "products", "shape", "asynchronous copies", "instructions",
        "stores of a thread, bits",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for c in compiled:
        v, t = c.variant, c.variant.tile
        assert t is not None
        nvidia = isinstance(v.architecture, int)
        cells = (
            _card(v.architecture), v.dtype, v.name.removeprefix("walk, "), v.what,
            f"{t.n}×{t.v}×{t.h}, {t.warps}, {t.stages}" if t.fused else f"{t.n}×{t.v}, {t.warps}",
            c.registers, c.spills_inside if nvidia else "", max(c.spills - c.spills_inside, 0),
            f"{c.shared / 1024:.0f} ({SHARED_LIMIT[v.architecture]})", c.products, ", ".join(c.shapes),
            c.copies if nvidia else "", c.instructions if nvidia else "",
            ", ".join(f"{number} of {bits}" for bits, number in c.stores.items()),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _helper_table(compiled: list[Compiled]) -> str:
    cards = list(dict.fromkeys(c.variant.architecture for c in compiled))
    lines = [
        "| kernel | configuration | elements | " + " | ".join(map(_card, cards)) + " |",
        "|---|---|---|" + "---|" * len(cards),
    ]

    def row(c: Compiled) -> tuple[str, str, str]:
        dtype = c.variant.dtype
        return c.variant.name, c.variant.what, "32 bits" if dtype == "fp32" else "16 bits"

    for (name, what, dtype), group in groupby(sorted(compiled, key=row), key=row):
        cells = {c.variant.architecture: f"{c.registers}" + (f" ({c.spills})" if c.spills else "") for c in group}
        lines.append(f"| {name} | {what} | {dtype} | " + " | ".join(cells[card] for card in cards) + " |")
    return "\n".join(lines)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_report: unset TRITON_INTERPRET, which replaces the kernels by an interpreter")
    compiled = compile_all(list(variants()))
    wrong = [f"{c.variant}: {', '.join(faults(c))}" for c in compiled if faults(c)]
    if wrong:
        raise SystemExit("\n".join(wrong))
    Path(sys.argv[1]).write_text(page(compiled), encoding="utf-8")


if __name__ == "__main__":
    main()
