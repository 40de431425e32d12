"""The progress of a run: which evaluation is the best one so far."""

import pytest

from fastpref.config.stopping import Better
from fastpref.run.state import Progress

EVALUATIONS: dict[str, tuple[list[dict[str, float]], list[int]]] = {
    # evaluations of steps 0, 1, 2, … → the steps at which one was the best so far
    "accuracy first": (
        [{"rewards/accuracies": a, "loss": b} for a, b in ((0.5, 0.7), (0.6, 0.9), (0.6, 0.8), (0.5, 0.1))],
        [0, 1, 2],
    ),
    "sft by its loss": ([{"loss": b, "perplexity": 2.0} for b in (1.6, 1.4, 1.5, 1.3)], [0, 1, 3]),
    "rows of one label": ([{"loss": 0.5}, {"loss": 0.4}], []),
}


@pytest.mark.parametrize(("evaluations", "best"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_what_the_best_evaluation_is(evaluations: list[dict[str, float]], best: list[int]):
    """The best evaluation is the most accurate one, of equal ones that with the lower loss, and of supervised training
    that with the lowest loss."""
    progress, found = Progress(), []
    for step, metrics in enumerate(evaluations):
        progress.step, progress.evaluated = step, {f"eval/{name}": value for name, value in metrics.items()}
        if progress.improved(Better()):
            found.append(step)
    assert found == best
    assert (progress.best or {}).get("step") == (best[-1] if best else None)
