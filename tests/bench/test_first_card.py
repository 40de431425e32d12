"""The first minutes on a GPU, as far as a CPU can run them."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.first_card import numerics, parent
from bench.first_card.blocks import BLOCKS
from bench.first_card.numerics import check_head, make_head
from bench.first_card.outcome import LOST, Case, Outcome, Record, begun, read, run_cases
from bench.first_card.sizes import TINY
from bench.first_card.steps import idle, part_of
from bench.first_card.table import summary, table
from fastpref.ops import OUTPUTS

MACHINE = {"device": "cpu", "processor": "a CPU", "versions": {"torch": "2"}, "commit": "c"}


def test_every_block_runs_to_its_end(tmp_path: Path) -> None:
    """Without a GPU, with tiny sizes, every block writes its cases, and all comparisons are right."""
    result = CliRunner().invoke(app, ["first-card", "--minutes", "9", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert {case["block"] for case in cases} == set(BLOCKS)
    assert [case for case in cases if case["outcome"]["right"] is False] == []
    assert [case["case"] for case in cases if not case["case"]] == []  # no block was stopped
    assert " comparisons are right" in (tmp_path / "results.md").read_text()
    assert len(list(read(tmp_path / "cases.jsonl"))) == len(cases)


# --- one case ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_a_right_head_is_right(dtype: torch.dtype) -> None:
    head = make_head(TINY.heads[1], 70, dtype, "cpu", trained=True, biased=True)
    outcome = check_head(head, OUTPUTS)
    assert outcome.right
    assert {f"relative error of ∂{name}" for name in ("hidden", "weight", "bias")} <= set(outcome.numbers)


WRONG = {
    "a value": lambda results, gradients, turn: (results._replace(logp=results.logp + 1e-3), gradients),
    "an output": lambda results, gradients, turn: (results._replace(entropy=results.entropy * 1.001), gradients),
    "a gradient": lambda results, gradients, turn: (results, [*gradients[:-1], gradients[-1] * 1.05]),
    "other bits the second time": lambda results, gradients, turn: (
        results._replace(logp=results.logp * (1 + turn * 2e-7)),
        gradients,
    ),
    "not a number": lambda results, gradients, turn: (results, [g * float("nan") for g in gradients]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_head_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, compute, turns = (
        make_head(TINY.heads[0], 70, torch.float32, "cpu", trained=True),
        numerics.compute,
        iter((0, 1)),
    )
    monkeypatch.setattr(numerics, "compute", lambda *a: WRONG[wrong](*compute(*a), next(turns)))
    assert check_head(head, OUTPUTS).right is False


def _missing() -> Outcome:
    raise ModuleNotFoundError("no", name="trl")


def _full() -> Outcome:
    raise torch.OutOfMemoryError("full")


def _broken() -> Outcome:
    raise RuntimeError("\nan illegal address\nsecond line")


def test_one_case_costs_no_other(tmp_path: Path) -> None:
    """A case whose package lacks is left out, one that fails is wrong, and the next ones run."""
    cases: list[Case] = [("a", _missing), ("b", _full), ("c", _broken), ("d", lambda: Outcome({"ms": 1.0}, right=True))]
    run_cases("steps", cases, tmp_path / "lines")
    with (tmp_path / "lines").open("a") as file:
        file.write('{"block": "st')  # cut off
    outcomes = {record.case: record.outcome for record in read(tmp_path / "lines")}
    assert outcomes == {
        "a": Outcome(note="left out: trl is not installed"),
        "b": Outcome(note="out of memory"),
        "c": Outcome(right=False, note="RuntimeError: an illegal address"),
        "d": Outcome({"ms": 1.0}, right=True),
    }


def test_a_block_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only cases without a line run, and the process ends when its GPU is lost."""
    right = Outcome(right=True)
    cases: list[Case] = [("a", lambda: right), ("b", _broken), ("×", lambda: right)]
    (tmp_path / "lines").write_text(Record("heads", "a", right).line() + Record("steps", "", right).line())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", _broken)
        assert run_cases("steps", cases, tmp_path / "lines") == LOST
    assert begun(capsys.readouterr().out) == "b"
    assert run_cases("steps", cases, tmp_path / "lines") == 0
    assert [r.case for r in read(tmp_path / "lines") if r.block == "steps"] == ["", "a", "b", "×"]
    assert begun(capsys.readouterr().out + "case:") == "×"


