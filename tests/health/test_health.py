"""Health: every rule fires on a run with its fault and on no healthy one, and causes are named instead of symptoms."""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.config import load_config
from fastpref.config.losses import DPO, IPO, KTO, ORPO, PL, LiPO, LossOptions, SimPO
from fastpref.health import RULES, Known, Verdict, Watch, diagnose, examine, known_of, passed_of
from fastpref.health.bands import Band, bands, first_loss
from fastpref.losses import PairLogps, RowLogps, dpo_loss, kto_loss
from fastpref.run.history import History, Trend
from tests.support.crafted import METHODS, Row, known, rows, shapes
from tests.support.paths import DOCS


def diagnosis(logged: Iterable[Row], of: Known) -> list[Verdict]:
    return diagnose(History(logged), of)


def jumps(logged: Iterable[Row], steps: Collection[int], name: str, value: Any) -> Iterable[Row]:
    """Return the rows with a value replaced in some steps."""
    return ({**row, name: value} if row["step"] in steps and name in row else row for row in logged)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_is_left_alone(method: str, seed: int):
    """A normal run of any method has no fault: with evaluations, without, and at every moment of the run."""
    logged = list(rows(method, seed=seed))
    training = [row for row in logged if "loss" in row]
    assert diagnosis(logged, known(method)) == []
    assert diagnosis(training, known(method, heldout=None)) == []
    watch = Watch(known(method))
    assert list(chain.from_iterable(map(watch.add, logged))) == []


def constant(value: float):
    return lambda t: value


