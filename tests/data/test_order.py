"""The order of the examples of a run."""

import pytest

from fastpref.data.order import data_order


def test_every_pass_sees_every_example_once():
    """The order consists of shuffled passes, cut into steps of one size; another seed gives another order."""
    order = data_order(7, 3, seed=1)
    seen = [i for _ in range(7) for i in next(order)]
    assert [sorted(seen[a : a + 7]) for a in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    assert next(data_order(50, 10, seed=1)) != next(data_order(50, 10, seed=2))


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_the_order_can_begin_anywhere(batch: int):
    """The order can start after any number of steps, within a pass, at its end or passes later."""
    order = data_order(7, batch, seed=1)
    steps = [next(order) for _ in range(20)]
    for start in range(20):
        later = data_order(7, batch, seed=1, start=start)
        assert [next(later) for _ in range(20 - start)] == steps[start:]
