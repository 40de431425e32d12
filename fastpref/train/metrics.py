"""Metrics of a step or an evaluation: means weighted by what they are means over, whatever the micro-batches were."""

from dataclasses import replace

import torch
from torch import Tensor

from fastpref.data.batch import PreferenceBatch
from fastpref.ops import TokenLogprobs
from fastpref.processes import Processes
from fastpref.token_loss import PreferenceLoss

# What `linear_logprob` is asked for beside the log-probabilities when a step is logged.
TOKEN_OUTPUTS = ("entropy", "mean_logit", "is_top1")


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
        self._losses: list[PreferenceLoss] = []  # without gradients
        self._elsewhere: list[tuple[Tensor, Tensor]] = []  # chosen and rejected rewards that other processes found
        self._paired = True

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        total = total.detach().float()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_loss(self, output: PreferenceLoss) -> None:
        """The loss of one part of a step, and its rewards."""
        self.add("loss", output.loss, 0)
        self._losses.append(replace(output, loss=output.loss.detach(), rewards=output.rewards.detach(), extra={}))
        for name, (total, count) in output.extra.items():
            self.add(name, total, count)

    def add_sequences(self, logps: Tensor, chosen: Tensor) -> None:
        """logps [S] of whole responses; chosen [S] bool."""
        for side, mask in (("chosen", chosen), ("rejected", ~chosen)):
            self._add_where(f"logps/{side}", logps, mask)

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
        whole._paired = self._paired
        sums = {name: (float(total), float(self._counts[name])) for name, total in self._sums.items()}
        for found, rewards in processes.gather((sums, self._rewards())):
            for name, (total, count) in found.items():
                whole.add(name, torch.tensor(total), count)
            whole._elsewhere.append(rewards)
        return whole

    def single_responses(self) -> None:
        """Say that rewards are of single responses, not of pairs."""
        self._paired = False

    def result(self) -> dict[str, float]:
        """Every metric that has something to be a mean over."""
        counts = {name: float(count) for name, count in self._counts.items()}
        means = {
            name: float(total) / (counts[name] or 1.0)
            for name, total in self._sums.items()
            if counts[name] or name == "loss"
        }
        return means | self._reward_metrics()

    def _rewards(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected."""
        found = [(loss.chosen_rewards, loss.rejected_rewards) for loss in self._losses] + self._elsewhere
        chosen, rejected = zip(*found) if found else ([torch.zeros(0)], [torch.zeros(0)])
        return torch.cat(chosen).float(), torch.cat(rejected).float()

    def _reward_metrics(self) -> dict[str, float]:
        chosen, rejected = self._rewards()
        found = {}
        if len(chosen):
            found["rewards/chosen"] = float(chosen.mean())
        if len(rejected):
            found["rewards/rejected"] = float(rejected.mean())
        if len(chosen) and len(rejected):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
            difference = chosen - rejected if self._paired else (chosen[:, None] - rejected[None, :]).flatten()
            found["rewards/accuracies"] = float((torch.sign(difference) / 2 + 0.5).mean())
        return found