FINE = "Of course! Four plus five is nine. Ask me anything, and have a lovely day."
HALF = {"rewards/accuracies": constant(0.5)}
FAULTS: dict[str, tuple[str, Iterable[Row], dict[str, Any]]] = {
    # rule: (method, its rows, other known facts)
    "learning_rate_high": ("dpo", rows(training={"loss": lambda t: 0.69 + 8 * (t > 0.05)}), {"learning_rate": 1e-2}),
    "nothing_learnt": (
        "dpo",
        rows(both={"loss": constant(0.693), "rewards/chosen": constant(0.001), "rewards/rejected": constant(0.0),
                   "rewards/margins": constant(0.001), **HALF}, noise=1e-3),
        {"learning_rate": 1e-8},
    ),
    "swapped": (
        "dpo",
        rows(heldout={"rewards/accuracies": lambda t: 0.5 - 0.3 * t, "rewards/margins": lambda t: -t,
                      "rewards/chosen": lambda t: -t, "rewards/rejected": lambda t: t, "loss": lambda t: 0.69 + t}),
        {},
    ),
    "labels_shuffled": (
        "dpo",
        rows(heldout={**HALF, "rewards/margins": constant(0.0), "loss": lambda t: 0.69 + 0.1 * t}),
        {},
    ),
    "already_preferred": ("dpo", rows(both={"logps/accuracies": constant(1.0)}), {}),
    "first_loss": ("dpo", rows(both={"loss": lambda t: 0.9 - 0.4 * t}), {}),
    "loss_rises": ("dpo", rows(both={"loss": lambda t: 0.693 + 0.2 * t}), {}),
    "loss_below_band": (
        "dpo",
        rows(training={"loss": lambda t: 0.693 - 0.65 * min(1, 1.5 * t)}, heldout={"loss": lambda t: 0.69 - 0.2 * t}),
        {},
    ),
    "nll_rises": ("cpo", rows("cpo", both={"nll_loss": lambda t: 1.4 + 0.5 * t}), {}),
    "margins_flat": ("simpo", rows("simpo", both={"rewards/margins": constant(0.2)}), {}),
    "accuracy_at_chance": ("dpo", rows(both=HALF, evaluations=()), {}),
    "rejected_rises": (
        "dpo",
        rows(both={"rewards/chosen": lambda t: 1.5 * t, "rewards/rejected": lambda t: t,
                   "rewards/margins": lambda t: 0.5 * t}),
        {},
    ),
    "both_fall": (
        "dpo",
        rows(both={"rewards/chosen": lambda t: -2 * t, "rewards/rejected": lambda t: -3 * t,
                   "rewards/margins": lambda t: t}),
        {},
    ),
    "accuracy_pinned": (
        "dpo",
        jumps(
            rows(both={"rewards/accuracies": constant(1.0), "loss": lambda t: 0.693 - 0.6 * min(1, 4 * t)}),
            tuple(range(6, 101)),
            "rewards/accuracies",
            1.0,
        ),
        {},
    ),
    "length_bias": ("dpo", rows(both={"rewards/length_correlation": lambda t: 0.85 * min(1, 3 * t)}), {}),
    "kl_stuck": (
        "kto",
        rows("kto", both={"kl": constant(0.0), "rewards/chosen": lambda t: -0.2 * t,
                          "rewards/rejected": lambda t: -1.5 * t, "rewards/margins": lambda t: 1.3 * t}),
        {},
    ),
    "gradient_explodes": ("dpo", rows(training={"grad_norm": lambda t: 1 + 400 * (t > 0.5)}), {}),
    "gradient_band": ("dpo", rows(training={"grad_norm": constant(30.0)}), {}),
    "gradient_spikes": ("dpo", jumps(rows(), (40, 70), "grad_norm", 50.0), {}),
    "not_finite": ("dpo", jumps(rows(), (12,), "loss", None), {}),
    "truncation": ("dpo", rows(), {"cut": 90}),
    "overoptimised": (
        "dpo",
        rows(both={"loss": lambda t: 0.693 - 0.6 * t, "rewards/chosen": lambda t: -2 * t * t,
                   "rewards/rejected": lambda t: -7 * t, "rewards/margins": lambda t: 7 * t - 2 * t * t,
                   "entropy": lambda t: 1.5 + 3 * t}, evaluations=(0, 25, 50, 75, 100)),
        {},
    ),
    "answers_repeat": ("dpo", rows(), {"answers": ((FINE, "Brussels. Leave Brussels. " * 6),)}),
    "answers_length": ("dpo", rows(), {"answers": ((FINE, ""),)}),
    "answers_language": ("dpo", rows(), {"answers": ((FINE, "Это совсем другой язык, \ufffd правда."),)}),
    "no_end": ("dpo", rows(), {"ends": False, "cut": 1000}),
    "prompts_lost": ("dpo", rows(), {"lost": 60, "cut": 90}),
    "rows_dropped": ("dpo", rows(), {"dropped": {"too long": 400}}),
    "no_question": ("dpo", rows(), {"questionless": 90}),
    "rows_repeat": ("dpo", rows(), {"repeated": 200}),
    "batch_large": ("dpo", rows(), {"batch": 1001}),
    "template_foreign": ("dpo", rows(), {"template": 0.9}),
    "heldout_leaks": ("dpo", rows(), {"leaked": 60}),
    "heldout_few": ("dpo", rows(), {"heldout": 5}),
    "first_tokens": ("dpo", rows(both={"mean_token_accuracy": constant(0.1)}), {}),
    "labels_unbalanced": ("kto", rows("kto"), {"labels": (6, 240)}),
    "first_nll": ("sft", rows("sft", both={"loss": lambda t: 7 - 5 * t, "nll_loss": lambda t: 7 - 5 * t}), {}),
    "entropy_collapses": ("sft", rows("sft", heldout={"entropy": lambda t: 1.4 - 1.2 * t}), {}),
    "heldout_gap": (
        "dpo",
        rows(training={"rewards/accuracies": lambda t: 0.5 + 0.5 * min(1, 2 * t)},
             heldout={"loss": lambda t: 0.69 - t + 1.3 * t**2}, evaluations=(0, 25, 50, 75, 100)),
        {},
    ),
}  # fmt: skip


FAULTS = {name: (method, list(logged), about) for name, (method, logged, about) in FAULTS.items()}


IMITATION: dict[str, Iterable[Row]] = {
    # Faults of supervised training that rules for preferences find too.
    "nothing_learnt": rows("sft", both={"nll_loss": constant(1.6), "loss": constant(1.6)}, noise=1e-3),
    "learning_rate_high": rows("sft", both={"mean_token_accuracy": lambda t: 0.5 - 0.4 * t}),
    "loss_rises": rows("sft", training={"loss": lambda t: 1.6 + 0.6 * t, "nll_loss": lambda t: 1.6 + 0.6 * t}),
    "loss_below_band": rows("sft", training={"loss": lambda t: 1.6 - 1.58 * min(1, 1.2 * t)}, noise=0.1),
    "heldout_gap": rows("sft", heldout={"loss": lambda t: 1.6 - t + 1.3 * t**2}, evaluations=(0, 25, 50, 75, 100)),
    "first_nll": rows("sft", both={"nll_loss": lambda t: 0.05 - 0.01 * t}),
    "gradient_band": rows("sft", training={"grad_norm": constant(1e-3)}),
}


