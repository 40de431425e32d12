"""FlexAttention, compiled for GPUs that are not there, fits them and multiplies on tensor cores."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from bench import flex_report
from bench.absent_gpu import device
from bench.absent_gpu.card import CARDS
from bench.flex_report import PASSES, SHAPES, Figures, Result, Shape, compile_shapes
from tests.support.paths import DOCS, ROOT

WHY = device.obstacle()
absent = pytest.mark.skipif(WHY is not None, reason=f"no GPU can be pretended: {WHY}")
GEMMA_2 = next(shape for shape in SHAPES if "Gemma-2" in shape.models)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device.build(tmp_path_factory.mktemp("device"))


def compiled(architecture: int, shapes: Sequence[Shape], library: Path) -> list[Result]:
    return list(compile_shapes(CARDS[architecture], shapes, library))


@absent
def test_wide_heads_with_a_softcap_fit_a_consumer_card(library: Path):
    """Gemma 2's heads, which do not fit an RTX 4090 with torch's own tiles, do with ours, with gradients; heads that no
    tiles fit are refused by name, and nothing is compiled for them."""
    fits, wide, narrow = compiled(89, [GEMMA_2, replace(GEMMA_2, width=576), replace(GEMMA_2, width=8)], library)
    assert fits.faults() == []
    assert tuple(fits.kernels) == PASSES
    assert all(figures.spills < 1000 for figures in fits.kernels.values())
    assert wide.faults() == ["its heads have at most 512 dimensions in bfloat16, and this model's 576"]
    assert narrow.faults() == ["its heads have at least 16 dimensions, and this model's 8"]
    assert wide.kernels == narrow.kernels == {}


@absent
@pytest.mark.slow
def test_the_widest_heads_fit(library: Path):
    """Heads between those of well-known models, and the widest that are not refused, fit every size of shared memory,
    and every card compiles some of them."""
    widths = {80: (192, 512), 90: (192, 512), 86: (192,), 120: (512,)}  # RTX 4090: the test above
    shared = {CARDS[architecture].block: set[int]() for architecture in flex_report.ARCHITECTURES}
    for architecture, some in widths.items():
        for result in compiled(architecture, [replace(GEMMA_2, width=width) for width in some], library):
            assert result.faults() == []
        shared[CARDS[architecture].block].update(some)
    assert {89, *widths} == set(flex_report.ARCHITECTURES)
    assert all(some == {192, 512} for some in shared.values())


@absent
@pytest.mark.slow
def test_the_page_is_up_to_date(tmp_path: Path):
    """Every shape fits every card and uses tensor cores, as docs/attention.md says."""
    written, page = tmp_path / "attention.md", (DOCS / "attention.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "bench.flex_report", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    versions = f"torch {torch.__version__.partition('+')[0]} and Triton {triton.__version__};"
    if versions in page:  # another compiler has other registers
        assert written.read_text(encoding="utf-8") == page


FITS = Figures(shared=98_304, registers=255, spills=8, products=256, warps=4, stages=2)
RESULTS = {
    "nothing": ({}, None, []),
    "an error": ({}, "RuntimeError: dense", ["RuntimeError: dense"]),
    "no backward pass": ({"backward": None}, None, ["backward: there is no kernel"]),
    "shared memory": (
        {"forward": replace(FITS, shared=101_377)}, None,
        ["forward: 101377 bytes of shared memory, the card has 101376"],
    ),
    "no tensor cores": ({"backward": replace(FITS, products=0)}, None, ["backward: no tensor-core instruction"]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "fault", "expected"), RESULTS.values(), ids=RESULTS)
def test_what_the_gate_refuses(changes: dict[str, Figures | None], fault: str | None, expected: list[str]):
    """A kernel that is missing, too large or without tensor cores fails the gate, and so does what is not compiled."""
    kernels = {name: figures for name in PASSES if (figures := changes.get(name, FITS)) is not None}
    assert Result(CARDS[89], GEMMA_2, fault, kernels).faults() == expected
