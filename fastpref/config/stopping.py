"""The table train.stop: when a run ends early, and which metrics say that an evaluation is better than another."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING

from fastpref.config.losses import LossOptions, NonNegative
from fastpref.config.section import Count, Section

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastpref.config.schema import Config

_PREFIX = "eval/"
# Metrics with a better direction, and whether it is up.
_DIRECTIONS = {
    "loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True,
    "rewards/rejected": False, "logps/chosen": True, "logps/rejected": False, "mean_token_accuracy": True,
    "logps/accuracies": True, "nll_loss": False, "log_odds_chosen": True, "log_odds_ratio": True,
    "rewards/kendall_tau": True, "perplexity": False,
}  # fmt: skip
_SUPERVISED = ("loss", "nll_loss", "perplexity", "mean_token_accuracy")
_OF_LOSSES = {"log_odds_chosen": ("orpo",), "log_odds_ratio": ("orpo",), "rewards/kendall_tau": ("pl", "lipo")}


class StopConfig(Section):
    after: Count = 3
    """Ends the run after this number of evaluations in a row that are not better."""
    metric: str = "auto"
    """Names the metric that says which evaluation is better; "auto" is eval/rewards/accuracies, for SFT eval/loss."""
    by: NonNegative = 0.0
    """Counts an evaluation as better only if the metric is better by more than this."""


@dataclass(frozen=True)
class Better:
    """Decides whether an evaluation is better than another: more accurate, or as `train.stop` says.

    Without `train.stop` the lower loss decides among equal accuracies, and alone for SFT, which has none.
    """

    metric: str = "eval/rewards/accuracies"
    by: float = 0.0
    loss_decides: bool = True

    @classmethod
    def of(cls, stop: StopConfig | None, loss: LossOptions) -> "Better":
        return cls() if stop is None else cls(stop_metric(stop, loss), stop.by, loss_decides=False)

    def knows(self, evaluation: "Mapping[str, float]") -> bool:
        """Return whether an evaluation can be compared. KTO's rows may be of one label, whose loss says nothing."""
        return self.metric in evaluation or (self.loss_decides and "eval/perplexity" in evaluation)

    def __call__(self, new: "Mapping[str, float]", best: "Mapping[str, float]") -> bool:
        both = self.metric in new and self.metric in best
        metric, loss = self.metric if both or not self.loss_decides else "eval/loss", "eval/loss"
        if not isfinite(best[metric]):
            return isfinite(new[metric])
        gain = (new[metric] - best[metric]) * (1 if _DIRECTIONS[metric.removeprefix(_PREFIX)] else -1)
        return gain > self.by or (self.loss_decides and gain == 0 and new[loss] < best[loss])


def stop_metric(stop: StopConfig, loss: LossOptions) -> str:
    """Return the metric that decides, which "auto" leaves to the loss."""
    if stop.metric != "auto":
        return stop.metric
    return "eval/loss" if loss.supervised else "eval/rewards/accuracies"


def metrics_to_stop_by(loss: LossOptions) -> list[str]:
    """Return the metrics of a loss's evaluations that have a better direction."""

    def of_loss(name: str) -> bool:
        if loss.supervised or name == "perplexity":
            return loss.supervised and name in _SUPERVISED
        if name == "nll_loss":
            return loss.type == "orpo" or getattr(loss, "sft_weight", 0) > 0
        return loss.type in _OF_LOSSES.get(name, (loss.type,)) and (loss.paired or name != "logps/accuracies")

    return [f"{_PREFIX}{name}" for name in _DIRECTIONS if of_loss(name)]


def stop_mistakes(config: "Config") -> Iterator[str]:
    """Yield messages about train.stop, each beginning with its key."""
    stop = config.train.stop
    if stop is None:
        return
    if not config.eval.wanted or config.eval.every == "end":
        yield "train.stop: evaluations say when to stop; hold out data, and leave eval.every out or set it"
    known = metrics_to_stop_by(config.loss)
    if stop_metric(stop, config.loss) not in known:
        near = get_close_matches(stop.metric, [*known, *(name.removeprefix(_PREFIX) for name in known)], n=1)
        meant = near[0] if near and near[0].startswith(_PREFIX) else f"{_PREFIX}{near[0]}" if near else ""
        hint = f" (did you mean {meant!r}?)" if meant else ""
        yield (
            f"train.stop.metric: {config.loss.type} has no metric {stop.metric!r} of which more or less is better{hint}"
            f"; it has {', '.join(known)}"
        )