@pytest.mark.parametrize("rule", IMITATION)
def test_a_rule_fires_on_supervised_training(rule: str):
    """Supervised training has faults of its own and those of any training, and the advice is about completions."""
    (verdict,) = diagnosis(IMITATION[rule], known("sft"))
    assert verdict.rule == rule
    assert not re.search(r"chosen|rejected|pairs|beta|accuracy", f"{verdict.message} {verdict.advice}")


@pytest.mark.parametrize(
    ("logged", "severity"),
    [
        (jumps(rows(), (12,), "loss", None), "warning"),
        (jumps(rows(), range(1, 100), "loss", None), "alarm"),
        (jumps(rows(evaluations=(0, 25, 50, 75, 100)), (50,), "eval/loss", None), "warning"),
        (jumps(rows(evaluations=(0, 25, 50, 75, 100)), (75, 100), "eval/loss", None), "alarm"),
    ],
    ids=["one step", "nearly all steps", "one evaluation", "the last evaluation"],
)
def test_a_run_without_numbers_is_ruined(logged: Iterable[Row], severity: str):
    """Single values that are not finite are a warning; if most steps or the last evaluation have none, an alarm."""
    (verdict,) = (v for v in diagnosis(logged, known("dpo")) if v.rule == "not_finite")
    assert verdict.severity == severity


def test_every_rule_has_a_fault():
    assert set(FAULTS) == set(RULES)


@pytest.mark.parametrize("method", METHODS)
def test_what_could_not_be_asked_is_counted_apart(method: str):
    """Every rule that is about a run was asked or is waiting; a run of two steps answers few, and says so."""
    whole, begun = ([row for row in rows(method) if row["step"] <= last] for last in (100, 2))
    answers = ((FINE, FINE),)
    labels = (500, 500) if method == "kto" else None
    after = examine(History(whole), known(method, answers=answers, labels=labels))
    before = examine(History(begun), known(method))
    assert after.waiting == ()
    assert after.summary() == f"{len(after.asked)} rules found nothing wrong"
    assert {*before.asked, *before.waiting} == {*after.asked}
    assert {"loss_rises", "heldout_gap", "answers_repeat"} <= {*before.waiting}
    assert f"{len(before.waiting)} of {len(after.asked)} could not be asked" in before.summary()
    of_one_loss = {"kl_stuck": "kto", "entropy_collapses": "sft"}
    assert {name for name in of_one_loss if name in after.asked} == {n for n, m in of_one_loss.items() if m == method}


def test_held_out_rows_that_wait_are_not_denied():
    """While the second evaluation is to come, nobody is told that no rows are held out."""
    low = [row for row in rows(training={"loss": lambda t: 0.69 - 0.65 * min(1, 3 * t)}) if row["step"] < 48]
    assert diagnosis(low, known()) == []
    assert "loss_below_band" in examine(History(low), known()).waiting
    (verdict,) = diagnosis([row for row in low if "loss" in row], known(heldout=None))
    assert "no rows are held out" in verdict.message


