"""The benchmarks: every method is right, results record what was measured, and regressions are found."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.engines import ENGINES
from bench.losses import FUSED, LOSSES, TORCH, LossCase, count, losses_table, measure_loss
from bench.measure import BARE, Case, Row, errors, measure, peak_bytes
from bench.methods import METHODS, Method, by_tokens, full_logits
from bench.objectives import DPO, OBJECTIVES, TOKENS, Objective
from bench.plots import COLOURS
from bench.problems import IGNORED, Problem, Shape, make_problem
from bench.profiles import PROFILES
from bench.results import against, changes, head_record, markdown, ratios, spread
from bench.revision import Revision
from bench.scaling import growth, variations
from bench.step_data import StepShape, as_text, count_tokens, make_rows
from tests.support.paths import QUICKSTART_MODEL, ROOT

SHAPE = Shape("small", hidden=24, vocab=301, pairs=2, length=17, prompt=6)
EAGER = [  # the others compile
    method for method in METHODS if method.name not in ("Liger", "cut-cross-entropy") and method.installed
]


def case(objective: Objective = TOKENS, passes: str = "frozen", softcap: float | None = None) -> Case:
    shape = Shape("small", 24, 301, softcap, pairs=2, length=17, prompt=6)
    return Case(shape, objective, passes, torch.float32, "cpu")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("passes", ["forward", "frozen", "trained"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_every_way_computes_the_same_loss_and_gradients(
    objective: Objective, passes: str, softcap: float | None
) -> None:
    rows = [Row(method.name) for method in EAGER]
    errors(rows, EAGER, case(objective, passes, softcap))
    assert {row.method: row.note for row in rows if row.note and row.note != "no softcap"} == {}
    assert rows[0].method == "fastpref"
    assert rows[0].value_error is not None


def test_a_wrong_way_is_called_wrong_and_is_no_rival() -> None:
    def biased(problem: Problem, hidden: torch.Tensor) -> torch.Tensor:
        return full_logits(problem, hidden) * 1.01

    ways = [*(way for way in EAGER if way.name in ("fastpref", "all logits")), Method("biased", by_tokens(biased))]
    record = head_record(case(), measure(case(), 2, ways))
    note = next(row["note"] for row in record["rows"] if row["method"] == "biased")
    assert note.startswith("wrong: ")
    best = against(record)
    assert best is not None
    assert "biased" not in best
    assert "wrong: " in markdown(result(record))


def test_unsloths_head_is_loaded_without_its_package(tmp_path: Path) -> None:
    """Importing unsloth_zoo needs a GPU; its module of preference losses is loaded without running the package."""
    losses = tmp_path / "unsloth_zoo" / "fused_losses"
    losses.mkdir(parents=True)
    (losses.parent / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    (losses / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    (losses / "softmax.py").write_text("ANSWER = 42\n")
    module = "from unsloth_zoo.fused_losses.softmax import ANSWER\ndef fused_linear_token_logps(): return ANSWER\n"
    (losses / "preference_loss.py").write_text(module)
    code = "from bench.unsloth import token_logps; print(token_logps()())"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert found.stdout.split() == [b"42"], found.stderr


def test_out_of_memory_and_missing_packages_have_a_row() -> None:
    def hungry(problem: Problem, objective: Objective) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    ways = [Method("hungry", hungry), Method("absent", hungry, package="no_such_package")]
    rows = measure(case(), 1, ways, check=False)
    assert [(row.method, row.note, bool(row.ms)) for row in rows] == [
        (BARE, "", True),
        ("hungry", "out of memory", False),
        ("absent", "not installed", False),
    ]


def test_memory_is_the_most_held_at_once() -> None:
    def step() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.cat([second, second])

    assert peak_bytes(step, "cpu") in range(12_000, 12_600)  # 4,000 and 8,000 bytes, aligned


def test_only_completions_are_scored_and_weighed() -> None:
    problem = make_problem(SHAPE, torch.float32, "cpu")
    assert problem.scored.sum() == SHAPE.scored == 4 * 11
    assert (problem.labels[:, :6] == IGNORED).all()
    assert (problem.token_weights[:, :6] == 0).all()
    assert problem.token_weights.min() < 0 < problem.token_weights.max()


@pytest.mark.parametrize(("power", "sizes"), [(1.0, (1, 2, 4)), (2.0, (3, 9, 27)), (0.0, (5, 10))])
def test_growth_is_the_exponent(power: float, sizes: tuple[int, ...]) -> None:
    points = [{"size": n, "ms": 7.0 * n**power, "bytes": round(1000 * n**power)} for n in sizes]
    assert growth(points, "ms") == pytest.approx(power, abs=1e-9)
    assert growth(points, "bytes") == pytest.approx(power, abs=1e-3)


def test_a_sweep_changes_one_number() -> None:
    for name, _, shapes in variations(SHAPE, (1, 2)):
        (small, first), (large, second) = shapes
        assert large == 2 * small or name == "prompt share"
        fields = ("hidden", "vocab", "pairs", "length", "prompt")
        different = [field for field in fields if getattr(first, field) != getattr(second, field)]
        expected = {"sequence length": ["length", "prompt"], "vocabulary": ["vocab"], "rows": ["pairs"]}
        assert different == expected.get(name, ["prompt"])


def test_rows_have_the_prompt_share_asked_for() -> None:
    shape = StepShape(hidden=8, layers=1, vocab=100, length=200, prompt_share=0.75, batch=2, rows=40)
    words = [[len(row[side][0]["content"].split()) for row in make_rows(shape)] for side in ("prompt", "chosen")]
    assert sum(words[0]) / 40 == pytest.approx(150, rel=0.1)
    assert sum(words[1]) / 40 == pytest.approx(50, rel=0.1)


def test_rows_as_text_are_the_tokens_of_the_chat() -> None:
    """The prompt is what the template writes, and a completion has no end, which every engine adds."""
    shape = StepShape(hidden=8, layers=1, vocab=100, length=20, prompt_share=0.5, batch=1, rows=1)
    texts = as_text(str(QUICKSTART_MODEL), make_rows(shape))
    assert texts[0]["prompt"].startswith("<|im_start|>user\n")
    assert texts[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert texts[0]["chosen"] == make_rows(shape)[0]["chosen"][0]["content"]
    prompts, all_tokens = count_tokens(str(QUICKSTART_MODEL), texts)
    assert 0 < prompts < all_tokens


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_counted_without_a_gpu(name: str) -> None:
    """The fused loss is one launch and few operations; on a CPU only torch is timed, and a note says so."""
    record = measure_loss(LossCase(name, pairs=2, length=3, device="cpu"), repeats=1)
    plain, fused = record["rows"]
    assert (plain["method"], len(plain["ms"]), plain["note"]) == (TORCH, 1, "")
    assert (fused["method"], fused["ms"], fused["note"]) == (FUSED, [], "needs a GPU")
    assert 0 < fused["operations"] < plain["operations"] / 2
    assert plain["grad_error"] < 1e-4
    assert len(losses_table([record])) == 6


def test_counting_a_loss_leaves_real_tensors_behind() -> None:
    """After a loss was counted on fake tensors, it still computes its value on real ones."""
    case = LossCase("simpo", pairs=2, length=3, device="cpu")
    count(case, FUSED)
    expected, found = case.step(TORCH)(), case.step(FUSED)()
    torch.testing.assert_close(found, expected)


def test_cases_are_matched_by_words() -> None:
    tiny = PROFILES["tiny"]
    assert [case.name for case in tiny.cases(["orpo"])] == ["SmolLM2-135M orpo frozen"]
    assert len(tiny.cases()) == 2
    assert tiny.cases(["orpo", "trained"]) == []


# --- results ----------------------------------------------------------------------------------------------------------


def record(ours: list[float], bare: list[float], size: int = 2**20) -> dict[str, Any]:
    rows = [Row(BARE, bare, 0), Row("fastpref", ours, size, 1e-8, 1e-8), Row("all logits", [9.0] * len(bare), 4 * size)]
    return head_record(case(DPO), rows)


def result(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "head": list(records), "scaling": [], "steps": [], "command": "python -m bench", "date": "2026-01-01",
        "seconds": 60, "rule": "A rule.",
        "machine": {"processor": "A", "device": "cpu", "threads": 2, "python": "3", "versions": {}, "commit": "c"},
    }  # fmt: skip


def test_time_is_a_ratio_of_the_same_turn() -> None:
    slow_second = record(ours=[2.0, 20.0, 2.2], bare=[1.0, 10.0, 1.0])
    assert ratios(slow_second, "fastpref") == [2.0, 2.0, 2.2]
    assert spread([2.0, 2.0, 2.2]) == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("ours", "size", "regressed"),
    [
        ([2.0, 2.1, 1.9], 2**20, []),
        ([2.6, 2.6, 2.6], 2**20, ["× bare"]),
        ([2.6, 1.2, 4.0], 2**20, []),  # the spread is larger than the change
        ([2.0, 2.0, 2.0], 2**21, ["MiB"]),
    ],
)
def test_a_regression_is_growth_beyond_threshold_and_spread(ours: list[float], size: int, regressed: list[str]) -> None:
    before, after = result(record([2.0, 2.0, 2.1], [1.0] * 3)), result(record(ours, [1.0] * 3, size))
    assert [change.unit for change in changes(before, after) if change.regressed(0.15)] == regressed


def test_other_sizes_are_not_compared() -> None:
    other = copy.deepcopy(record([2.0], [1.0]))
    other["vocab"] += 1
    assert changes(result(record([2.0], [1.0])), result(other)) == []


def test_the_table_says_how_fast_and_how_lean() -> None:
    text = markdown(result(record(ours=[3.0, 3.0], bare=[2.0, 2.0])))
    assert "| all logits | 3.00 × as fast | all logits | 0.25 × its memory |" in text
    assert "1.50 ± 0.00" in text


def test_another_revision_runs_its_own_code() -> None:
    with Revision("HEAD") as other:  # it prints the path of its code at the start
        rows = measure(case(DPO), 1, [], {"other": other.take(case(DPO))}, check=False)
    assert [row.method for row in rows] == [BARE, "other"]
    assert rows[1].ms[0] > 0
    assert rows[1].bytes


def test_a_first_loss_that_is_not_trls_is_marked() -> None:
    """Speeds are compared turn by turn, an engine that did other work is marked, and one that did not run says why."""
    numbers = {"tokens_per_second": 9.0, "peak": 2e6}
    engines = [
        {"engine": "trl", "speeds": [1.0, 2.0], "pairs_per_second": 1.5, "loss": 0.6931} | numbers,
        {"engine": "trl-liger", "note": "needs a GPU"},
        {"engine": "fastpref", "speeds": [2.0, 5.0], "pairs_per_second": 3.5, "loss": 0.7} | numbers,
    ]
    text = markdown(result() | {"steps": [{"what": "a, b, c", "method": "dpo", "engines": engines}]})
    assert "| dpo | fastpref | 3.500 | 2.25 ± 0.15 | 9 | 2 MB | 1.00 | 0.7000 (not TRL's) |" in text
    assert "| dpo | TRL with Liger | needs a GPU |" in text
    assert "- Unsloth: " in text


def test_a_method_has_one_colour_in_all_plots() -> None:
    """Every method and every trainer has a colour, and no two of one plot have the same."""
    methods, trainers = [method.name for method in METHODS], list(ENGINES.values())
    for names in (methods, trainers):
        assert len({COLOURS[name] for name in names}) == len(names)
    assert COLOURS["fastpref"] not in {COLOURS[name] for name in [*methods, *trainers] if name != "fastpref"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_compare_fails_on_a_regression(tmp_path: Path) -> None:
    for name, ours in (("a", 2.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(result(record([ours] * 3, [1.0] * 3))))
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.exit_code == 1
    assert "regressed" in found.stdout
    assert CliRunner().invoke(app, ["compare", str(tmp_path / "b"), str(tmp_path / "a")]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "--profile huge: known are tiny, quick, full, gpu-quick, gpu, prefixes"),
        (["--only", "steps", "--only", "tea"], "--only tea: known are head, losses, scaling, steps"),
        (["--profile", "tiny", "--base", "no-such-revision"], "--base no-such-revision: "),
        (["compare", "nowhere", "nowhere"], "not a result of python -m bench"),
    ],
)
def test_mistakes_are_said_in_one_message(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
