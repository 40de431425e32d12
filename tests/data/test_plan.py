"""How a step is computed, by its loss: all at once if that fits, else after a first pass over what is compared."""

import pytest

from fastpref.config.losses import DPO, KTO, ORPO, LossOptions
from fastpref.data.batch import Layout
from fastpref.data.mismatched import with_mismatched
from fastpref.data.plan import Pass, StepPlan, compared, plan_step
from tests.support.tiny import examples


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_ktos_mismatched_completions_follow_the_row_or_come_before_it(layout: Layout):
    rows = examples(6, single=True)
    both = with_mismatched(rows)
    mates = [example.with_completions([(example, 1)]) for example in both]
    trained, before = Pass(rows, [list(range(6))], layout), Pass(mates, [list(range(6))], layout)
    at_once = plan_step(KTO(), rows, layout, 1000)
    assert at_once == (StepPlan(trained, later=mates) if layout == "tree" else StepPlan(trained, first=before))
    assert at_once.tokens == sum(trained.tokens) + (
        sum(1 + len(row.completions[0]) for row in mates) if layout == "tree" else sum(before.tokens)
    )
    assert plan_step(KTO(), rows, layout, 1000, 2).first is not None  # processes wait for each other before the loss
    cut = plan_step(KTO(), rows, layout, 40)
    assert not cut.later
    assert cut.trained.examples == rows
    assert len(cut.trained.microbatches) > 1
    assert cut.first is not None
    assert [e.completions[0] for e in cut.first.examples] == [e.completions[1] for e in both]
    assert [e.prompt for e in cut.first.examples] == [e.prompt for e in rows]
    assert all(tokens <= 40 or len(group) == 1 for tokens, group in zip(cut.trained.tokens, cut.trained.groups))
    assert compared(KTO(), rows) == both


@pytest.mark.parametrize(
    ("loss", "before"), [(ORPO(), False), (DPO(), False), (DPO(variants=("aot",)), True), (KTO(kl="none"), False)]
)
def test_losses_that_sort_a_step_compute_it_first(loss: LossOptions, before: bool):
    """Losses that sort a step have a first pass if the step is cut; all others compute each micro-batch once."""
    rows = examples(6, single=isinstance(loss, KTO))
    assert plan_step(loss, rows, "tree", 1000) == StepPlan(Pass(rows, [list(range(6))], "tree"))
    cut = plan_step(loss, rows, "tree", 40)
    assert cut == StepPlan(cut.trained, first=cut.trained if before else None)
    assert compared(loss, rows) is rows


def test_one_row_has_no_mismatched_completion():
    rows = examples(1, single=True)
    assert plan_step(KTO(), rows, "tree", 1000) == StepPlan(Pass(rows, [[0]], "tree"))
