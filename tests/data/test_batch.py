"""The three layouts compared with the sequences that they represent: what is scored, where, after what, and how often.

Each token is a unique number, except for beginnings that examples share, so that a token and what precedes it identify
its place.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations, count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref.data.batch import (
    Layout,
    PreferenceBatch,
    collate,
    completion_key,
    computed_tokens,
    plan_microbatches,
)
from fastpref.data.example import Example, Origin, Spans
from fastpref.data.forest import MIN_SHARED

LAYOUTS: tuple[Layout, ...] = ("tree", "packed", "padded")
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
ROW = Origin("")
PAD = 10**6
LENGTHS = st.integers(1, 6)
SYSTEM = list(range(1000, 1000 + MIN_SHARED + 3))  # a beginning that several prompts have


def example(
    prompt: int,
    *completions: int,
    tokens: "count[int]",
    label: bool | None = None,
    contexts: tuple[Spans, ...] = (),
    beginning: Sequence[int] = (),
) -> Example:
    def take(many: int) -> list[int]:
        return [next(tokens) for _ in range(many)]

    return Example([*beginning, *take(prompt)], tuple(take(many) for many in completions), label, ROW, contexts)


def spans(mask: Sequence[bool]) -> Spans:
    """Return the spans in which a mask is False, ignoring its last place."""
    edges = [at for at, (a, b) in enumerate(pairwise([True, *mask[:-1], True])) if a != b]
    return tuple(zip(edges[::2], edges[1::2]))


@st.composite
def steps(draw: st.DrawFn, most: int = 5) -> list[Example]:
    """Return examples that all have one, two or three completions, or lists of one to three with scores. Some share
    the beginning of their prompts, and some are there twice."""
    completions, tokens = draw(st.integers(1, 3)), count(1)
    lists = completions > 1 and draw(st.booleans())
    shapes = draw(st.lists(st.tuples(*[LENGTHS] * (1 + completions)), min_size=1, max_size=most))
    if lists:
        shapes = [shape[: 1 + draw(st.integers(1, completions))] for shape in shapes]
    masks = [tuple(spans(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in shape[1:]) for shape in shapes]
    partly = draw(st.booleans())
    examples = [
        example(
            *shape,
            tokens=tokens,
            label=draw(st.booleans()) if completions == 1 else None,
            contexts=contexts if partly and any(contexts) else (),
            beginning=SYSTEM if draw(st.booleans()) else (),
        )
        for shape, contexts in zip(shapes, masks)
    ]
    if lists:
        examples = [replace(one, scores=tuple(map(float, range(len(one.completions))))) for one in examples]
    return examples + [draw(st.sampled_from(examples)) for _ in range(draw(st.integers(0, 1)))]


def seen_from(batch: PreferenceBatch, place: int) -> list[int]:
    """Return the tokens that a place of the flattened hidden states may attend to, ending with its own."""
    ids = batch.input_ids.flatten().tolist()
    if batch.tree is None:
        width = batch.input_ids.shape[1]
        assert batch.attention_mask is not None
        assert batch.attention_mask.flatten()[place - place % width : place + 1].all()
        return ids[place - place % width : place + 1]
    at: int | None = next(n for n, node in enumerate(batch.tree.nodes) if node.start <= place < node.stop)
    seen = ids[batch.tree.nodes[at].start : place + 1]
    while (at := batch.tree.nodes[at].parent) is not None:
        seen = ids[batch.tree.nodes[at].start : batch.tree.nodes[at].stop] + seen
    return seen


def sequences(examples: Sequence[Example], *, score_prompts: bool) -> list[tuple[list[int], int, list[int]]]:
    """Return for each segment its sequence of tokens, the start of its completion, and the scored places in it."""
    whole = [
        (
            e.prompt + e.completions[k],
            len(e.prompt),
            [at for at in range(len(e.completions[k])) if not any(a <= at < b for a, b in e.context(k))],
        )
        if k < len(e.completions)
        else ([], 0, [])
        for k in range(max(len(e.completions) for e in examples))
        for e in examples
    ]
    return whole + [(e.prompt, 1, list(range(len(e.prompt) - 1))) for e in examples] * score_prompts


@EVERY_LAYOUT
@settings(max_examples=100, deadline=None)
@given(examples=steps(), score_prompts=st.booleans())
def test_every_token_is_scored_once_after_what_precedes_it(
    layout: Layout, examples: list[Example], score_prompts: bool
):
    """Each scored token is a target once, predicted from exactly the tokens before it in its sequence.

    Tokens of a context are no targets. If prompts are scored, each prompt token except the first is a target once,
    however often the prompt is repeated.
    """
    batch = collate(examples, layout, score_prompts=score_prompts)
    expected = sequences(examples, score_prompts=score_prompts)
    scored = list(zip(batch.segments.tolist(), batch.offsets.tolist(), strict=True))
    assert sorted(scored) == [(s, at) for s, (_, _, places) in enumerate(expected) for at in places]
    assert batch.lengths.tolist() == [len(places) for _, _, places in expected]
    assert batch.lengths.tolist() == [
        *(e.scored(k) if k < len(e.completions) else 0 for k in range(batch.completions) for e in examples),
        *(len(e.prompt) - 1 for e in examples if score_prompts),
    ]
    positions = batch.position_ids.flatten().tolist()
    predictors, targets = (batch.of_tokens(values).tolist() for values in (batch.predictors, batch.targets))
    for (segment, offset), place, target in zip(scored, predictors, targets, strict=True):
        ids, first, _ = expected[segment]
        assert target == ids[first + offset]
        assert seen_from(batch, place) == ids[: first + offset]
        assert positions[place] == first + offset - 1


@EVERY_LAYOUT
@settings(max_examples=50, deadline=None)
@given(examples=steps())
def test_every_token_stands_where_it_would_alone(layout: Layout, examples: list[Example]):
    """A token's position is how many tokens before it it sees. A forest fills its row; the rest is padding."""
    batch = collate(examples, layout, pad_token_id=PAD)
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    assert batch.input_ids.shape == batch.position_ids.shape
    for place, token in enumerate(ids):
        if token != PAD:
            seen = seen_from(batch, place)
            assert seen[-1] == token
            assert positions[place] == len(seen) - 1
    if batch.tree is None:
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask == 0, batch.input_ids == PAD)
    else:
        assert batch.attention_mask is None
        assert PAD not in ids
        assert batch.input_ids.shape == (1, batch.tree.tokens)