def test_a_verdict_that_holds_no_longer_has_passed():
    """What was said during the run and is no longer so is named at its end, and a cause's symptoms are not."""
    hill = list(rows(training={"loss": lambda t: 0.693 + 0.3 * t * (t < 0.5) - 0.2 * (t > 0.5)}, noise=0.1))
    watch = Watch(known())
    told = [verdict.rule for row in hill for verdict in watch.add(row)]
    assert told == ["loss_rises"]
    assert [verdict.rule for verdict in watch.health().passed] == ["loss_rises"]
    assert "1 finding given before has passed (loss_rises)" in watch.health().summary()
    assert [v.rule for v in Watch(known(), hill).health().passed] == ["loss_rises"]  # a resumed run knows it too
    facts = {"passed": [{"rule": v.rule, "message": v.message} for v in watch.health().passed] + [None, {"rule": 1}]}
    assert [v.rule for v in passed_of(facts)] == ["loss_rises"]
    cause = examine(History(rows(both={"loss": lambda t: 0.69 + 30 * (t > 0.05)})), known())
    assert cause.after(watch.health().passed).passed == ()


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_fires_on_its_fault(rule: str):
    """On its fault only this rule fires, with evidence, steps and advice."""
    method, logged, about = FAULTS[rule]
    verdicts = diagnosis(logged, known(method, **about))
    assert [v.rule for v in verdicts] == [rule]
    (verdict,) = verdicts
    assert verdict.evidence
    assert all(isinstance(value, int | float) for value in verdict.evidence.values())
    assert 0 <= verdict.steps[0] <= verdict.steps[1] <= 100
    assert verdict.advice.endswith((".", "?"))
    assert verdict.message.endswith(".")


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_needs_no_evaluations(rule: str):
    """Without held-out rows no rule falls over, and none speaks of evaluations."""
    method, logged, about = FAULTS[rule]
    alone = diagnosis([row for row in logged if "loss" in row], known(method, **about | {"heldout": None}))
    assert not any("evaluation" in str(verdict) for verdict in alone)


def test_a_reference_that_is_another_model():
    """Rewards before the training give it away where the loss does not, also if the config names the reference."""

    def chosen(t: float) -> float:
        return 0.6 + 0.3 * t  # six nats of ninety

    other = list(rows(heldout={"rewards/chosen": chosen}))
    for of in (known(), known(same_start=False, reference="another")):
        assert [v.rule for v in diagnosis(other, of)] == ["first_loss"]
    assert diagnosis(other, known(same_start=False)) == []  # lora.from on purpose


def test_explained_rules_come_after_their_cause():
    """A rule comes before those that it explains, because only then they can be left out."""
    order = list(RULES)
    for name, rule in RULES.items():
        assert all(order.index(name) < order.index(symptom) for symptom in rule.explains), name


def test_a_cause_is_said_instead_of_its_symptoms():
    """A run that diverges by its learning rate has many faults, but one verdict."""
    wild = {
        "loss": lambda t: 0.69 + 30 * (t > 0.05), "grad_norm": lambda t: 1 + 500 * t,
        "rewards/chosen": lambda t: -50 * t, "rewards/rejected": lambda t: -50 * t, **HALF,
    }  # fmt: skip
    assert [v.rule for v in diagnosis(rows(both=wild), known(learning_rate=0.1))] == ["learning_rate_high"]


def test_a_handful_of_held_out_rows_proves_nothing():
    """With five held-out rows any accuracy may be chance, so neither swapped nor shuffled labels are reported."""
    for rule in ("swapped", "labels_shuffled"):
        method, logged, about = FAULTS[rule]
        assert rule not in [v.rule for v in diagnosis(logged, known(method, **about, heldout=5))]


@pytest.mark.parametrize("method", ["simpo", "cpo", "orpo"])
@pytest.mark.parametrize("seed", range(3))
def test_batches_that_differ_are_no_rise(method: str, seed: int):
    """Where the first loss is not known, single batches of three times the first one are no rise of the loss."""
    uneven = [row | {"loss": row["loss"] * (0.2, 1.8, 1.0)[row["step"] % 3]} if "loss" in row else row
              for row in rows(method, seed=seed)]  # fmt: skip
    assert "learning_rate_high" not in [v.rule for v in diagnosis(uneven, known(method))]
    risen = [row | {"loss": row["loss"] * (1 + row["step"] / 10)} if "loss" in row else row for row in uneven]
    assert "learning_rate_high" in [v.rule for v in diagnosis(risen, known(method))]


def test_a_few_pairs_prove_no_chance():
    """Five steps of four pairs cannot tell an accuracy of one half from that of a usual run."""
    logged = list(rows(both=HALF | {"loss": lambda t: 0.69 - 0.05 * t}, evaluations=(0, 12, 24), steps=24))
    for heldout in (None, 34):
        examined = examine(History(logged), known(batch=4, steps=24, heldout=heldout))
        assert "accuracy_at_chance" in examined.waiting
        assert not {"accuracy_at_chance", "labels_shuffled"} & {v.rule for v in examined.verdicts}
        assert "accuracy_at_chance" in examine(History(logged), known(batch=128, steps=24, heldout=heldout)).asked


