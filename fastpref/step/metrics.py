"""Metrics of a step or an evaluation: means over all its tokens or completions, independent of the micro-batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastpref.data.batch import PreferenceBatch
from fastpref.losses import PreferenceLoss
from fastpref.ops import TokenLogprobs
from fastpref.processes import Processes

# The outputs of `linear_logprob` that are computed in addition to the log-probabilities when a step is logged.
TOKEN_OUTPUTS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True)
class Completions:
    """The rewards and lengths of completions, on the CPU. Except for KTO, chosen[i] and rejected[i] share a prompt."""

    chosen: Tensor  # [P] rewards
    rejected: Tensor  # [P]
    chosen_lengths: Tensor  # [P] tokens
    rejected_lengths: Tensor  # [P]


class Metrics:
    """The sums and counts of metrics by name, collected without waiting for the device. `result` divides them.

    For pairs, rewards, their margins and accuracies (a tie counts half) and log-probabilities are means over pairs. For
    single completions (KTO), "chosen" are the means over the desirable rows, "rejected" those over the others. Margins
    are the difference of the two means. Accuracies are the share of all combinations of a desirable and an undesirable
    row in which the desirable one has the higher reward. For lists, "chosen" is the completion with the best score,
    "rejected" that with the worst, as if these two were the pair. SFT has no rewards and no sides; its perplexity is
    e^nll_loss. Weights of examples count in the loss only.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._parts: list[
            tuple[Tensor, Tensor, Tensor | None]
        ] = []  # rewards, lengths and labels of single completions
        self._elsewhere: list[Completions] = []  # of other processes
        self.paired = True  # whether chosen[i] and rejected[i] are a pair
        self.supervised = False  # whether completions are imitated, so that there are neither sides nor rewards

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        total = total.detach().float()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_loss(self, output: PreferenceLoss, lengths: Tensor) -> None:
        """Add the loss and the rewards of one part of a step. `lengths` [S] are those of its sequences, in tokens."""
        self.add("loss", output.loss, 0)
        for name, (total, count) in output.extra.items():
            self.add(name, total, count)
        if self.supervised:
            return
        rewards, lengths = output.rewards.detach(), lengths.to(output.rewards.device, non_blocking=True)
        own = lengths[: len(rewards)] if output.sequences is None else lengths[output.sequences]
        self._parts.append((rewards, own, output.labels))

    def add_sequences(self, logps: Tensor, chosen: Tensor) -> None:
        """Add the log-probabilities `logps` [S] of whole completions; `chosen` [S] bool says which are chosen ones."""
        for side, mask in (("chosen", chosen), ("rejected", ~chosen)):
            self._add_where(f"logps/{side}", logps, mask)

    def add_ranking(self, logps: Tensor, lengths: Tensor) -> None:
        """Add how often the chosen completion is the likelier one per token. logps and lengths are [2P]."""
        chosen, rejected = (logps.detach() / lengths).chunk(2)
        self.add("logps/accuracies", _shares(chosen - rejected).sum(), len(chosen))

    def add_tokens(
        self,
        tokens: TokenLogprobs,
        batch: PreferenceBatch,
        chosen: Tensor,  # [S] bool
        rejected: Tensor,  # [S] bool
        counted: Tensor,  # [S] bool, further completions included
    ) -> None:
        """Add the per-token outputs of sequences. Imitated completions are all chosen, but not called so."""
        if tokens.entropy is None or tokens.mean_logit is None or tokens.is_top1 is None:
            return
        of_chosen, of_rejected = chosen[batch.segments], rejected[batch.segments]
        self._add_where("entropy", tokens.entropy, counted[batch.segments])
        self._add_where("mean_token_accuracy", tokens.is_top1, of_chosen)
        if self.supervised:
            return
        self._add_where("logits/chosen", tokens.mean_logit, of_chosen)
        self._add_where("logits/rejected", tokens.mean_logit, of_rejected)

    def _add_where(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values where the mask is True. Indexing by a mask would wait for the device to count it."""
        self.add(name, torch.where(mask, values, 0).sum(), mask.sum())

    def joined(self, processes: Processes) -> "Metrics":
        """Return the metrics of all processes together."""
        if processes.count == 1:
            return self
        whole = Metrics()
        whole.paired, whole.supervised = self.paired, self.supervised
        counts = _numbers(self._counts)
        sums = {name: (total, counts[name]) for name, total in _numbers(self._sums).items()}
        own = self.completions()
        lists = (own.chosen, own.rejected, own.chosen_lengths, own.rejected_lengths)
        for theirs, completions in processes.gather((sums, lists)):
            for name, (total, count) in theirs.items():
                whole.add(name, torch.tensor(total), count)
            whole._elsewhere.append(Completions(*completions))
        return whole

    def single_completions(self) -> None:
        """Treat rewards as those of single completions, not of pairs."""
        self.paired = False

    def imitated_completions(self) -> None:
        """Treat completions as those of SFT, which have neither sides nor rewards."""
        self.paired, self.supervised = False, True

    def result(self) -> dict[str, float]:
        """Return every metric that is a mean over at least one value, by its name."""
        sums, counts = _numbers(self._sums), _numbers(self._counts)
        means = {name: total / (counts[name] or 1.0) for name, total in sums.items() if counts[name] or name == "loss"}
        if self.supervised and "nll_loss" in means:
            means["perplexity"] = _exponential(means["nll_loss"])
        return means | self._reward_metrics()

    def completions(self) -> Completions:
        """Return the completions of all parts, and of all processes once they are joined."""
        columns = [_on_host(column) for column in zip(*self._parts)]
        own = [
            Completions(*(side for values in (rewards, lengths) for side in _sides(values, labels)))
            for rewards, lengths, labels in zip(*columns)
        ]
        parts = own + self._elsewhere or [Completions(*(torch.zeros(0) for _ in fields(Completions)))]
        return Completions(*(torch.cat([getattr(part, f.name) for part in parts]).float() for f in fields(Completions)))

    def _reward_metrics(self) -> dict[str, float]:
        completions = self.completions()
        chosen, rejected = completions.chosen, completions.rejected
        metrics = {}
        if len(chosen):
            metrics["rewards/chosen"] = float(chosen.mean())
        if len(rejected):
            metrics["rewards/rejected"] = float(rejected.mean())
        if len(chosen) and len(rejected):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
            difference = chosen - rejected if self.paired else (chosen[:, None] - rejected[None, :]).flatten()
            metrics["rewards/accuracies"] = float(_shares(difference).mean())
        if len(chosen) + len(rejected) > 1:
            lengths = torch.cat([completions.chosen_lengths, completions.rejected_lengths])
            metrics["rewards/length_correlation"] = _correlation(torch.cat([chosen, rejected]), lengths)
        return metrics


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _numbers(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return scalars as numbers. The host waits for the device once for each dtype, and not for each scalar."""
    numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    groups: dict[Any, dict[str, Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), {})[name] = value
    for group in groups.values():
        numbers |= zip(group, map(float, torch.stack(list(group.values())).tolist()))
    return {name: numbers[name] for name in values}


def _on_host(parts: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return tensors [n] on the CPU, copied at once so that the host waits once; all are None, or none is."""
    given = [part for part in parts if part is not None]
    return torch.cat(given).cpu().split([len(part) for part in given]) if given else parts


def _sides(values: Tensor, labels: Tensor | None) -> Sequence[Tensor]:
    """Return the values of the chosen and of the rejected completions."""
    return values.chunk(2) if labels is None else (values[labels], values[~labels])


def _shares(difference: Tensor) -> Tensor:
    """Return 1 where the difference is positive, ½ where it is zero, and 0 elsewhere."""
    return torch.sign(difference) / 2 + 0.5


def _correlation(rewards: Tensor, lengths: Tensor) -> float:
    """Return Pearson's correlation, or 0 if one side is constant up to rounding, as rewards are before training."""
    both = torch.stack([rewards, lengths]).cpu().double()
    spread = both.std(dim=1)
    if float(spread[0]) < 1e-4 or float(spread[1]) == 0:
        return 0.0
    return float(torch.corrcoef(both)[0, 1])
