"""Triton kernels of the preference losses.

One program per pair, or per row of KTO, computes the loss and its coefficient for every token, c_n = ∂loss/∂logp_n,
from token log-probabilities.

    L = Σ over tokens of logp, minus the reference's          v = L, or L/n if the loss uses means
    s = v,  (e^{power·v} − 1)/power  or  log 2σ(v)            x = β(s_c − s_r) − margin
    ∂/∂L_c = (Σ_k w_k ∂ℓ_k/∂v_c)·∂v_c/∂L_c                    c_n = (∂/∂L)·token weight/examples − supervised/tokens

A pair may have a weight, which multiplies its loss and its coefficients, and a margin of its own.

The losses ℓ_k and their derivatives are the table of `preference_loss_variants.py`. There are no atomics: a program
writes its own pair and its own tokens, and torch adds up the pairs. `preference_loss_launch.py` launches the kernels;
`fastpref/losses/` computes the same in torch, differentiated by autograd.
"""

import triton
import triton.language as tl

from fastpref.kernels.elementary_triton import exp, expm1, log1p, logistic
from fastpref.kernels.preference_loss_spec import SCORES, Numbers
from fastpref.kernels.preference_loss_variants import LARGEST_EXPONENT, Pair, PairTerm

POWER, JS = (tl.constexpr(SCORES.index(name)) for name in ("power", "js"))
COUNT = tl.constexpr(len(Numbers._fields))
YES, NO = tl.constexpr(True), tl.constexpr(False)


@triton.jit
def _load_numbers(p_numbers):
    values = ()
    for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        values += (tl.load(p_numbers + i),)
    return Numbers(*values)


# --- the score of one completion --------------------------------------------------------------------------------------


@triton.jit
def _score(v, power, SCORE: tl.constexpr):
    """Return s(v) and s′(v). The exponential is constant above e⁸⁰, as in `losses/pairs.py`."""
    score, slope = v, v * 0.0 + 1.0
    if SCORE == POWER:
        exponent = power * v
        inside = exponent <= LARGEST_EXPONENT
        exponent = tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent)
        score = expm1(exponent) / power
        slope = tl.where(inside, exp(exponent), 0.0)
    if SCORE == JS:  # log 2σ(v), written so that nothing cancels around 0
        score = tl.where(v > 0, 0.0, v) - log1p(0.5 * expm1(-tl.abs(v)))
        _, _, _, slope = logistic(v)
    return score, slope


# --- the loss of one pair ---------------------------------------------------------------------------------------------


@triton.jit
def _weighted_sum(pair, p_weights, VARIANTS: tl.constexpr):
    """Return Σ weight·term over the variants as a `PairTerm`, whose logged metrics are not weighted."""
    loss, by_x, by_m, by_c, by_r, log_odds, nls_odds = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in tl.static_range(len(VARIANTS)):  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        w = tl.load(p_weights + i)
        term = VARIANTS[i](pair)
        loss += w * term.loss
        by_x += w * term.by_x
        by_m += w * term.by_m
        by_c += w * term.by_c
        by_r += w * term.by_r
        log_odds += term.log_odds
        nls_odds += term.nls_odds
    return PairTerm(loss, by_x, by_m, by_c, by_r, log_odds, nls_odds)


# --- tokens -----------------------------------------------------------------------------------------------------------


@triton.jit
def _token_weight(i_offsets, shorter, alpha, HAS_LENGTH_WEIGHTS: tl.constexpr):
    """Return LD-DPO's weights: 1 within the shorter completion's length, alpha after it."""
    weight = tl.full(i_offsets.shape, 1.0, tl.float32)
    if HAS_LENGTH_WEIGHTS:
        weight = tl.where(i_offsets < shorter, 1.0, alpha)
    return weight