@settings(max_examples=50, deadline=None)
@given(examples=steps())
def test_layouts_compute_the_same_in_fewer_tokens(examples: list[Example]):
    """A forest computes what sequences share once, while the other layouts compute it once per sequence.

    All layouts score the same tokens, in the same segments and at the same positions. The head computes a target once
    for all sequences that predict it from the same tokens.
    """
    batches = {layout: collate(examples, layout) for layout in LAYOUTS}
    whole = [ids for ids, _, _ in sequences(examples, score_prompts=False) if ids]
    assert batches["tree"].tokens == len({tuple(ids[: n + 1]) for ids in whole for n in range(len(ids))})
    assert batches["packed"].tokens == sum(map(len, whole))
    assert batches["padded"].tokens == max(map(len, whole)) * len(whole)
    assert all(batches[layout].tokens == computed_tokens(examples, layout) for layout in LAYOUTS)
    targets = {
        tuple(ids[: first + at + 1]) for ids, first, scored in sequences(examples, score_prompts=False) for at in scored
    }
    assert len(batches["tree"].targets) == len(targets)

    def scored(batch: PreferenceBatch) -> list[tuple[int, ...]]:
        positions = batch.of_tokens(batch.position_ids.flatten()[batch.predictors])
        targets = batch.of_tokens(batch.targets)
        return sorted(zip(*(t.tolist() for t in (batch.segments, batch.offsets, targets, positions))))

    assert scored(batches["tree"]) == scored(batches["packed"]) == scored(batches["padded"])


@EVERY_LAYOUT
def test_what_comes_with_a_batch(layout: Layout):
    """A batch has the number of examples and completions, and places and labels in the examples' order."""
    tokens = count(1)
    single = [example(2, 3, tokens=tokens, label=label) for label in (True, False, False)]
    batch = collate(single, layout, index=[7, 0, 4])
    assert (batch.examples, batch.completions) == (3, 1)
    assert batch.index.tolist() == [7, 0, 4]
    assert batch.labels is not None
    assert batch.labels.tolist() == [True, False, False]
    assert batch.labels.dtype == torch.bool
    pairs = collate([example(1, 1, 2, tokens=tokens) for _ in range(2)], layout)
    assert (pairs.examples, pairs.completions, pairs.labels) == (2, 2, None)
    assert pairs.index.tolist() == [0, 1]
    assert pairs.lengths.tolist() == [1, 1, 2, 2]


@EVERY_LAYOUT
def test_what_lists_and_extras_become(layout: Layout):
    """Lists have scores, NaN where a completion is absent, where the sequence is empty; a pair among them is a list of
    two. Weights are there unless all are 1, and margins if one example has one, NaN for the others."""
    tokens = count(1)
    first, second = example(2, 3, 1, 4, tokens=tokens), example(1, 2, 5, tokens=tokens)
    batch = collate([replace(first, scores=(0.5, 2.0, 1.0)), second], layout)
    assert batch.scores is not None
    assert batch.scores.nan_to_num(nan=-9).tolist() == [[0.5, 2.0, 1.0], [1.0, 0.0, -9.0]]
    assert (batch.completions, batch.lengths.tolist()) == (3, [3, 2, 1, 5, 4, 0])
    assert [bool(path) for path in batch.paths] == [True, True, True, True, True, False]
    assert len(batch.keys) == 5
    assert batch.ranking is batch.scores
    assert batch.weights is None
    assert batch.margins is None
    pairs = collate([replace(second, weight=2.5), replace(second, margin=0.25)], layout)
    assert pairs.scores is None
    assert pairs.ranking.tolist() == [[1.0, 0.0]] * 2
    assert pairs.weights is not None
    assert pairs.margins is not None
    assert (pairs.weights.tolist(), pairs.weights.dtype) == ([2.5, 1.0], torch.float32)
    assert pairs.margins.nan_to_num(nan=-9).tolist() == [-9.0, 0.25]
    with pytest.raises(ValueError, match="row 3: 2 scores of 3 completions"):
        collate([replace(first, scores=(1.0, 2.0), row=Origin("row 3"))], layout)
    assert replace(first, scores=(0.5, 2.0, 1.0)).with_completions([(second, 0)]).scores == ()


