"""Metrics of a step or an evaluation: means weighted by what they are means over, whatever the micro-batches were."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastpref.data.batch import PreferenceBatch
from fastpref.losses import PreferenceLoss
from fastpref.ops import TokenLogprobs
from fastpref.processes import Processes

# What `linear_logprob` is asked for beside the log-probabilities when a step is logged.
TOKEN_OUTPUTS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True)
class Responses:
    """Rewards and lengths of single responses. Chosen and rejected ones of the same place are a pair, but for KTO."""

    chosen: Tensor  # [P] rewards
    rejected: Tensor  # [P]
    chosen_lengths: Tensor  # [P] tokens
    rejected_lengths: Tensor  # [P]


class Metrics:
    """Sums and counts by name, gathered without waiting for the device; `result` divides them.

    Pairs: rewards, their margins and accuracies (a tie counts half) and log-probabilities are means over pairs. Single
    responses (KTO): "chosen" are the desirable rows, "rejected" the others, each a mean over its own; margins are
    the difference of the two, accuracies the share of (desirable, undesirable) couples in which the desirable one
    has the higher reward.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []  # rewards, lengths and labels of single responses
        self._elsewhere: list[Responses] = []  # that other processes found
        self.paired = True  # whether chosen and rejected responses of the same place belong together

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        total = total.detach().float()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_loss(self, output: PreferenceLoss, lengths: Tensor) -> None:
        """The loss of one part of a step, and its rewards. lengths: [S] tokens, those of the rewards first."""
        self.add("loss", output.loss, 0)
        rewards = output.rewards.detach()
        self._parts.append((rewards, lengths[: len(rewards)].to(rewards.device), output.labels))
        for name, (total, count) in output.extra.items():
            self.add(name, total, count)

    def add_sequences(self, logps: Tensor, chosen: Tensor) -> None:
        """logps [S] of whole responses; chosen [S] bool."""
        for side, mask in (("chosen", chosen), ("rejected", ~chosen)):
            self._add_where(f"logps/{side}", logps, mask)

    def add_ranking(self, logps: Tensor, lengths: Tensor) -> None:
        """logps and lengths [2P]: how often the chosen response is the likelier one, per token."""
        chosen, rejected = (logps.detach() / lengths).chunk(2)
        self.add("logps/accuracies", _shares(chosen - rejected).sum(), len(chosen))

    def add_tokens(self, tokens: TokenLogprobs, batch: PreferenceBatch, chosen: Tensor, counted: Tensor) -> None:
        """Per-token outputs. chosen and counted: [S] bool of the batch's sequences."""
        if tokens.entropy is None or tokens.mean_logit is None or tokens.is_top1 is None:
            return
        of_chosen = (chosen & counted)[batch.segments]
        of_rejected = (~chosen & counted)[batch.segments]
        of_both = of_chosen | of_rejected
        self._add_where("entropy", tokens.entropy, of_both)
        self._add_where("mean_token_accuracy", tokens.is_top1, of_chosen)
        self._add_where("logits/chosen", tokens.mean_logit, of_chosen)
        self._add_where("logits/rejected", tokens.mean_logit, of_rejected)

    def _add_where(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Indexing by a mask would wait for the device to count it."""
        self.add(name, torch.where(mask, values, 0).sum(), mask.sum())

    def joined(self, processes: Processes) -> "Metrics":
        """With what the other processes have gathered."""
        if processes.count == 1:
            return self
        whole = Metrics()
        whole.paired = self.paired
        sums = {name: (float(total), float(self._counts[name])) for name, total in self._sums.items()}
        own = self.responses()
        lists = (own.chosen, own.rejected, own.chosen_lengths, own.rejected_lengths)
        for found, responses in processes.gather((sums, lists)):
            for name, (total, count) in found.items():
                whole.add(name, torch.tensor(total), count)
            whole._elsewhere.append(Responses(*responses))
        return whole

    def single_responses(self) -> None:
        """Say that rewards are of single responses, not of pairs."""
        self.paired = False

    def result(self) -> dict[str, float]:
        """Every metric that has something to be a mean over."""
        counts = {name: float(count) for name, count in self._counts.items()}
        means = {
            name: float(total) / (counts[name] or 1.0)
            for name, total in self._sums.items()
            if counts[name] or name == "loss"
        }
        return means | self._reward_metrics()

    def responses(self) -> Responses:
        """Of all parts, and of all processes once they are joined."""
        own = [
            Responses(*(side for values in (rewards, lengths) for side in _sides(values, labels)))
            for rewards, lengths, labels in self._parts
        ]
        found = own + self._elsewhere or [Responses(*(torch.zeros(0) for _ in fields(Responses)))]
        return Responses(*(torch.cat([getattr(of, f.name) for of in found]).float() for f in fields(Responses)))

    def _reward_metrics(self) -> dict[str, float]:
        of = self.responses()
        chosen, rejected = of.chosen, of.rejected
        found = {}
        if len(chosen):
            found["rewards/chosen"] = float(chosen.mean())
        if len(rejected):
            found["rewards/rejected"] = float(rejected.mean())
        if len(chosen) and len(rejected):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
            difference = chosen - rejected if self.paired else (chosen[:, None] - rejected[None, :]).flatten()
            found["rewards/accuracies"] = float(_shares(difference).mean())
        if len(chosen) + len(rejected) > 1:
            rewards = torch.cat([chosen, rejected])
            found["rewards/length_correlation"] = _correlation(
                rewards, torch.cat([of.chosen_lengths, of.rejected_lengths])
            )
        return found


def _sides(values: Tensor, labels: Tensor | None) -> Sequence[Tensor]:
    """Of the chosen and of the rejected responses; a mask waits for the device."""
    return values.chunk(2) if labels is None else (values[labels], values[~labels])


def _shares(difference: Tensor) -> Tensor:
    """1 where it is positive, ½ where it is zero."""
    return torch.sign(difference) / 2 + 0.5


def _correlation(rewards: Tensor, lengths: Tensor) -> float:
    """Pearson's. 0 where one of them is constant, as the rewards of an untrained policy are but for rounding."""
    both = torch.stack([rewards, lengths]).cpu().double()
    spread = both.std(dim=1)
    if float(spread[0]) < 1e-4 or float(spread[1]) == 0:
        return 0.0
    return float(torch.corrcoef(both)[0, 1])
