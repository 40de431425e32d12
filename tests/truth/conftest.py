"""Every launch of a Triton kernel in this folder is compiled to TTIR and executed by ttsem, on tensors of the CPU.

A load or store outside its tensor, two programs that touch the same element, and an undefined operation fail the test
with the line of the kernel. New memory is full of NaN, so that a value read before it is written shows in the results.
"""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.kernels.test_linear_logprob_triton", "tests.kernels.test_preference_loss_triton")

ARCHITECTURE = 90  # TTIR does not depend on it


@pytest.fixture(scope="session", autouse=True)
def executed() -> Iterator[Any]:
    from tests.truth.execution import executed_launches

    with executed_launches(ARCHITECTURE) as session:
        yield session
    assert session.races_unchecked == 0, "launches that are too large for the search for races: make them smaller"
