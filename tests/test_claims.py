"""README.md claims what the tables of docs/ say: a sentence with numbers is made of a table that a command writes."""

import re
from collections.abc import Callable

import pytest

from tests.support.paths import DOCS, ROOT

README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def table(page: str, header: str) -> list[list[str]]:
    """Return the cells of the table of a page whose header begins with these words."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(header)}.*\n\|[-:| ]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None, f"{page} has no table that begins with {header}"
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in found[1].splitlines()]


def columns(page: str, header: str, *places: int) -> list[list[str]]:
    return [[row[at] for row in table(page, header)] for at in places]


def speed() -> str:
    ours = [float(row[3].split()[0]) for row in table("benchmarks.md", "method | trainer") if row[1] == "fastpref"]
    return f"{min(ours):.1f} to {max(ours):.1f} times as fast as TRL 1.16"


def memory() -> str:
    dpo, kto, orpo = (dict(zip(*columns("benchmarks.md", "trainer | DPO", 0, at))) for at in (1, 3, 4))
    ours, offloaded, trl = "fastpref", "fastpref, `offload_activations`", "TRL 1.16"
    assert dpo[ours] == orpo[ours]
    return (
        f"takes {dpo[ours]} GiB with any method but KTO ({kto[ours]}); TRL 1.16 takes {dpo[trl]} with DPO and "
        f"{orpo[trl]} with ORPO, and ms-swift {dpo['ms-swift 4.6, packed']} with packed DPO. With layer inputs in host "
        f"memory fastpref takes {dpo[offloaded]}, and Unsloth, which does so by default, {dpo['Unsloth 2026.10']}"
    )


def streaming() -> str:
    row = next(row for row in table("memory.md", "model | tokens | resident") if row[:2] == ["Llama-3-8B", "2 × 2,048"])
    return f"takes {row[3]} GiB of GPU memory instead of {row[2]}, and {row[4]} with `train.offload_activations`"


@pytest.mark.parametrize("claim", [speed, memory, streaming], ids=lambda claim: claim.__name__)
def test_a_claim_follows_from_its_table(claim: Callable[[], str]) -> None:
    assert claim() in README
