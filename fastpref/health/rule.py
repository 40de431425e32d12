"""Define rules, and the functions that they share. Nothing here imports torch."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from fastpref.config import Config
from fastpref.config.losses import CPO, LossOptions, SimPO
from fastpref.data.example import OUTCOMES
from fastpref.health.bands import USUAL_ACCURACY, enough, first_loss, loss_band
from fastpref.run.history import HELDOUT, History, Trend

Severity = Literal["alarm", "warning"]


@dataclass(frozen=True)
class Known:
    """The facts of a run that rules use in addition to its metrics."""

    loss: LossOptions
    steps: int | None = None  # planned steps; None if the run is complete
    batch: int | None = None  # pairs or rows per step
    learning_rate: float | None = None
    max_grad_norm: float = 1.0
    rows: int = 0  # training rows
    cut: int = 0  # training rows that lost tokens
    heldout: int | None = None  # held-out examples
    labels: tuple[int, int] | None = None  # good and bad training rows of KTO
    same_start: bool = True  # whether policy and reference begin as the same model
    extras: bool = False  # whether training rows have weights or margins, on which the first loss then depends
    reference: str | None = None  # the name of a reference that the config names
    ends: bool = True  # whether any training completion has its end
    template: float = 0.0  # the share of training rows whose text does not fit the model's template or end
    dropped: Mapping[str, int] = field(default_factory=dict)  # why training rows were dropped → how many
    lost: int = 0  # training rows of whose prompt less than a quarter is left
    questionless: int = 0  # training rows whose prompt asks nothing
    repeated: int = 0  # training rows that repeat another one exactly
    leaked: int = 0  # held-out rows that are training rows
    answers: tuple[tuple[str, str], ...] = ()  # answers to held-out prompts, before and after the training
    asked: tuple[str, ...] = ()  # those prompts' last turns
    spread: float = 0.0  # the standard deviation of the margins of held-out pairs at the last evaluation
    lengths: tuple[int, int] | None = None  # tokens that 5% and 95% of the completions to learn have at most

    @property
    def first_loss(self) -> float | None:
        """The loss while policy and reference are the same model, or None if that does not determine it."""
        return None if self.extras or not self.same_start else first_loss(self.loss)

    def start(self, metric: str) -> float | None:
        """Return the first value of a metric if policy and reference begin as the same model, or None."""
        if not self.loss.uses_reference or not self.same_start:
            return None
        starts = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5}
        return self.first_loss if metric == "loss" else starts.get(metric)

    def nats(self, reward: float) -> float:
        """Convert a reward to a log-probability, of a whole completion or, if the loss averages, of a token."""
        return reward / self.loss.beta if self.loss.beta else 0.0

    @property
    def wanted(self) -> str:
        """The completions that are to become likelier, in one word."""
        return "imitated" if self.loss.supervised else "chosen"

    @property
    def enough(self) -> float:
        """The smallest change of a log-probability that matters, in nats."""
        return enough(self.loss)

    @property
    def heldout_error(self) -> float:
        """The standard error of a held-out accuracy near one half."""
        return 0.5 / math.sqrt(self.heldout or 30)

    @property
    def heldout_loss_error(self) -> float:
        """The standard error of the held-out loss, if it is logistic in the margin, with a slope of one half."""
        logistic = loss_band(self.loss).low or isinstance(self.loss, SimPO | CPO)
        return 0.5 * self.spread / math.sqrt(self.heldout) if logistic and self.heldout else 0.0

    def tells_chance(self, accuracy: float, steps: int) -> bool:
        """Return whether the pairs of so many logged steps suffice to tell their accuracy from a usual one."""
        error = 0.5 / math.sqrt(steps * (self.batch or 16))
        return accuracy + 3 * error < USUAL_ACCURACY

    def smaller_rate(self, factor: int) -> str:
        """Return the override that divides the learning rate, or words if the rate is unknown."""
        rate = self.learning_rate
        return f"train.learning_rate={rate / factor:.1g}" if rate else f"a learning rate {factor} times smaller"

    @property
    def rate(self) -> str:
        """The learning rate in words and, if it is known, in brackets."""
        return "the learning rate" + ("" if self.learning_rate is None else f" ({self.learning_rate:g} now)")


def known_of(config: Config, facts: Mapping[str, Any]) -> Known:
    """Return the facts that are in the config and the run.json of a run."""
    rows = facts.get("rows") or {}
    train, heldout = rows.get("train") or {}, rows.get("heldout") or {}
    return Known(
        loss=config.loss,
        steps=facts.get("steps"),
        batch=config.train.batch,
        learning_rate=config.learning_rate,
        max_grad_norm=config.train.max_grad_norm,
        rows=train.get("kept", 0),
        # A row may be in both counts, so the larger one is a lower bound of the rows that lost tokens.
        cut=max(train.get("turns_cut", 0) + train.get("prompts_cut", 0), train.get("completions_cut", 0)),
        heldout=heldout.get("kept"),
        labels=(rows["good"], rows["bad"]) if "good" in rows and "bad" in rows else None,
        same_start=config.reference.name is None
        and not (config.lora is not None and config.lora.start is not None and config.reference.adapter == "none"),
        extras=bool(rows.get("weighted") or rows.get("with_margins")),
        reference=config.reference.name if config.loss.uses_reference else None,
        ends=bool(rows.get("ends", 1)),
        template=max(train.get(name, 0) for name in ("foreign", "departed")) / (train.get("kept") or 1),
        dropped={words: train[name] for name, words in _DROPPED.items() if train.get(name)}
        | {words: rows[name] for name, words in _LEFT_OUT.items() if rows.get(name)},
        lost=train.get("prompts_lost", 0),
        questionless=rows.get("questionless", 0),
        repeated=rows.get("repeated", 0),
        leaked=rows.get("leaked", 0),
        answers=tuple((before, after) for _, before, after in _answers(facts.get("samples"))),
        asked=tuple(asked for asked, _, _ in _answers(facts.get("samples"))),
        lengths=_lengths(facts.get("tokens")),
        spread=_spread(facts.get("heldout")),
    )


def _answers(samples: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the prompts that were answered, with the answers before and after the training, once there are both."""
    for sample in samples if isinstance(samples, list) else ():
        of = sample.get if isinstance(sample, dict) else {}.get
        asked, before, after = of("asked"), of("before"), of("after")
        if isinstance(before, str) and isinstance(after, str):
            yield asked if isinstance(asked, str) else "", before, after


