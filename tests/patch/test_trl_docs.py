"""docs/trl.md: the row of this TRL lists what is patched in it, and there is a row for every tested version.

These tests do not look up the newest version: a TRL or transformers without a row was not tested.
"""

import pytest
import transformers
import trl

import fastpref
from fastpref.patch.trainers import HOMES, KNOWN
from tests.support.paths import DOCS
from tests.support.trl_versions import TRANSFORMERS_4, VERSIONS

PAGE = (DOCS / "trl.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6
}


def asks(trainer: str, patched: list[str]) -> str:
    """Return what a trainer's code requests from its model."""
    mine = [name for name in patched if name.startswith(f"{trainer}Trainer.")]
    return "–" if not mine else "log-probabilities" if f"{trainer}Trainer.__init__" in mine else "logits"


@pytest.mark.skipif(trl.__version__ not in ROWS, reason=f"TRL {trl.__version__} is not among the tested versions")
def test_the_row_of_this_trl_is_true() -> None:
    """The row's cells are what the patch finds in the installed TRL."""
    with fastpref.patch(trl) as patch:
        found = [asks(trainer, patch.patched) for trainer in ("DPO", "KTO", "ORPO", "CPO", "TPO")]
    major, dpo, kto, orpo_cpo, tpo = ROWS[trl.__version__]
    assert found == [dpo, kto, orpo_cpo, orpo_cpo, tpo]
    assert transformers.__version__.startswith(f"{major}.")


def test_every_tested_version_has_a_row() -> None:
    """The table has the versions of the matrix, in its order, and the page names every trainer."""
    assert list(ROWS)[1:] == list(VERSIONS)
    majors = {version: "4" if needed is TRANSFORMERS_4 else "5" for version, needed in VERSIONS.items()}
    assert {version: cells[0] for version, cells in list(ROWS.items())[1:]} == majors
    first, last = (version.rpartition(".")[0] for version in (next(iter(VERSIONS)), list(VERSIONS)[-1]))
    assert f"{first} to {last}" == KNOWN
    assert all(name.removesuffix("Trainer") in PAGE for name in HOMES)
