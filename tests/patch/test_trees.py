"""Padded batches become forests, and their results return to the padded places."""

from random import Random

import pytest
import torch
from torch import Tensor

from fastpref.patch.trees import IGNORED, Row, later_completions, later_padding, pack, read_rows

WIDTH = 9
ROWS = [  # first column, prompt, completion
    Row(0, (5, 6, 7), (8, 9)),
    Row(0, (5, 6), (7,)),
    Row(0, (5, 6, 7), (4, 4, 4, 4, 4, 4)),
    Row(2, (5, 6, 7), (3, 2)),
    Row(0, (), (6, 5, 6)),
    Row(0, (), (6, 5)),
    Row(1, (7, 7), ()),
]


def batch(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids, attention_mask and labels, [B, T]."""
    ids = torch.full((len(rows), WIDTH), 1)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for at, row in enumerate(rows):
        tokens = torch.tensor([*row.prompt, *row.completion])
        ids[at, row.first : row.first + len(row)] = tokens
        mask[at, row.first : row.first + len(row)] = 1
        begin = row.first + len(row.prompt)
        labels[at, begin : row.first + len(row)] = tokens[len(row.prompt) :]
    return ids, mask, labels


def test_rows_are_read_back() -> None:
    """First column, prompt and completion of every row are recovered from a padded batch."""
    assert read_rows(*batch(ROWS)) == ROWS


@pytest.mark.parametrize("hole", [(0, 2), (2, slice(None))], ids=["between tokens", "everything"])
def test_holes_are_no_rows(hole: tuple[int, int | slice]) -> None:
    """A batch with padding between tokens, or with an empty row, cannot become trees."""
    ids, mask, labels = batch(ROWS)
    mask[hole] = 0
    assert read_rows(ids, mask, labels) is None


def test_every_token_has_its_place() -> None:
    """A packed row has each token where `place` says, what rows share once, and positions as in the padded rows."""
    ids, mask, _ = batch(ROWS)
    packed = pack(ROWS, WIDTH, torch.device("cpu"))
    assert torch.equal(packed.input_ids[0][packed.place][mask.bool()], ids[mask.bool()])
    columns = torch.arange(WIDTH) - torch.tensor([row.first for row in ROWS])[:, None]
    assert torch.equal(packed.position_ids[0][packed.place][mask.bool()], columns[mask.bool()])
    sequences = [row.prompt + row.completion for row in ROWS]
    beginnings = {ids[: n + 1] for ids in sequences for n in range(len(ids))}
    assert packed.tokens == packed.layout.tokens == len(beginnings)


def test_a_shared_label_is_one_row_of_the_head() -> None:
    """Tokens with labels that rows share have one predictor and target; spread again, they are those of the batch."""
    rows = [Row(0, (5, 6, 7), (8, 9)), Row(2, (5, 6, 7), (8, 9, 4)), Row(0, (5, 6), (3,)), Row(1, (7, 7), ())]
    ids, mask, labels = batch(rows)
    packed = pack(rows, WIDTH, torch.device("cpu"))
    assert packed.shared is not None
    assert len(packed.shared.targets) == 4  # of 8, 9, 8, 9, 4 and 3
    kept = labels[:, 1:] != IGNORED
    assert torch.equal(packed.shared.targets[packed.shared.rows], ids[:, 1:][kept])
    assert torch.equal(packed.shared.predictors[packed.shared.rows], packed.place[:, :-1][kept])
    labels[1, 6] = IGNORED  # a hole, which only the device knows
    holed = read_rows(ids, mask, labels)
    assert holed is not None
    assert pack(holed, WIDTH, torch.device("cpu")).shared is None
    assert pack(rows[1:], WIDTH, torch.device("cpu")).shared is None


def test_later_tokens_follow_the_row() -> None:
    """Padding and other completions of the same prompts come after the packed row, and nothing else moves."""
    rows = [row for row in ROWS if not row.first and row.prompt]
    ids, mask, _ = batch(rows)
    packed = pack(rows, WIDTH, torch.device("cpu"))
    padding = later_padding(packed, ids)
    assert padding is not None
    tokens = torch.cat([packed.input_ids[0], padding.input_ids[0]])
    assert torch.equal(tokens[padding.place], ids)
    positions = torch.cat([packed.position_ids[0], padding.position_ids[0]])
    assert torch.equal(positions[padding.place], torch.arange(WIDTH).expand(len(rows), -1))
    rng = Random(0)
    others = [Row(0, row.prompt, tuple(rng.choices(range(9), k=4))) for row in rows]
    later = later_completions(packed, others, WIDTH, torch.device("cpu"))
    assert later is not None
    ids, mask, _ = batch(others)
    tokens = torch.cat([packed.input_ids[0], later.input_ids[0]])
    assert torch.equal(tokens[later.place][mask.bool()], ids[mask.bool()])
    assert later_completions(packed, [*others, Row(0, (1, 1), (2,))], WIDTH, torch.device("cpu")) is None
