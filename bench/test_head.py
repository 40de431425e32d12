"""The head benchmarks under pytest-benchmark, for its statistics, histograms and saved runs.

    pytest bench --benchmark-only --benchmark-group-by=group
    pytest bench --benchmark-only --model Gemma-2-2B -k "fastpref and frozen" --benchmark-autosave

Each method runs all its rounds before the next one starts; on a busy machine `python -m bench`, which takes turns, is
the better comparison.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Case, Row, errors, subject
from bench.methods import METHODS, Method
from bench.objectives import OBJECTIVES, Objective
from bench.profiles import PROFILES

TORCH = next(method for method in METHODS if method.name == "all logits")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("passes", ["forward", "frozen", "trained"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_head(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, method: Method, passes: str, objective: Objective
) -> None:
    profile = PROFILES[str(request.config.getoption("--profile"))]
    case = Case(
        profile.shape(str(request.config.getoption("--model"))), objective, passes, profile.dtype, profile.device
    )
    if not method.installed:
        pytest.skip("not installed")
    rows = [Row(method.name), Row(TORCH.name)]
    errors(rows, [method, TORCH], case)
    if rows[0].value_error is None:
        pytest.skip(rows[0].note)
    assert not rows[0].note, rows[0].note
    benchmark.group = f"{case.shape.model}, {objective.name}, {passes}"
    benchmark.extra_info |= {"value_error": rows[0].value_error, "grad_error": rows[0].grad_error}
    benchmark.pedantic(subject(method, case, case.problem()).step, rounds=profile.repeats, warmup_rounds=1)
