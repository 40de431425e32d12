"""Over-optimisation: what tells a model that has left its language from one that has learnt."""

import pytest

from fastpref.config.losses import DPO, SFT
from fastpref.health import Verdict, diagnose
from fastpref.health.optimised import departed
from fastpref.run.history import History
from tests.support.crafted import known, rows

FIRST = {"loss": 0.69, "rewards/chosen": 0.0, "rewards/margins": 0.0, "logps/chosen": -4.6, "entropy": 0.23,
         "mean_token_accuracy": 0.89}  # fmt: skip
EVALUATIONS: dict[str, tuple[dict[str, float], bool]] = {
    # what an evaluation of DPO with β 0.1 shows: its metrics, and whether the model has left its language
    "learning": ({"loss": 0.45, "rewards/chosen": 0.07, "rewards/margins": 0.6, "entropy": 0.21}, False),
    "sure, and the chosen side gains": ({"loss": 0.1, "rewards/chosen": 0.3, "rewards/margins": 3.0}, False),
    "the rejected side alone is far off": ({"loss": 0.4, "rewards/chosen": 0.1, "rewards/margins": 3.0,
                                            "entropy": 0.5}, False),
    "the chosen side falls a little": ({"loss": 0.5, "rewards/chosen": -0.3, "rewards/margins": 0.6}, False),
    "low loss, and the chosen side falls": ({"loss": 0.19, "rewards/chosen": -0.38, "rewards/margins": 1.7}, True),
    "high entropy, and it falls": ({"loss": 0.5, "rewards/chosen": -0.4, "rewards/margins": 1.7,
                                    "entropy": 0.6}, True),
    "low entropy, and tokens are missed": ({"loss": 0.5, "rewards/margins": 1.7, "entropy": 0.1,
                                            "mean_token_accuracy": 0.8}, True),
    "long completions lose a little": ({"loss": 0.2, "rewards/chosen": -0.4, "rewards/margins": 1.7,
                                        "logps/chosen": -300.0}, True),
    "nothing is learnt": ({"loss": 0.9, "rewards/chosen": -2.0, "rewards/margins": -0.3, "entropy": 0.9}, False),
}  # fmt: skip


@pytest.mark.parametrize("what", EVALUATIONS)
def test_a_model_that_has_left_its_language(what: str):
    """It takes larger margins, a chosen side that gets worse, and a loss or entropy out of the healthy range."""
    now, spoilt = EVALUATIONS[what]
    assert departed(DPO(beta=0.1), FIRST | now, FIRST) == spoilt
    long = {"logps/chosen": -300.0}
    if spoilt and "tokens" not in what:
        assert not departed(DPO(beta=0.1), FIRST | now, FIRST | long)  # four nats of three hundred are few
    assert not departed(SFT(), FIRST | now, FIRST)
    assert not departed(DPO(beta=0.1), now, {})


def left(tokens: float, noise: float, heldout: int | None, evaluations: tuple[int, ...]) -> list[Verdict]:
    """Judge a run whose loss ends below its band and which predicts so many fewer of the chosen tokens."""
    shapes = {"loss": lambda t: 0.693 - 0.6 * t, "mean_token_accuracy": lambda t: 0.5 - tokens * t,
              "rewards/chosen": lambda t: 0.1 * t, "rewards/margins": lambda t: 5 * t}  # fmt: skip
    logged = [
        row | {"mean_token_accuracy": row["mean_token_accuracy"] + noise * (-1) ** row["step"]}
        if "loss" in row
        else row
        for row in rows(both=shapes, evaluations=evaluations)
    ]
    return [v for v in diagnose(History(logged), known(heldout=heldout)) if v.rule == "overoptimised"]


def test_training_rows_tell_it_where_no_rows_are_held_out():
    """Two evaluations of ten rows are compared; else the first and last training rows, beyond their errors."""
    (on_heldout,) = left(0.1, 0.0, 50, (0, 50, 100))
    assert "on held-out rows" in on_heldout.message
    assert "step 0" not in on_heldout.message
    for heldout, evaluations in ((None, ()), (50, (0,)), (5, (0, 50, 100))):
        (verdict,) = left(0.1, 0.0, heldout, evaluations)
        assert "in training" in verdict.message
        assert "train.steps" not in verdict.advice
    assert left(0.1, 0.2, None, ()) == []  # the tokens of single batches differ more
    assert len(left(0.1, 0.02, None, ())) == 1
