"""Rows that are there twice, held-out rows that are training rows, and rows that ask nothing are counted."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fastpref.data.example import Example, Origin
from fastpref.data.repeats import leaked, questionless, repeated
from fastpref.data.table import Examples, in_memory


def pair(number: int, place: str | None = None, question: str = "a question") -> Example:
    row = Origin(place=place or f"rows:{number}", question=question)
    return Example([1, number], ([number, 7, 2], [9, 2]), None, row)


A = [pair(number) for number in range(6)]
TABLES: dict[str, tuple[Sequence[Example], int]] = {
    "all differ": (A, 0),
    "a source of weight 2, whose rows are from the same places": ([*A, *A], 0),
    "two rows of other places": ([*A, pair(2, "more:1"), pair(3, "more:2"), pair(3, "more:3")], 3),
    "the same tokens, divided otherwise": ([A[3], replace(A[3], completions=([3, 7], [2, 9, 2]))], 0),
    "the same tokens, labelled otherwise": ([replace(A[3], label=True), replace(A[3], label=False)], 0),
    "none": ([], 0),
}


def table(examples: Sequence[Example]) -> Examples:
    """Return a table of several chunks."""
    return in_memory(iter([list(examples[:4]), list(examples[4:])]))


@pytest.mark.parametrize("what", TABLES)
def test_repeated_rows(what: str):
    examples, count = TABLES[what]
    assert repeated(table(examples)) == count


def test_held_out_rows_that_are_training_rows():
    """They are compared by tokens and labels, wherever they come from."""
    heldout = [pair(2, "held:1"), pair(9, "held:2"), pair(5, "held:3")]
    assert leaked(table(A), table(heldout)) == 2
    assert leaked(table(A), table([])) == 0


def test_rows_that_ask_nothing():
    assert questionless(table([*A, pair(6, question=""), pair(7, question=" \n")])) == 2
