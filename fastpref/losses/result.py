"""The divisors of a loss, and its result."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """The divisors of a whole step's loss."""

    examples: float  # number of pairs, or of rows for KTO, PL, LiPO and SFT
    nll_tokens: float = 1.0  # number of tokens that the supervised terms score


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and the quantities that are logged with it. Only `loss` is differentiable."""

    loss: Tensor  # scalar, this part's share of the step's loss
    sums: Tensor  # [2P] logp of the chosen, then of the rejected completions (with LD-DPO's weights); KTO, SFT: [R]
    reference_sums: Tensor | None  # the same for the reference
    rewards: Tensor  # [2P] or [R]; SFT has none: [0]
    labels: Tensor | None = None  # [R] bool: KTO
    extra: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # further metrics: sum, and count
    sequences: Tensor | None = None  # [2R] PL, LiPO: the best-scored, then the worst-scored, which stand for the pairs

    @property
    def chosen_rewards(self) -> Tensor:
        """The rewards of the chosen completions [P], or of the desirable rows."""
        return self.rewards[: len(self.rewards) // 2] if self.labels is None else self.rewards[self.labels]

    @property
    def rejected_rewards(self) -> Tensor:
        """The rewards of the rejected completions [P], or of the undesirable rows."""
        return self.rewards[len(self.rewards) // 2 :] if self.labels is None else self.rewards[~self.labels]
