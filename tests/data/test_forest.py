"""The laws of a forest: its paths are the sequences, its rule of attention gives each token what precedes it, and what
sequences have in common is computed once."""

from collections.abc import Sequence
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.forest import (
    MIN_SHARED,
    Laid,
    beginning,
    encode,
    forest_tokens,
    lay_apart,
    lay_out,
    places,
    roots,
    shared_tokens,
)

Case = list[tuple[list[int], int]]  # sequences, each with the length of its prompt


@st.composite
def cases(draw: st.DrawFn, most: int = 8) -> Case:
    """Return sequences that often begin like an earlier one: nested, identical, or one the beginning of another."""
    runs = st.lists(st.sampled_from((0, 1, 300, 70_000)), max_size=3 * MIN_SHARED)
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, most))):
        source = draw(st.sampled_from(sequences)) if sequences else []
        start = source[: draw(st.integers(0, len(source)))]
        sequences.append(start + draw(runs) or [7])
    return [(ids, draw(st.integers(0, len(ids)))) for ids in sequences]


def laid(case: Case) -> Laid:
    return lay_out([encode(ids) for ids, _ in case], [prompt for _, prompt in case])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_each_token_sees_what_precedes_it(case: Case):
    """A path spells its sequence, and by k ≤ q < end[k] each of its tokens sees those before it, at their depth."""
    result = laid(case)
    end, depth = (values.tolist() for values in result.forest.by_token())
    assert len(result.ids) == len(end) == result.forest.tokens
    for (ids, _), path in zip(case, result.paths, strict=True):
        row = places(path)
        assert result.ids[row].tolist() == ids
        for number, q in enumerate(row):
            assert [k for k in range(q + 1) if q < end[k]] == row[: number + 1]
            assert depth[q] == number


@settings(max_examples=200, deadline=None)
@given(cases())
def test_what_sequences_share_is_computed_once(case: Case):
    """Two sequences share all places of a common beginning up to where they part: less than MIN_SHARED tokens before
    their tokens do, never before the end of a common prompt, and nowhere if they are equal."""
    result = laid(case)
    for (a, b), (path, other) in zip(combinations(case, 2), combinations(result.paths, 2), strict=True):
        same, shared = common(a[0], b[0]), common(places(path), places(other))
        assert set(places(path)[shared:]).isdisjoint(places(other)[shared:])
        assert same - MIN_SHARED < shared <= same
        assert shared == same or a[0] != b[0]
        if a[1] == b[1] <= same:
            assert shared >= a[1]
    assert {place for path in result.paths for place in places(path)} == set(range(result.forest.tokens))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_nodes_lie_depth_first(case: Case):
    """Nodes fill the row, a subtree is one range, and a node has no single child."""
    nodes = laid(case).forest.nodes
    assert [node.start for node in nodes[1:]] == [node.stop for node in nodes[:-1]]
    children: dict[int | None, list[int]] = {}
    for at, node in enumerate(nodes):
        assert node.length > 0
        children.setdefault(node.parent, []).append(at)
    for at, node in enumerate(nodes):
        own = [nodes[child] for child in children.get(at, [])]
        assert len(own) != 1
        assert all(child.depth == node.depth + node.length for child in own)
        assert [child.start for child in own] + [node.end] == [node.stop, *(child.end for child in own)]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_chains_are_causal_attention_after_a_prefix(case: Case):
    """Chains fill the row in order; the tokens before a chain with its own are the beginning of a path."""
    result = laid(case)
    chains = result.forest.chains()
    assert [chain.start for chain in chains] + [result.forest.tokens] == [0, *(chain.stop for chain in chains)]
    rows = [places(path) for path in result.paths]
    for chain in chains:
        whole = places([*chain.before, slice(chain.start, chain.stop)])
        assert any(whole == row[: len(whole)] for row in rows)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_the_count_depends_on_the_sequences_alone(case: Case, data: st.DataObject):
    """`forest_tokens` is the length of the row, whatever the order, and the sum over the trees of `roots`."""
    sequences, prompts = [encode(ids) for ids, _ in case], [prompt for _, prompt in case]
    count = forest_tokens(sequences, prompts)
    assert count == laid(case).forest.tokens <= sum(len(ids) for ids, _ in case)
    order = data.draw(st.permutations(range(len(case))))
    assert forest_tokens([sequences[at] for at in order], [prompts[at] for at in order]) == count
    trees: dict[int, list[int]] = {}
    for at, root in enumerate(roots(sequences, prompts)):
        trees.setdefault(root, []).append(at)
    parts = [forest_tokens([sequences[i] for i in tree], [prompts[i] for i in tree]) for tree in trees.values()]
    assert sum(parts) == count


@given(cases(), st.data())
def test_a_beginning_costs_nothing(case: Case, data: st.DataObject):
    """A sequence that another one begins with is computed with it, however short it is."""
    whole, _ = data.draw(st.sampled_from(case))
    part = whole[: data.draw(st.integers(1, len(whole)))]
    assert laid([*case, (part, 0)]).forest.tokens == laid(case).forest.tokens


def test_the_first_sequence_comes_first():
    """Children lie in the order in which the sequences need them, so that a batch reads like its examples."""
    result = laid([([9, 5], 1), ([9, 3], 1), ([2, 2], 1), ([9, 4], 1)])
    assert result.ids.tolist() == [9, 5, 3, 4, 2, 2]
    assert [node.parent for node in result.forest.nodes] == [None, 0, 0, 0, None]


def test_a_short_coincidence_makes_no_node():
    """Sequences without a common prompt part where they begin, unless they share MIN_SHARED tokens."""
    for same, tokens in ((MIN_SHARED - 1, 2 * MIN_SHARED), (MIN_SHARED, MIN_SHARED + 2)):
        case = [([*range(same), 100], same + 1), ([*range(same), 101], same + 1)]
        assert laid(case).forest.tokens == tokens


@settings(max_examples=50, deadline=None)
@given(cases())
def test_apart_nothing_is_shared(case: Case):
    """`lay_apart` is a forest in which every sequence has its own tree."""
    result = lay_apart([encode(ids) for ids, _ in case])
    assert result.ids.tolist() == [token for ids, _ in case for token in ids]
    assert [(node.start, node.end, node.parent) for node in result.forest.nodes] == [
        (start, stop, None) for start, stop in pairwise([0, *(path[0].stop for path in result.paths)])
    ]


@given(cases(most=2))
def test_the_beginning_of_a_path(case: Case):
    path = laid(case).paths[0]
    for tokens in range(1, len(case[0][0]) + 1):
        assert places(beginning(path, tokens)) == places(path)[:tokens]


def test_tokens_are_compared_as_numbers():
    """Encoded sequences sort like lists of ids, and `shared_tokens` counts tokens, not bytes."""
    ids = [[256], [1, 2], [1], [65_536, 0], [65_536], [2**32 - 1]]
    assert [list(x) for x in sorted(ids)] == sorted(ids, key=encode)
    assert shared_tokens(encode([1, 256, 3]), encode([1, 257, 3])) == 1
    assert shared_tokens(encode([1, 2]), encode([1, 2, 3])) == 2
