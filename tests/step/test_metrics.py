"""Metrics of completions (correlations, shares), from micro-batches and over processes, compared with plain numpy."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.losses import PreferenceLoss
from fastpref.processes import Processes
from fastpref.step.metrics import Metrics

REWARDS = torch.tensor([0.3, -0.1, 0.8, 0.2, 0.1, -0.5])
LENGTHS = torch.tensor([9, 4, 12, 3, 7, 2])


def loss(rewards: Tensor, labels: Tensor | None = None) -> PreferenceLoss:
    return PreferenceLoss(torch.tensor(1.0), rewards, None, rewards, labels)


def gathered(parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> Metrics:
    metrics = Metrics()
    for rewards, lengths, labels in parts:
        metrics.add_loss(loss(rewards, labels), lengths)
    return metrics


def test_reward_against_length():
    """The correlation covers chosen and rejected completions together, for any cut into micro-batches."""
    wanted = np.corrcoef(REWARDS, LENGTHS)[0, 1]
    whole = gathered([(REWARDS, LENGTHS, None)])
    # The pairs are (0, 3), (1, 4) and (2, 5): in each part, chosen completions come first.
    cut = gathered([(REWARDS[[0, 3]], LENGTHS[[0, 3]], None), (REWARDS[[1, 2, 4, 5]], LENGTHS[[1, 2, 4, 5]], None)])
    for metrics in (whole, cut):
        assert metrics.result()["rewards/length_correlation"] == pytest.approx(wanted, abs=1e-6)
        assert sorted(metrics.completions().chosen.tolist()) == pytest.approx(sorted(REWARDS[:3].tolist()))
    labels = torch.tensor([True, False, True, True, False, True])
    single = gathered([(REWARDS, LENGTHS, labels)])
    single.single_completions()
    assert single.result()["rewards/length_correlation"] == pytest.approx(wanted, abs=1e-6)
    assert single.completions().rejected_lengths.tolist() == [4, 7]


def test_lists_count_by_their_best_and_worst():
    """Of lists, lengths are those of the sequences that the loss names, whose rewards it has."""
    metrics, lengths = Metrics(), torch.tensor([9, 4, 12, 3, 7, 2, 5, 0, 8])  # three lists of up to three completions
    sequences = torch.tensor([3, 1, 8, 0, 4, 2])
    metrics.add_loss(replace(loss(REWARDS), sequences=sequences), lengths)
    completions = metrics.completions()
    assert completions.chosen_lengths.tolist() == [3, 4, 8]
    assert completions.rejected_lengths.tolist() == [9, 7, 12]
    assert metrics.result()["rewards/accuracies"] == pytest.approx(2 / 3)


def test_segments_beyond_the_completions_do_not_count():
    """Segments after the completions, which are scored prompts, do not count."""
    metrics = gathered([(REWARDS, torch.cat([LENGTHS, torch.tensor([50, 60, 70])]), None)])
    assert metrics.completions().rejected_lengths.tolist() == [3, 7, 2]


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [(torch.zeros(6), LENGTHS), (1e-6 * REWARDS, LENGTHS), (REWARDS, torch.full((6,), 5))],
    ids=["no reward", "rounding", "one length"],
)
def test_nothing_to_correlate(rewards: Tensor, lengths: Tensor):
    assert gathered([(rewards, lengths, None)]).result()["rewards/length_correlation"] == 0.0


def test_the_likelier_completion_per_token():
    """The likelier completion is the one with the higher log-probability per token; a tie counts half."""
    metrics = Metrics()
    metrics.add_ranking(torch.tensor([-10.0, -2.0, -3.0, -6.0, -2.0, -9.0]), torch.tensor([10, 1, 3, 3, 2, 9]))
    # log-probabilities per token: −1 and −2; −2 and −1; −1 and −1
    assert metrics.result()["logps/accuracies"] == pytest.approx(1.5 / 3)


@dataclass(frozen=True)
class Two(Processes):
    """Two processes that run one after the other: each gets the values of those that gathered before, and its own."""

    count: int = 2
    values: list[Any] = field(default_factory=list)

    def gather(self, own: Any) -> list[Any]:
        self.values.append(own)
        return self.values


def test_processes_are_joined():
    """The joined metrics of two processes are those of one process with all completions."""
    a, b = (REWARDS[[0, 3]], LENGTHS[[0, 3]], None), (REWARDS[[1, 2, 4, 5]], LENGTHS[[1, 2, 4, 5]], None)
    processes = Two()
    gathered([b]).joined(processes)
    assert gathered([a]).joined(processes).result() == pytest.approx(gathered([a, b]).result())