@EVERY_LAYOUT
def test_a_prompt_of_one_token_has_nothing_to_score(layout: Layout):
    """The first token of a prompt is not scored, so the segment of a prompt of one token exists and is empty."""
    tokens = count(1)
    batch = collate([example(n, 2, 1, tokens=tokens) for n in (1, 3, 1)], layout, score_prompts=True)
    assert batch.lengths.tolist() == [2, 2, 2, 1, 1, 1, 0, 2, 0]


def test_examples_must_have_as_many_completions():
    """A pair and a single completion cannot be in one batch."""
    tokens = count(1)
    with pytest.raises(ValueError, match="differ in their number of completions"):
        collate([example(1, 1, 1, tokens=tokens), example(1, 1, tokens=tokens)], "tree")


@EVERY_LAYOUT
@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_moves_as_a_whole(layout: Layout, labelled: bool):
    """`.to` moves every tensor, and changes neither the other fields nor the original batch."""
    tokens = count(1)
    one = example(2, 3, tokens=tokens, label=True) if labelled else example(2, 3, 1, tokens=tokens)
    batch = collate([one], layout)
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (before.device.type, after.device.type) == ("cpu", "meta")
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after is before


# --- Micro-batches -------------------------------------------------------------------------------------------------


@EVERY_LAYOUT
@settings(max_examples=100, deadline=None)
@given(examples=steps(most=12), budget=st.integers(1, 80))
def test_a_step_is_cut_into_micro_batches(layout: Layout, examples: list[Example], budget: int):
    """Each example is in one micro-batch, which exceeds the budget only if it has a single example.

    No two micro-batches fit the budget together, unless they share a beginning.
    """

    def cost(places: Sequence[int]) -> int:
        return collate([examples[i] for i in places], layout).tokens

    plan = plan_microbatches(examples, layout, budget)
    assert sorted(place for places in plan for place in places) == list(range(len(examples)))
    assert all(places == sorted(places) for places in plan)
    assert all(cost(places) <= budget or len(places) == 1 for places in plan)
    for ours, theirs in combinations(plan, 2):
        assert (cost(ours) + cost(theirs) if layout == "tree" else cost([*ours, *theirs])) > budget


@EVERY_LAYOUT
@settings(max_examples=100, deadline=None)
@given(examples=steps(most=12), budget=st.integers(1, 80), processes=st.integers(2, 5))
def test_a_step_is_cut_for_several_processes(layout: Layout, examples: list[Example], budget: int, processes: int):
    """If there are enough examples, each process gets as many micro-batches; none is lost, large ones come first."""
    alone = plan_microbatches(examples, layout, budget)
    plan = plan_microbatches(examples, layout, budget, processes)
    assert sorted(place for places in plan for place in places) == list(range(len(examples)))
    assert len(plan) % processes == 0 or len(plan) == len(examples)
    assert all(any(set(places) <= set(whole) for whole in alone) for places in plan)
    costs = [collate([examples[i] for i in places], layout).tokens for places in plan]
    assert costs == sorted(costs, reverse=True)


def test_sharing_prompts_saves_micro_batches():
    """The budget counts computed tokens, so that more examples with long prompts fit in trees."""
    tokens = count(1)
    examples = [example(60, 10, 10, tokens=tokens) for _ in range(12)]
    assert [len(plan_microbatches(examples, layout, 320)) for layout in LAYOUTS] == [3, 6, 6]


def test_what_shares_stays_together():
    """Examples with a common beginning come into the same micro-batch, wherever they are in the step."""
    tokens = count(1)
    systems = [list(range(start, start + 50)) for start in (1000, 2000, 3000)]
    examples = [example(4, 3, 3, tokens=tokens, beginning=systems[at % 3]) for at in range(9)]
    assert plan_microbatches(examples, "tree", 80) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert sorted(len(part) for part in plan_microbatches(examples, "tree", 70)) == [1, 1, 1, 2, 2, 2]


def test_the_key_knows_what_is_scored():
    """The key depends on the scored tokens, because the reference's numbers are those of scored tokens."""
    assert len({completion_key([1], [2, 3, 4], of) for of in ((), ((0, 1),), ((1, 2),), ((0, 2),))}) == 4
    assert completion_key([1], [2, 3]) == completion_key([1], [2, 3], ())
