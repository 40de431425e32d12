"""sentryward proves kernels free of races between threads, and does not prove them without a barrier that they need."""

import pytest
from ttsem import harness  # pyright: ignore[reportMissingImports]

from tests.truth.launches import every_kernel
from tests.truth.ptx import barriers, stored_once, without_line
from tests.truth.races import compiled_ptx, find_races

ARCHITECTURE, SECONDS = 90, 300


@pytest.fixture(scope="module")
def launches() -> dict[str, harness.LaunchRecord]:
    return every_kernel(ARCHITECTURE)


def test_no_races_are_possible(launches: dict[str, harness.LaunchRecord]) -> None:
    """The kernels whose branches do not depend on data, and that are small enough, are proved race-free."""
    for kernel in ("gradient", "combine"):
        ptx = compiled_ptx(launches[kernel], ARCHITECTURE)
        assert find_races(ptx, launches[kernel], ARCHITECTURE, SECONDS).result == "race_free", kernel


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_missing_barrier_is_found(every: int, launches: dict[str, harness.LaunchRecord]) -> None:
    """Without any one of its barriers (usually, every eighth is tried), the kernel that adds splits may race."""
    ptx = compiled_ptx(launches["combine"], ARCHITECTURE)
    found = barriers(ptx)
    assert len(found) >= 8
    for line in found[::every]:
        finding = find_races(without_line(ptx, line), launches["combine"], ARCHITECTURE, SECONDS)
        assert finding.result == "potential_race", line


PTX = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    and.b32 %r3, %r2, 112;
    mov.b32 %r4, memory;
    add.s32 %r5, %r4, %r3;
    ld.shared.b32 %r6, [%r5];
    shfl.sync.bfly.b32 %r7, %r6, 2, 31, -1;
    max.f32 %r8, %r6, %r7;
    shfl.sync.bfly.b32 %r9, %r8, 1, 31, -1;
    {operation}.f32 %r10, %r8, %r9;
    st.shared::cta.b32 [ {address} + 0 ], %r10;
"""


@pytest.mark.parametrize(
    ("operation", "address", "merged"),
    [
        pytest.param("max", "%r5", 1, id="four lanes store one value at one address"),
        pytest.param("sub", "%r5", 0, id="their values differ"),
        pytest.param("max", "%r2", 0, id="their addresses differ"),
    ],
)
def test_only_equal_stores_are_merged(operation: str, address: str, merged: int) -> None:
    """Stores of several lanes become one only if their values and addresses are equal."""
    ptx = PTX.format(operation=operation, address=address)
    once, changed = stored_once(ptx, threads=32)
    assert changed == merged
    assert once.count("@%once") == merged
    assert (once.strip() != ptx.strip()) == bool(merged)
