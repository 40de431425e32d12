"""Accuracy and memory of real heads on a GPU: `pytest -m gpu` runs them. `python -m bench --profile gpu` times them.

Memory is the allocator's peak minus what was allocated before.
"""

import pytest
import torch

from bench.first_card.numerics import DTYPES, LOGGED, check_head, compute, make_head
from bench.first_card.sizes import GPU
from fastpref.ops import OUTPUTS

pytestmark = pytest.mark.gpu
ROWS = 4096  # scored tokens
MIB = 2**20
SHAPES = {shape.model: shape for shape in GPU.heads}


@pytest.mark.parametrize("outputs", [(), LOGGED, OUTPUTS], ids=["plain", "logged", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_real_heads(shape: str, trained: bool, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
    """Values are right up to float32 rounding, gradients up to that of their dtype, and both repeat bit for bit."""
    head = make_head(SHAPES[shape], ROWS, dtype, "cuda", trained=trained, biased=outputs == OUTPUTS)
    outcome = check_head(head, outputs)
    assert outcome.right, outcome


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory(shape: str, trained: bool) -> None:
    """In addition to the workspace, a step takes a few tensors of hidden's size, and a trained head's own gradient."""
    head = make_head(SHAPES[shape], ROWS, torch.bfloat16, "cuda", trained=trained)
    compute(head)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute(head)
    torch.cuda.synchronize()
    own = head.weight.nbytes if trained else 0
    slices = 4 * 8192 * head.weight.shape[1] if trained else 0  # a slice of the weight's gradient in float32
    assert torch.cuda.max_memory_allocated() - before <= 128 * MIB + own + slices + 6 * head.hidden.nbytes