# --- the processes ----------------------------------------------------------------------------------------------------

ENDS = {  # what the first process does in its second case, and how the second and the third end
    "hangs": ("import time; time.sleep(60)", [(None, "stopped after")]),
    "dies": ("import os; os.abort()", [(False, "failed: status -6"), (True, "")]),
    "loses its GPU": (f"write('second', False); sys.exit({LOST})", [(False, ""), (True, "")]),
    "lacks a package": ("import no_such_package", [(None, "left out: ModuleNotFoundError")]),
}
PROCESS = """
import json, sys
def write(case, right):
    line = json.dumps(dict(block="numerics", case=case, outcome=dict(right=right)))
    open(sys.argv[-1], "a").write(line + chr(10))
write({again} and "third" or "first", True)
if not {again}:
    print('case: "first"', 'case: "second"', "something else", sep=chr(10), flush=True)
    {code}
"""


@pytest.mark.parametrize("end", ENDS)
def test_one_case_or_block_costs_no_other(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs, dies or cannot start leaves what it wrote; its case is named, and the next one goes on."""
    code, ends = ENDS[end]
    run, started = parent.subprocess.run, []

    def start(arguments: list[str], **options: Any) -> Any:
        name, file = arguments[arguments.index("--block") + 1], arguments[arguments.index("--output") + 1]
        this = PROCESS.format(code=code, again="numerics" in started) if name == "numerics" else "pass"
        started.append(name)
        return run([sys.executable, "-c", this, file], **options)

    monkeypatch.setattr(parent.subprocess, "run", start)
    monkeypatch.setattr(parent, "_times", lambda deadline: ((name, 2.0) for name in ("limits", "numerics", "heads")))
    told: list[str] = []
    records = parent.run_blocks(1, tmp_path, MACHINE, told.append)
    assert [record.case for record in records] == ["first", "second", "third"][: 1 + len(ends)]
    assert [record.outcome.right for record in records] == [True, *(right for right, _ in ends)]
    assert all(r.outcome.note.startswith(said) for r, (_, said) in zip(records[1:], ends, strict=True))
    assert len(told) == 3
    assert started == ["limits", *["numerics"] * len(ends), "heads"]


def test_time_that_is_left_goes_to_the_next_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([0.0] * len(BLOCKS))
    monkeypatch.setattr(parent.time, "monotonic", lambda: next(clock))
    seconds = dict(parent._times(600.0))
    assert seconds["streamed"] == pytest.approx(600)  # no block before it took any
    assert seconds["limits"] == pytest.approx(600 * BLOCKS["limits"].share / sum(b.share for b in BLOCKS.values()))


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_is_wrong() -> None:
    records = [
        Record("numerics", "a | b", Outcome({"error": 0.00012345, "rows": 2048.0}, right=False, note="off"), 1.25),
        Record("heads", "c", Outcome({"ms": 12345.6}), 2.0),
        Record("steps", "", Outcome(note="stopped after 9 s")),
    ]
    text = table(MACHINE, [replace(records[0], case="a"), *records[1:]])
    assert "| a | WRONG | error 0.000123; rows 2,048; off | 1.2 |" in text
    assert "| c |  | ms 12,346 | 2.0 |" in text
    assert summary(records) == "0 of 1 comparisons are right; 1 cases have no numbers."


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_walk_kernel", "head's kernels"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "4 bits"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "products"),
        ("_swiglu_forward_kernel", "liger"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("aten::mm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_every_kernel_belongs_to_a_part(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [([(0, 1)], 0.0), ([(0, 1), (1, 2)], 0.0), ([(0, 1), (3, 4)], 2.0), ([(0, 10), (2, 3), (12, 13)], 2.0)],
)
def test_idle_is_what_no_kernel_covers(ranges: list[tuple[float, float]], expected: float) -> None:
    assert idle(ranges) == expected
