"""The longest micro-batch of data with lists of several lengths, and of a loss of lists without data."""

import pytest

from fastpref.config import Config
from fastpref.data import longest
from fastpref.data.batch import collate
from fastpref.data.example import Example, Origin
from fastpref.data.longest import LIST, longest_of, longest_possible
from fastpref.data.table import in_memory
from tests.support.lists import of_lists


def config(max_length: int, batch: int = 1) -> Config:
    raw = {"model": {"name": "m"}, "data": [{"path": "d"}], "tokens": {"max_length": max_length}}
    return of_lists(Config.model_validate(raw | {"train": {"batch": batch}}))


@pytest.mark.parametrize(("max_length", "lengths"), [(100, [3, 4, 5]), (7, [3, 4, 4]), (4, [2, 2, 2])])
def test_the_longest_list_of_the_data(max_length: int, lengths: list[int]):
    """The row with the most tokens is found among lists of several numbers of completions, cut to tokens.max_length."""
    rows = [
        Example([1, 2, 3], ([4, 5], [6]), None, Origin(""), scores=(0.0, 1.0)),
        Example([1, 2, 3], ([4] * 3, [5] * 4, [6] * 5), None, Origin(""), scores=(0.0, 2.0, 1.0)),
    ]
    ((example,),) = [part.examples for part in longest_of(config(max_length), in_memory([rows]), "packed")]
    assert [len(ids) for ids in example.completions] == lengths
    assert example.scores == (0.0, 2.0, 1.0)


def test_a_loss_of_lists_without_data():
    """Without data the number of completions is assumed, and the source of the lengths says so."""
    longest = longest_possible(config(8))
    (example,) = longest.examples
    assert longest.source == "tokens.max_length = 8 and 4 completions a row"
    assert len(example.completions) == len(example.scores) == LIST
    assert longest.tokens == collate(longest.examples, "tree").tokens == 1 + LIST * 7


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([[9], [4]], [(10, False)]),
        ([[9, 9], [5, 5]], [(10, True)]),
        ([[9, 5], [5, 5]], [(10, False), (6, True)]),
    ],
    ids=str,
)
def test_a_micro_batch_that_follows_another(
    lengths: list[list[int]], wanted: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
):
    """If the longest micro-batch is the first of its step, that is before gradients exist, the longest of those that
    follow another is a candidate too."""
    flat = [Example([1], ([2] * length,), None, Origin("")) for step in lengths for length in step]
    size = len(lengths[0])
    steps = [list(range(i, i + size)) for i in range(0, len(flat), size)]
    monkeypatch.setattr(longest, "data_order", lambda *_: iter(steps))
    raw = {"loss": {"type": "sft"}, "train": {"batch": size, "tokens_per_microbatch": 10, "layout": "packed"}}
    options = Config.model_validate({"model": {"name": "none"}, "data": [{"path": "none"}], **raw})
    found = longest.longest_of(options, in_memory([flat]), "packed")
    assert [(part.tokens, part.further) for part in found] == wanted
