"""SFT, the loss of completions to imitate, as a pure function of the log-probabilities of their tokens."""

from torch import Tensor

from fastpref.losses.result import PreferenceLoss, Totals


def sft_loss(
    logp: Tensor,  # [N] one per scored token
    segments: Tensor,  # [N] int64, the completion of each token
    lengths: Tensor,  # [R] int64, the tokens of each completion
    weights: Tensor | None = None,  # [R] the factors of the completions' losses; 1 if None
    totals: Totals | None = None,
) -> PreferenceLoss:
    """Compute the mean of −logp over all scored tokens of a step, however they are divided among its completions.

    A completion of twice the length counts twice as much. `weights` multiply the tokens' terms and do not change the
    divisor. There are no rewards. "nll_loss" is the same mean without weights.
    """
    sums = logp.new_zeros(len(lengths)).index_add(0, segments, logp.detach())
    scored = lengths.sum()
    weighted = logp if weights is None else logp * weights[segments]
    loss = -weighted.sum() / (scored.to(logp.dtype) if totals is None else totals.nll_tokens)
    return PreferenceLoss(loss, sums, None, sums.new_zeros(0), extra={"nll_loss": (-sums.sum(), scored)})
