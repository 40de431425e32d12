"""Weights and margins that a loss would ignore are refused before a run, with the place of the first one."""

from collections.abc import Sequence

import pyarrow as pa
import pytest

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, PL, LiPO, LossOptions, SimPO
from fastpref.data.example import Example, Origin
from fastpref.data.extras import check_extras, has
from fastpref.data.table import Examples, in_memory
from fastpref.errors import UserError


def table(weights: Sequence[float], margins: Sequence[float | None]) -> Examples:
    """Return examples with these weights and margins, in a table as it is stored."""
    rows = [Example([1], ([2], [3]), None, Origin(f"d.jsonl:{at}")) for at in range(len(weights))]
    columns = {"weight": pa.array(weights, pa.float64()), "margin": pa.array(margins, pa.float64())}
    plain = in_memory([rows]).table
    plain = plain.drop_columns([name for name in columns if name in plain.column_names])
    for name, values in columns.items():
        plain = plain.append_column(name, values)
    return Examples(plain)


TAKES_BOTH = (DPO(), DPO(variants=("hinge", "sft")), SimPO(), CPO(), CPO(variant="hinge"))
WITHOUT_MARGINS = (IPO(), KTO(), ORPO(), PL(), LiPO(), CPO(variant="ipo"), DPO(variants=("sigmoid", "apo_zero")))
SORTING = DPO(variants=("aot",))


@pytest.mark.parametrize("loss", [*TAKES_BOTH, *WITHOUT_MARGINS, SORTING], ids=repr)
def test_what_a_loss_ignores_is_refused(loss: LossOptions):
    """A margin is refused by name, place and reason for losses without one, and a weight for losses that sort."""
    plain, weighted = table([1, 1, 1], [None] * 3), table([1, 0.5, 2], [None] * 3)
    margins = table([1, 1, 1], [None, None, 0.5])
    check_extras(loss, plain)
    if loss in TAKES_BOTH:
        check_extras(loss, table([1, 2, 3], [0.5, None, 0.0]))
        return
    with pytest.raises(UserError, match=rf'd.jsonl:2: 1 of 3 rows have a margin, and loss.type = "{loss.type}" takes'):
        check_extras(loss, margins)
    if loss != SORTING:
        check_extras(loss, weighted)
        return
    with pytest.raises(UserError, match=r"d.jsonl:1: 2 of 3 rows have a weight.*aot sort the pairs.*column weight"):
        check_extras(loss, weighted)


def test_which_rows_have_them():
    """A weight of 1 is none, and a margin of 0 is one."""
    examples = table([1, 0, 3], [0.0, None, -1.0])
    assert has(examples, "weight").tolist() == [False, True, True]
    assert has(examples, "margin").tolist() == [True, False, True]
    assert not has(in_memory([[examples_row()]]), "weight").any()


def examples_row() -> Example:
    return Example([1], ([2], [3]), None, Origin("d.jsonl:0"))