def test_held_out_rows_that_differ_prove_no_rise():
    """A held-out loss has risen if its rise exceeds what the choice of the rows explains."""
    method, logged, about = FAULTS["heldout_gap"]
    low = jumps(logged, tuple(range(1, 101)), "rewards/accuracies", 0.5)
    low = [row for row in low if "eval/rewards/accuracies" not in row or row.pop("eval/rewards/accuracies")]
    few, many = (known(method, **about, spread=6.0, heldout=count) for count in (20, 20_000))
    assert "heldout_gap" not in [v.rule for v in diagnosis(low, few)]
    assert "heldout_gap" in [v.rule for v in diagnosis(low, many)]


def test_alarms_come_first():
    logged = jumps(rows(both={"loss": lambda t: 0.693 + 0.2 * t}), (40,), "grad_norm", 50.0)
    assert [v.severity for v in diagnosis(logged, known(cut=200))] == ["alarm", "warning", "warning"]


def test_a_verdict_is_told_once_while_the_run_goes_on():
    """In a live run, a verdict is given once it holds; a resumed run does not repeat the verdicts of its first part."""
    logged = list(rows(both={"loss": lambda t: 0.9 - 0.4 * t}))
    watch = Watch(known(cut=500))
    reported = [(row["step"], verdict.rule) for row in logged for verdict in watch.add(row)]
    assert reported == [(0, "first_loss"), (0, "truncation")]
    again = Watch(known(cut=500), logged[:40])
    assert [v for row in logged[40:] for v in again.add(row)] == []
    assert {v.rule for v in again.health().verdicts} == {"first_loss", "truncation"}


def test_evaluations_that_begin_late_do_not_hide_the_beginning():
    """TRL does not evaluate before the first step, so the method's known initial value is used there."""
    up_to_half = {
        "rewards/chosen": lambda t: min(t, 0.5), "rewards/rejected": lambda t: -min(t, 0.5),
        "rewards/margins": lambda t: min(2 * t, 1.0), "loss": lambda t: 0.693 - 0.4 * min(t, 0.5),
    }  # fmt: skip
    logged = list(rows(both=up_to_half, evaluations=(50, 100)))
    assert diagnosis(logged, known()) == []
    history = History(logged)
    assert history.heldout_change("rewards/margins", 0.0) == Trend(0.0, 1.0, 0.0, (50, 100))
    assert history.heldout_change("rewards/margins") == Trend(1.0, 1.0, 0.0, (50, 100))


def test_watching_a_long_run_is_cheap(monkeypatch: pytest.MonkeyPatch):
    """Rules are evaluated less and less often: some hundred times in 20,000 rows."""
    watch, evaluations = Watch(known(steps=20_000)), []
    nothing = examine(History(), known())
    monkeypatch.setattr(watch, "health", lambda: evaluations.append(1) or replace(nothing, verdicts=()))
    for row in rows(steps=20_000, evaluations=()):
        watch.add(row)
    assert 50 < len(evaluations) < 300


NAMES = sorted({name for method in METHODS for name in shapes(method)})
NAMES += [f"eval/{name}" for name in NAMES]
VALUES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5, 1e-9, -1e30, 1e30]), st.floats(-100, 100))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(list(METHODS)),
    steps=st.integers(1, 60),
    columns=st.dictionaries(st.sampled_from(NAMES), st.lists(VALUES, min_size=1)),
    of=st.fixed_dictionaries({"steps": st.sampled_from([None, 1, 60]), "heldout": st.sampled_from([None, 0, 1, 50])}),
)
def test_no_rule_falls_over(method: str, steps: int, columns: dict[str, list[Any]], of: dict[str, Any]):
    """Health never ends a run, whatever its metrics are, and even if they are missing."""
    watch = Watch(known(method, **of))
    for step in range(1, steps + 1):
        watch.add({"step": step} | {name: values[step % len(values)] for name, values in columns.items()})
    assert all(str(verdict) for verdict in watch.health().verdicts)
    assert watch.health().summary()


PAIRS = [
    DPO(variants=(v,), label_smoothing=0.1 if v in ("exo_pair", "robust", "aot") else 0.0, beta=0.3)
    for v in ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
              "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm")
] + [
    DPO(variants=("sigmoid", "hinge"), weights=(0.25, 2.0)),
    DPO(f_divergence="js"),
    DPO(f_divergence="forward_kl"),
    DPO(f_divergence="alpha"),
    IPO(beta=0.2),
]  # fmt: skip


