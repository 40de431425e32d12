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


@pytest.mark.parametrize(
    "which", [slice(1, 4, 2), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_missing_barrier_is_found(which: slice, launches: dict[str, harness.LaunchRecord]) -> None:
    """Without a barrier that it needs, the kernel that adds splits may race.

    It needs at least two thirds of them: one of four in a reduction is proved to be needless.
    """
    ptx, threads = compiled_ptx(launches["combine"], ARCHITECTURE), 128
    once, _ = stored_once(ptx, threads)
    found = barriers(once)
    results = [
        find_races(without_line(once, line), launches["combine"], ARCHITECTURE, SECONDS).result for line in found[which]
    ]
    assert set(results) <= {"potential_race", "race_free"}
    assert results.count("potential_race") >= (2 if which.start else 2 * len(found) // 3)


PTX = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    and.b32 %r3, %r2, 112;
    mov.b32 %r4, memory;
    add.s32 %r5, %r4, %r3;
    ld.shared.b32 %r6, [%r2];
    shfl.sync.bfly.b32 %r7, %r6, 2, 31, -1;
    {operation}.f32 %r8, %r6, %r7;
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
