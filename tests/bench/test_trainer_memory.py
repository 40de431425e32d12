"""The count of a step by method and trainer: each trainer's step allocates what its rows, head and layers need."""

import re

import pytest

from bench.cards import architecture
from bench.trainer_memory import METHODS, MODEL, TRAINERS, counted, examples
from tests.support.paths import DOCS

VOCABULARY = architecture(MODEL).vocab_size


def taken(method: str, trainer: str, completion: int) -> int:
    total = counted(method, trainer, layers=1, pairs=1, prompt=32, completion=completion)
    assert total is not None
    return total


@pytest.mark.parametrize(
    ("method", "trainer", "copies"),
    [
        ("dpo", "ms-swift 4.6, packed", 2.5),  # float32 logits of the policy, and both kinds of the reference's
        ("orpo", "TRL 1.16", 3),  # float32 logits and their gradient, and both of the chosen rows' cross-entropy
        ("orpo", "Unsloth 2026.10", 0),
        ("dpo", "fastpref", 0),
    ],
)
def test_logits_are_counted_where_a_trainer_has_them(method: str, trainer: str, copies: float) -> None:
    """With 512 completion tokens a side more, a step grows by their logits in float32 as often as a trainer holds
    them, and by what one layer computes."""
    more = taken(method, trainer, 1024) - taken(method, trainer, 512)
    logits = 2 * 512 * VOCABULARY * 4
    assert copies * logits <= more < (copies + 0.6) * logits


def test_every_method_has_the_same_completions() -> None:
    """KTO gets both completions of a pair as rows, and a trainer without a method has no number for it."""
    for method in METHODS:
        rows = examples(method, pairs=2, prompt=3, completion=4)
        assert sum(len(row.completions) for row in rows) == 4
        assert {len(ids) for row in rows for ids in (row.prompt, *row.completions)} == {3, 4}
    assert counted("orpo", "ms-swift 4.6, packed", layers=1) is None


def test_the_page_has_every_trainer() -> None:
    """The table of docs/benchmarks.md is that of the command: all trainers, in order."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| trainer \| DPO .*\n\|-.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert rows is not None
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1].splitlines()] == list(TRAINERS)
