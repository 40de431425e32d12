"""Each mistake that a script makes in a kernel is caught, or listed with the reason why nothing can show it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.truth.mutants.generate import mutants_of
from tests.truth.mutants.survivors import expected_survivors

FILES = ("linear_logprob_triton.py", "preference_loss_triton.py")


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_mutants_are_caught(every: int, tmp_path: Path) -> None:
    """Every mutant (usually, every sixth) is caught by a fault of memory or a wrong value, unless it is listed."""
    rows = run_mutants(tmp_path / "results.json", every)
    survivors = {row["name"] for row in rows if not row["by"]}
    expected = expected_survivors().keys() & {row["name"] for row in rows}
    assert survivors - expected == set(), "not caught: extend the problems, or state why nothing can show it"
    assert expected - survivors == set(), "caught after all: remove them from survivors.txt"
    assert not [row["name"] for row in rows if row["by"] in ("crash", "endless")]
    faults = [row for row in rows if row["place"]]
    assert len(faults) > len(rows) / 8
    assert all(row["place"].startswith(FILES) for row in faults)


def run_mutants(results: Path, every: int) -> list[dict]:
    command = [sys.executable, "-m", "tests.truth.mutants", str(results), "--every", str(every)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ.copy())
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(results.read_text(encoding="utf-8"))


def test_every_kind_of_mistake_is_made() -> None:
    """The script finds masks, addresses, loops, pointers and types in both files, and names each mutant once."""
    for file in FILES:
        mutants = mutants_of(ROOT / "kernels" / file)
        kinds = Counter(mutant.mistake for mutant in mutants)
        assert {
            "mask dropped",
            "part of a mask dropped",
            "term of an address dropped",
            "loop ends early",
            "bound off by one",
        } <= set(kinds)
        assert {"other changed", "pointers exchanged", "store dropped", "type narrowed"} <= set(kinds)
        assert len({mutant.name for mutant in mutants}) == len(mutants) > 100


def test_listed_survivors_exist() -> None:
    """survivors.txt lists mutants that the script makes, each with a reason."""
    made = {mutant.name for file in FILES for mutant in mutants_of(ROOT / "kernels" / file)}
    listed = expected_survivors()
    assert set(listed) - made == set()
    assert all(listed.values())