def _spread(heldout: Any) -> float:
    """Return the standard deviation of the margins of held-out pairs, or 0 if there are none."""
    if not isinstance(heldout, dict) or not heldout.get("paired") or len(heldout.get("chosen") or ()) < 2:
        return 0.0
    return float(np.std(np.subtract(heldout["chosen"], heldout["rejected"]), ddof=1))


def _lengths(tokens: Any) -> tuple[int, int] | None:
    """Return the low and high percentiles of the lengths of the training completions that are to become likelier."""
    parts = tokens.get("train") if isinstance(tokens, dict) else None
    for name in ("chosen", "completion"):
        percentiles = parts.get(name) if isinstance(parts, dict) else None
        if isinstance(percentiles, list) and len(percentiles) >= 3:
            return percentiles[0], percentiles[2]
    return None


# Rows that nobody asked to drop. Pairs of equal or close scores and exact duplicates are dropped on purpose.
_DROPPED = {o.name: o.words for o in OUTCOMES if o.dropped and o.name not in ("tied", "close")}
_LEFT_OUT = {"left_out": "broken or of another form"}


@dataclass(frozen=True)
class Verdict:
    message: str  # what was seen, and what it means
    advice: str
    steps: tuple[int, int]  # the first and the last step that it concerns
    evidence: Mapping[str, float]
    severity: Severity = "warning"  # something should be examined; "alarm": the model is most likely useless
    rule: str = ""  # the name of the rule, which `diagnose` adds

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} {self.advice}"


def passed_of(facts: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdicts that the run.json of a run says were given during it."""
    given = facts.get("passed")
    named = [v for v in given if isinstance(v, dict)] if isinstance(given, list) else []
    return [
        Verdict(v["message"], "", (0, 0), {}, rule=v["rule"])
        for v in named
        if isinstance(v.get("message"), str) and isinstance(v.get("rule"), str)
    ]


class Unasked(Enum):
    """What a rule returns if it cannot be asked yet."""

    UNASKED = "too few steps, evaluations or held-out rows"


UNASKED = Unasked.UNASKED
Check = Callable[[History, Known], Verdict | Unasked | None]
Concern = Callable[[Known], bool]


@dataclass(frozen=True)
class Rule:
    check: Check
    explains: tuple[str, ...]  # rules whose verdicts follow from this one, and are left out if it has a verdict
    after: float  # the share of the planned steps before which a trend means nothing; 0 for a rule without a trend
    concerns: Concern  # whether it is about runs of this kind at all, such as those of one loss

    def ask(self, history: History, known: Known) -> Verdict | Unasked | None:
        """Return the verdict, None if nothing is wrong, or UNASKED if the run is too short to tell."""
        long_enough = known.steps is None or history.step >= self.after * known.steps
        if self.after and (history.rows < 10 or not long_enough):
            return UNASKED
        return self.check(history, known)


RULES: dict[str, Rule] = {}


def rule(
    name: str, explains: Iterable[str] = (), after: float = 0.0, of: Concern = lambda known: True
) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES[name] = Rule(check, tuple(explains), after, of)
        return check

    return register


def preferences(known: Known) -> bool:
    """Return whether completions are compared, so that there are rewards."""
    return not known.loss.supervised


def imitation(known: Known) -> bool:
    return known.loss.supervised


def change_of(h: History, known: Known, name: str, *, heldout: bool = True) -> Trend | None:
    """Return the change from beginning to end, of held-out rows if evaluated twice, or else of training rows."""
    start = known.start(name)
    change = h.heldout_change(name, start) if heldout else None
    return change or h.change(name, start)


def cost_of(h: History) -> str:
    """Return the metric of the nats that a token of SFT costs: nll_loss, or the loss, which is that in TRL's log."""
    return "nll_loss" if len(h["nll_loss"]) or len(h[HELDOUT + "nll_loss"]) else "loss"


def nats_moved(h: History, known: Known) -> float | None:
    """Return how far the policy has moved: the larger change of the log-probabilities of the two sides, in nats.

    With a reference, the root mean square of the last rewards counts too, because labels that contradict each other
    move the policy back and forth.
    """
    moved = []
    for name in ("rewards/chosen", "rewards/rejected"):
        change = change_of(h, known, name)
        if change is not None:
            moved.append(abs(known.nats(change.by)))
        rewards = h[name].last.values
        if known.loss.uses_reference and len(rewards):
            moved.append(known.nats(float(np.sqrt(np.square(rewards).mean()))))
    return max(moved, default=None)


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share <= 0.99 or share >= 0.9995 else f"{100 * share:.1f}%"


def count(steps: Sized) -> str:
    return f"{len(steps)} logged step{'s' * (len(steps) > 1)}"
