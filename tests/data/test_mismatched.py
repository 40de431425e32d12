"""KTO's mismatched completions: whose they are, and that their choice does not depend on the order of the rows."""

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.example import Example, Origin
from fastpref.data.mismatched import mismatched, with_mismatched

ROW = Origin("")


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(st.integers(0, 3), min_size=2, max_size=9), data=st.data())
def test_mismatched_completions_are_another_prompts(prompts: list[int], data: st.DataObject):
    """If there is another prompt, each prompt gets its completion; in an evaluation, whatever the order of the rows."""
    tokens = count(100)
    rows = [
        Example([1, prompt], ([next(tokens), next(tokens)],), True, ROW, (((0, 1),),) if prompt == 2 else ())
        for prompt in prompts
    ]
    own = {row.completions[0][0]: row for row in rows}
    for made in (with_mismatched(rows), list(mismatched(rows))):
        assert [e.prompt for e in made] == [row.prompt for row in rows]
        for row, e in zip(rows, made):
            source = own[e.completions[-1][0]]
            assert (source.prompt != row.prompt) == (len(set(prompts)) > 1)
            assert source is not row
            assert e.context(len(e.completions) - 1) == source.context(0)
    assert all(e.completions[0] == row.completions[0] for row, e in zip(rows, with_mismatched(rows)))
    order = data.draw(st.permutations(range(len(rows))))
    again = list(mismatched([rows[at] for at in order]))
    assert [again[order.index(at)] for at in range(len(rows))] == list(mismatched(rows))


def test_mismatched_neighbours_are_the_next_where_prompts_differ():
    """If all prompts differ, each prompt gets the next row's completion, as in the paper and in TRL."""
    rows = [Example([at, 9], ([20 + at],), True, ROW) for at in range(4)]
    completions = [e.completions for e in with_mismatched(rows)]
    assert completions == [(a.completions[0], b.completions[0]) for a, b in zip(rows, [*rows[1:], rows[0]])]
