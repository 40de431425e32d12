"""Each stage of a kernel's compilation for a GPU, executed by ttsem, computes the same."""

import re
from functools import lru_cache

import pytest
import torch
from ttsem import harness, minimize, validate  # pyright: ignore[reportMissingImports]

from tests.truth.launches import KERNELS, every_kernel

USUAL = {86: "walk, exp", 90: "walk, gradient", 100: "walk, forward", 120: "walk, exp"}
launches = lru_cache(maxsize=1)(every_kernel)


def _cases() -> list:
    every = [
        (architecture, kernel, dtype)
        for architecture in USUAL
        for dtype in ("bfloat16", "float32")
        for kernel in KERNELS
    ]
    return [
        pytest.param(*case, marks=() if (USUAL[case[0]], "bfloat16") == case[1:] else pytest.mark.slow)
        for case in every
    ]


@pytest.mark.parametrize(("architecture", "kernel", "dtype"), _cases())
def test_stages_agree(architecture: int, kernel: str, dtype: str) -> None:
    """From TTIR to the last stage before LLVM, no pass changes a result or reads what the stage before does not."""
    launch = launches(architecture, getattr(torch, dtype))[kernel]
    stages = distinct(validate.split_dump(harness.dump_for_launch(launch, harness.target_for("cpu", architecture))))
    *passes, last = validate.validate_stages(launch, stages).passes
    assert last.message == "past lowering"
    assert len(passes) > 10
    wrong = [(stage.pass_name, stage.message) for stage in passes if stage.verdict not in ("match", "approx")]
    assert wrong == []
    assert [stage.pass_name for stage in passes if stage.extra_reads] == []


def distinct(stages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out stages that are equal to the one before, because a pass had nothing to do."""
    texts = [minimize.strip_locs(text) for _, text in stages]
    return [(name, readable(text)) for i, (name, text) in enumerate(stages) if not i or texts[i] != texts[i - 1]]


def readable(text: str) -> str:
    """Write the names of functions without dots: ttsem cannot read one that ends in a number, as in `…_c0.0`."""
    return re.sub(r'@"[^"]+"|@[\w.$]+|sym_name = "[^"]+"', lambda name: name[0].replace(".", "_"), text)