@pytest.mark.parametrize("options", PAIRS, ids=str)
def test_the_first_loss_is_that_of_the_losses(options: DPO | IPO):
    """If policy and reference are equal, the loss is the value that the rule expects."""
    logps, lengths = -torch.rand(5, dtype=torch.float64) * 40, torch.tensor([3, 9, 1, 4, 7])
    pairs = PairLogps(logps, logps - 3, lengths, lengths + 2, logps, logps - 3)
    loss = dpo_loss(pairs, options.as_dpo() if isinstance(options, IPO) else options).loss
    assert first_loss(options) == pytest.approx(float(loss), rel=1e-12)


def test_the_first_loss_of_kto_and_of_what_determines_none():
    labels, logps = torch.tensor([True, False, True]), torch.tensor([-3.0, -9.0, -1.0])
    rows_ = RowLogps(logps, logps, labels)
    options = KTO(desirable_weight=0.3, undesirable_weight=0.3)
    assert first_loss(options) == pytest.approx(float(kto_loss(rows_, options).loss))
    undetermined: list[LossOptions] = [
        KTO(desirable_weight=2.0), ORPO(), DPO(weighting=True), DPO(variants=("sigmoid", "sft")), PL(), LiPO(),
    ]  # fmt: skip
    assert [first_loss(options) for options in undetermined] == [None] * 6


@pytest.mark.parametrize("extra", ["weighted", "with_margins"])
def test_rows_with_weights_or_margins_have_no_fixed_first_loss(extra: str, tmp_path: Path):
    """If training rows have weights or margins, neither the first loss nor its band is expected."""
    (tmp_path / "c.toml").write_text('[model]\nname = "m"\n[[data]]\npath = "d"\n')
    of = known_of(load_config(tmp_path / "c.toml"), {"rows": {"train": {"kept": 50}, extra: 7}})
    assert (of.extras, of.first_loss, of.start("rewards/margins")) == (True, None, 0.0)
    high = list(rows("dpo", both={"loss": lambda t: 3.1 - 2.9 * t}))
    assert {"first_loss", "loss_below_band"} & {v.rule for v in diagnosis(high, known("dpo"))}
    assert not {"first_loss", "loss_below_band"} & {v.rule for v in diagnosis(high, known("dpo", extras=True))}
    assert bands(DPO(), 3.1, extras=True)["loss"] == Band(None, 3.1)
    assert "rewards/margins" in bands(SimPO())
    assert bands(SimPO(), extras=True)["rewards/margins"] == Band(0.0, None)


def test_bands_differ_by_method():
    """In row 84, DPO with sigmoid is healthy from 0.3 to ln 2, and IPO below 1/(2β)²."""
    assert (bands(DPO())["loss"].low, bands(DPO())["loss"].high) == pytest.approx((0.3, 0.6931), abs=1e-4)
    assert (bands(IPO(beta=0.1))["loss"].low, bands(IPO(beta=0.1))["loss"].high) == pytest.approx((0.0, 25.0))
    assert bands(KTO())["loss"].high == 0.5
    assert [bands(loss)["grad_norm"].high for loss in (DPO(), IPO(beta=0.1))] == [10.0, 100.0]  # the slope is 1/β
    assert bands(ORPO(), 2.5)["loss"].high == 2.5


def test_what_is_known_comes_from_the_config_and_the_counts(tmp_path: Path):
    (tmp_path / "c.toml").write_text('[model]\nname = "m"\n[lora]\n[loss]\ntype = "kto"\n[[data]]\npath = "d"\n')
    facts = {
        "steps": 7,
        "rows": {"train": {"kept": 50, "prompts_cut": 3, "completions_cut": 9}, "heldout": {"kept": 5}}
        | {"good": 20, "bad": 30},
    }
    of = known_of(load_config(tmp_path / "c.toml"), facts)
    assert of == Known(KTO(), steps=7, batch=16, learning_rate=1e-4, rows=50, cut=9, heldout=5, labels=(20, 30))
    assert known_of(load_config(tmp_path / "c.toml"), {}).rows == 0


def test_the_page_has_every_rule():
    """docs/health.md has a row for each rule, and no others."""
    page = (DOCS / "health.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE) == list(RULES)