@triton.jit
def _segment_sums(
    p_logp,  # [N]
    p_reference,  # [N]
    p_log_sum_sq,  # [N]
    start,
    length,
    n,
    shorter,
    alpha,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH_WEIGHTS: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return sums over one segment: Σ logp; Σ logp and Σ reference with token weights; Σ (logp − log Σp²)."""
    plain = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    reference = tl.zeros((BLOCK,), tl.float32)
    aligned = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        i_offsets = first + tl.arange(0, BLOCK)
        i_tokens = start + i_offsets
        mask = (i_offsets < length) & (i_tokens < n)
        weight = _token_weight(i_offsets, shorter, alpha, HAS_LENGTH_WEIGHTS)
        b_logp = tl.load(p_logp + i_tokens, mask=mask, other=0.0)
        plain += b_logp
        weighted += b_logp * weight
        if HAS_REFERENCE:
            reference += tl.load(p_reference + i_tokens, mask=mask, other=0.0) * weight
        if HAS_PAIR_WEIGHTS:
            aligned += b_logp - tl.load(p_log_sum_sq + i_tokens, mask=mask, other=0.0)
    return tl.sum(plain, 0), tl.sum(weighted, 0), tl.sum(reference, 0), tl.sum(aligned, 0)


@triton.jit
def _write_coefficients(
    p_coefficients,  # [N]
    start,
    length,
    n,
    slope,  # ∂loss/∂L
    supervised,  # coefficient of the supervised term, added for every token
    shorter,
    alpha,
    HAS_LENGTH_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for first in range(0, length, BLOCK):
        i_offsets = first + tl.arange(0, BLOCK)
        i_tokens = start + i_offsets
        mask = (i_offsets < length) & (i_tokens < n)
        weight = _token_weight(i_offsets, shorter, alpha, HAS_LENGTH_WEIGHTS)
        tl.store(p_coefficients + i_tokens, slope * weight + supervised, mask=mask)


# Sequences begin at any token, so the alignment of a tensor tells the compiler nothing. It differs from batch to batch,
# and another one would be another compilation.
_POINTERS = (
    "p_logp", "p_reference", "p_log_sum_sq", "p_starts", "p_lengths", "p_pair_weights", "p_margins", "p_numbers",
    "p_weights", "p_nll_tokens", "p_coefficients", "p_sequences", "p_pairs", "p_labels", "p_kl", "p_row_weights",
    "p_share",
)  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "pairs"], do_not_specialize_on_alignment=_POINTERS)
def _pair_kernel(
    p_logp,  # [N]
    p_reference,  # [N]
    p_log_sum_sq,  # [N]
    p_starts,  # [S] int64 each segment's first token
    p_lengths,  # [S] int64
    p_pair_weights,  # [P]
    p_margins,  # [P]
    p_numbers,  # the loss's `Numbers`
    p_weights,  # one for each of VARIANTS
    p_nll_tokens,  # [1] the divisor of the supervised term
    p_coefficients,  # [N]
    p_sequences,  # [3, 2P] sums with token weights, the same for the reference, rewards
    p_pairs,  # [4, P] share of the loss, Σ supervised logp, log odds, logσ(log odds)
    n,
    pairs,  # P
    examples,  # the divisor of the mean over pairs
    VARIANTS: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    AVERAGED: tl.constexpr,
    HAS_LENGTH_WEIGHTS: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    HAS_PROMPTS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MARGINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute pair p from segments p (chosen), P + p (rejected) and, with prompts, 2P + p (its prompt)."""
    i_pair = tl.program_id(0)
    start_c, length_c = tl.load(p_starts + i_pair), tl.load(p_lengths + i_pair)
    start_r, length_r = tl.load(p_starts + pairs + i_pair), tl.load(p_lengths + pairs + i_pair)
    n_c, n_r = length_c.to(tl.float32), length_r.to(tl.float32)
    numbers = _load_numbers(p_numbers)
    shorter, alpha = tl.minimum(length_c, length_r), numbers.length_alpha
    supervised, sum_c, ref_c, aligned_c = _segment_sums(  # pyright: ignore[reportGeneralTypeIssues]
        p_logp, p_reference, p_log_sum_sq, start_c, length_c, n, shorter, alpha,
        HAS_REFERENCE, HAS_LENGTH_WEIGHTS, HAS_PAIR_WEIGHTS, BLOCK,
    )  # fmt: skip
    _, sum_r, ref_r, aligned_r = _segment_sums(
        p_logp, p_reference, p_log_sum_sq, start_r, length_r, n, shorter, alpha,
        HAS_REFERENCE, HAS_LENGTH_WEIGHTS, HAS_PAIR_WEIGHTS, BLOCK,
    )  # fmt: skip

    v_c, v_r, per_c, per_r = sum_c, sum_r, 1.0, 1.0
    if HAS_REFERENCE:
        v_c, v_r = sum_c - ref_c, sum_r - ref_r  # pyright: ignore[reportOperatorIssue]
    if AVERAGED:
        v_c, v_r, per_c, per_r = v_c / n_c, v_r / n_r, 1.0 / n_c, 1.0 / n_r
    s_c, slope_c = _score(v_c, numbers.power, SCORE)
    s_r, slope_r = _score(v_r, numbers.power, SCORE)
    m_c, m_r = 1.0, 1.0  # ∂m/∂s
    if not AVERAGED:
        m_c, m_r = 1.0 / n_c, 1.0 / n_r
    m = s_c - s_r if AVERAGED else s_c / n_c - s_r / n_r
    margin = tl.load(p_margins + i_pair) if HAS_MARGINS else numbers.margin
    pair = Pair(numbers.beta * (s_c - s_r) - margin, m, v_c, v_r, numbers)
    term = _weighted_sum(pair, p_weights, VARIANTS)
    by_s_c, by_s_r = term.by_x * numbers.beta + term.by_m * m_c, -(term.by_x * numbers.beta + term.by_m * m_r)
    share = 1.0 / examples
    if HAS_PAIR_WEIGHTS:
        share *= exp(aligned_c / n_c + aligned_r / n_r)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(p_pair_weights + i_pair)
        share *= weight
    by_c = share * (by_s_c * slope_c + term.by_c) * per_c
    by_r = share * (by_s_r * slope_r + term.by_r) * per_r
    nll = -numbers.supervised / tl.load(p_nll_tokens)
    if HAS_WEIGHTS:
        nll *= weight

    _write_coefficients(p_coefficients, start_c, length_c, n, by_c, nll, shorter, alpha, HAS_LENGTH_WEIGHTS, BLOCK)
    _write_coefficients(p_coefficients, start_r, length_r, n, by_r, 0.0, shorter, alpha, HAS_LENGTH_WEIGHTS, BLOCK)
    if HAS_PROMPTS:
        start, length = tl.load(p_starts + 2 * pairs + i_pair), tl.load(p_lengths + 2 * pairs + i_pair)
        prompt, _, _, _ = _segment_sums(
            p_logp, p_reference, p_log_sum_sq, start, length, n, length, alpha, NO, NO, NO, BLOCK
        )
        _write_coefficients(p_coefficients, start, length, n, 0.0, nll, length, alpha, NO, BLOCK)
        supervised += prompt
    i_chosen, i_rejected = i_pair, pairs + i_pair
    tl.store(p_sequences + i_chosen, sum_c)
    tl.store(p_sequences + i_rejected, sum_r)
    tl.store(p_sequences + 2 * pairs + i_chosen, ref_c)
    tl.store(p_sequences + 2 * pairs + i_rejected, ref_r)
    tl.store(p_sequences + 4 * pairs + i_chosen, numbers.beta * (v_c if HAS_REFERENCE else s_c))
    tl.store(p_sequences + 4 * pairs + i_rejected, numbers.beta * (v_r if HAS_REFERENCE else s_r))
    tl.store(p_pairs + i_pair, share * term.loss + nll * supervised)
    tl.store(p_pairs + pairs + i_pair, supervised)
    tl.store(p_pairs + 2 * pairs + i_pair, term.log_odds)
    tl.store(p_pairs + 3 * pairs + i_pair, -term.nls_odds)


@triton.jit(do_not_specialize=["n", "rows"], do_not_specialize_on_alignment=_POINTERS)
def _row_kernel(
    p_logp,  # [N]
    p_reference,  # [N]
    p_starts,  # [S] int64
    p_lengths,  # [S] int64
    p_labels,  # [R] int8, 1 for desirable
    p_kl,  # [1]
    p_row_weights,  # [R]
    p_numbers,  # the loss's `Numbers`
    p_coefficients,  # [N]
    p_sequences,  # [3, R] sums, the same for the reference, rewards
    p_share,  # [R] shares of the loss
    n,
    rows,  # R; the S − R sequences after them are mismatched: their coefficients are 0
    examples,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute KTO, w·σ(z)/examples with z = ∓β(ratio − KL), − for a desirable row; ∂/∂L = ∓w·β·σ(z)σ(−z)/examples."""
    i_row = tl.program_id(0)
    start, length = tl.load(p_starts + i_row), tl.load(p_lengths + i_row)
    if i_row < rows:
        total, _, reference, _ = _segment_sums(  # pyright: ignore[reportGeneralTypeIssues]
            p_logp, p_reference, p_logp, start, length, n, length, 1.0, YES, NO, NO, BLOCK
        )
        ratio = total - reference  # pyright: ignore[reportOperatorIssue]
        numbers = _load_numbers(p_numbers)
        desirable = tl.load(p_labels + i_row) != 0
        weight = tl.where(desirable, numbers.desirable, numbers.undesirable) / examples
        if HAS_WEIGHTS:
            weight *= tl.load(p_row_weights + i_row)
        sign = tl.where(desirable, -1.0, 1.0)
        _, _, sigma, sigma_not = logistic(sign * numbers.beta * (ratio - tl.load(p_kl)))
        slope = sign * weight * numbers.beta * (sigma * sigma_not)
        _write_coefficients(p_coefficients, start, length, n, slope, 0.0, length, 1.0, NO, BLOCK)
        tl.store(p_sequences + i_row, total)
        tl.store(p_sequences + rows + i_row, reference)
        tl.store(p_sequences + 2 * rows + i_row, numbers.beta * ratio)
        tl.store(p_share + i_row, weight * sigma)
    else:
        _write_coefficients(p_coefficients, start, length, n, 0.0, 0.0, length, 1.0, NO, BLOCK)
