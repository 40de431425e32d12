"""Triton kernels of the preference losses: one program a pair, or a row of KTO, from token log-probabilities to the
loss and its coefficient of every token, c_n = ∂loss/∂logp_n.

    L = Σ over tokens of logp, less the reference's           v = L, or L/n where the loss takes means
    s = v,  (e^{power·v} − 1)/power  or  log 2σ(v)            x = β(s_c − s_r) − margin
    ∂/∂L_c = (Σ_k w_k ∂ℓ_k/∂v_c)·∂v_c/∂L_c                    c_n = (∂/∂L)·token weight/examples − supervised/tokens

The losses ℓ_k stand with their derivatives in `_pair_terms`. No atomics: a program writes its own pair and its own
tokens, and torch adds the pairs. `preference_loss_launch.py` launches them; the same in torch, differentiated by
autograd, is `fastpref/losses/formulas.py`.
"""

import triton
import triton.language as tl

from fastpref.kernels import preference_loss_spec as spec
from fastpref.kernels.elementary_triton import LN2, exp, expm1, log1p, logistic

POWER, JS = (tl.constexpr(spec.SCORES.index(name)) for name in ("power", "js"))
(
    BETA, HALF_INVERSE_BETA, SMOOTHING, LOG_SMOOTHING, LOG_UNSMOOTHED, UNFLIPPED, MARGIN, EXPONENT,
    DISCOPOP_TAU, LENGTH_ALPHA, SUPERVISED, DESIRABLE, UNDESIRABLE,
) = (tl.constexpr(i) for i in range(len(spec.NUMBERS)))  # fmt: skip
WEIGHTS = tl.constexpr(len(spec.NUMBERS))
(
    SIGMOID, HINGE, IPO, EXO_PAIR, NCA_PAIR, ROBUST, BCO_PAIR, SPPO_HARD, APO_ZERO, APO_DOWN,
    DISCOPOP, SIGMOID_NORM, ODDS_RATIO,
) = (tl.constexpr(i) for i in range(len(spec.VARIANTS)))  # fmt: skip

BIT = tl.constexpr(1)  # shifted from the left: Triton's interpreter hands VARIANTS over as a plain int
YES, NO = tl.constexpr(True), tl.constexpr(False)

LARGEST_EXPONENT = tl.constexpr(80.0)  # as `losses._bounded_expm1`
LARGEST_ROOT = tl.constexpr(1e18)  # as `losses._bounded_square`
LARGEST_AVERAGE = tl.constexpr(-1e-30)  # as `losses._log1mexp`


# --- of one response --------------------------------------------------------------------------------------------------


@triton.jit
def _score(v, power, SCORE: tl.constexpr):
    """s(v) and s′(v). The exponential is constant past e⁸⁰, as in losses.py."""
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


@triton.jit
def _log_odds(v):
    """v − log(1 − eᵛ) and its derivative 1/(1 − eᵛ), for v ≤ 0."""
    x = tl.where(v > LARGEST_AVERAGE, LARGEST_AVERAGE, v)
    near = x > -LN2
    missing = -expm1(x)
    large = tl.where(near, -1.0, x)  # each branch only sees what it is made for
    log1mexp = tl.where(near, tl.log(missing), log1p(-exp(large)))
    return v - log1mexp, tl.where(v > LARGEST_AVERAGE, 1.0, 1.0 / missing)


# --- the loss of one pair ---------------------------------------------------------------------------------------------


@triton.jit
def _weight(p_numbers, VARIANT: tl.constexpr):
    return tl.load(p_numbers + WEIGHTS + VARIANT)


@triton.jit
def _pair_terms(
    v_c,  # the chosen response's value: log-probability or log-ratio, a mean if AVERAGED
    v_r,
    s_c,  # its score
    s_r,
    n_c,  # its tokens
    n_r,
    p_numbers,
    VARIANTS: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """Σ weight·ℓ of a pair with its derivatives by s_c and s_r, and by v_c and v_r of what does not go through s;
    then the log odds and its −logσ.

    With x = β(s_c − s_r) − margin, m = s_c/n_c − s_r/n_r (AVERAGED: s_c − s_r), r = β·v, ε the label smoothing:

        sigmoid       −(1−ε)·logσ(x) − ε·logσ(−x)                 ∂ₓ = −(1−ε)·σ(−x) + ε·σ(x)
        hinge         max(0, 1 − x)                               ∂ₓ = −[x < 1]
        exo_pair      q(log q − log(1−ε)) + (1−q)(log(1−q) − log ε),  q = σ(x)
                                                                  ∂ₓ = q(1−q)(x − log(1−ε) + log ε)
        robust        (−(1−ε)·logσ(x) + ε·logσ(−x))/(1−2ε)        ∂ₓ = −((1−ε)·σ(−x) + ε·σ(x))/(1−2ε)
        discopop      −logσ(x)·σ(−y) + e^{logσ(y) − x},  y = x/τ  ∂ₓ = −σ(−x)σ(−y) + logσ(x)·σ(y)σ(−y)/τ
                                                                       + e^{logσ(y) − x}·(σ(−y)/τ − 1)
        ipo           (m − 1/2β)²                                 ∂ₘ = 2(m − 1/2β)
        sigmoid_norm  −logσ(βm)                                   ∂ₘ = −β·σ(−βm)
        nca_pair      −logσ(r_c) − ½logσ(−r_c) − ½logσ(−r_r)      ∂_c = β(½σ(r_c) − σ(−r_c)), ∂_r = ½β·σ(r_r)
        bco_pair      −logσ(r_c) − logσ(−r_r)                     ∂_c = −β·σ(−r_c), ∂_r = β·σ(r_r)
        sppo_hard     (v_c − 1/2β)² + (v_r + 1/2β)²               ∂_c = 2(v_c − 1/2β), ∂_r = 2(v_r + 1/2β)
        apo_zero      σ(−r_c) + σ(r_r)                            ∂_c = −β·σ′(r_c), ∂_r = β·σ′(r_r)
        apo_down      σ(r_c) + σ(d),  d = r_r − r_c                ∂_c = β(σ′(r_c) − σ′(d)), ∂_r = β·σ′(d)
        odds_ratio    −logσ(o_c − o_r),  o = v − log(1 − eᵛ)      ∂_c = −σ(o_r − o_c)/(1 − e^{v_c}), ∂_r likewise
    """
    beta = tl.load(p_numbers + BETA)
    half = tl.load(p_numbers + HALF_INVERSE_BETA)
    eps = tl.load(p_numbers + SMOOTHING)
    x = beta * (s_c - s_r) - tl.load(p_numbers + MARGIN)
    m, per_c, per_r = s_c - s_r, 1.0, 1.0
    if not AVERAGED:
        m, per_c, per_r = s_c / n_c - s_r / n_r, 1.0 / n_c, 1.0 / n_r
    nls_x, nls_not_x, sigma_x, sigma_not_x = logistic(x)
    nls_c, nls_not_c, sigma_c, sigma_not_c = logistic(beta * v_c)
    _, nls_not_r, sigma_r, sigma_not_r = logistic(beta * v_r)
    loss, by_x, by_m, by_c, by_r, log_odds, nls_odds = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0

    if (BIT << SIGMOID) & VARIANTS:
        w = _weight(p_numbers, SIGMOID)
        loss += w * ((1.0 - eps) * nls_x + eps * nls_not_x)
        by_x += w * (eps * sigma_x - (1.0 - eps) * sigma_not_x)
    if (BIT << HINGE) & VARIANTS:
        w = _weight(p_numbers, HINGE)
        room = 1.0 - x
        loss += w * tl.where(room < 0, 0.0, room)
        by_x -= tl.where(room > 0, w, 0.0)
    if (BIT << EXO_PAIR) & VARIANTS:
        w = _weight(p_numbers, EXO_PAIR)
        log_flipped, log_kept = tl.load(p_numbers + LOG_SMOOTHING), tl.load(p_numbers + LOG_UNSMOOTHED)
        loss += w * (exp(-nls_x) * (-nls_x - log_kept) + exp(-nls_not_x) * (-nls_not_x - log_flipped))
        by_x += w * (sigma_x * sigma_not_x) * (x - log_kept + log_flipped)
    if (BIT << ROBUST) & VARIANTS:
        w = _weight(p_numbers, ROBUST) / tl.load(p_numbers + UNFLIPPED)
        loss += w * ((1.0 - eps) * nls_x - eps * nls_not_x)
        by_x -= w * ((1.0 - eps) * sigma_not_x + eps * sigma_x)
    if (BIT << DISCOPOP) & VARIANTS:
        w, tau = _weight(p_numbers, DISCOPOP), tl.load(p_numbers + DISCOPOP_TAU)
        nls_y, _, sigma_y, sigma_not_y = logistic(x / tau)
        exponent = -nls_y - x
        inside = exponent <= LARGEST_EXPONENT
        exponential = exp(tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent))
        loss += w * (nls_x * sigma_not_y + exponential)
        by_x -= w * (sigma_not_x * sigma_not_y + nls_x * (sigma_y * sigma_not_y / tau))
        by_x += tl.where(inside, w * exponential * (sigma_not_y / tau - 1.0), 0.0)
    if (BIT << IPO) & VARIANTS:
        w = _weight(p_numbers, IPO)
        root = m - half
        inside = (root >= -LARGEST_ROOT) & (root <= LARGEST_ROOT)
        root = tl.where(root > LARGEST_ROOT, LARGEST_ROOT, root)
        root = tl.where(root < -LARGEST_ROOT, -LARGEST_ROOT, root)
        loss += w * root * root
        by_m += tl.where(inside, 2.0 * w * root, 0.0)
    if (BIT << SIGMOID_NORM) & VARIANTS:
        w = _weight(p_numbers, SIGMOID_NORM)
        nls_m, _, _, sigma_not_m = logistic(beta * m)
        loss += w * nls_m
        by_m -= w * beta * sigma_not_m
    if (BIT << NCA_PAIR) & VARIANTS:
        w = _weight(p_numbers, NCA_PAIR)
        loss += w * (nls_c + 0.5 * nls_not_c + 0.5 * nls_not_r)
        by_c += w * beta * (0.5 * sigma_c - sigma_not_c)
        by_r += w * beta * (0.5 * sigma_r)
    if (BIT << BCO_PAIR) & VARIANTS:
        w = _weight(p_numbers, BCO_PAIR)
        loss += w * (nls_c + nls_not_r)
        by_c -= w * beta * sigma_not_c
        by_r += w * beta * sigma_r
    if (BIT << SPPO_HARD) & VARIANTS:
        w = _weight(p_numbers, SPPO_HARD)
        loss += w * ((v_c - half) * (v_c - half) + (v_r + half) * (v_r + half))
        by_c += 2.0 * w * (v_c - half)
        by_r += 2.0 * w * (v_r + half)
    if (BIT << APO_ZERO) & VARIANTS:
        w = _weight(p_numbers, APO_ZERO)
        loss += w * (sigma_not_c + sigma_r)
        by_c -= w * beta * (sigma_c * sigma_not_c)
        by_r += w * beta * (sigma_r * sigma_not_r)
    if (BIT << APO_DOWN) & VARIANTS:
        w = _weight(p_numbers, APO_DOWN)
        _, _, sigma_d, sigma_not_d = logistic(beta * v_r - beta * v_c)
        loss += w * (sigma_c + sigma_d)
        by_c += w * beta * (sigma_c * sigma_not_c - sigma_d * sigma_not_d)
        by_r += w * beta * (sigma_d * sigma_not_d)
    if (BIT << ODDS_RATIO) & VARIANTS:
        w = _weight(p_numbers, ODDS_RATIO)
        odds_c, slope_c = _log_odds(v_c)
        odds_r, slope_r = _log_odds(v_r)
        log_odds = odds_c - odds_r
        nls_odds, _, _, sigma_not_odds = logistic(log_odds)
        loss += w * nls_odds
        by_c -= w * sigma_not_odds * slope_c
        by_r += w * sigma_not_odds * slope_r
    by_s_c, by_s_r = by_x * beta + by_m * per_c, by_x * beta + by_m * per_r
    return loss, by_s_c, -by_s_r, by_c, by_r, log_odds, nls_odds


# --- tokens -----------------------------------------------------------------------------------------------------------


@triton.jit
def _token_weight(i_offsets, shorter, alpha, HAS_LENGTH_WEIGHTS: tl.constexpr):
    """LD-DPO: 1 within the shorter response's length, then alpha."""
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
    """Σ logp; Σ logp and Σ reference with token weights; Σ (logp − log Σp²): of one segment."""
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
    supervised,  # what every token has beside it
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


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "pairs"])
def _pair_kernel(
    p_logp,  # [N]
    p_reference,  # [N]
    p_log_sum_sq,  # [N]
    p_starts,  # [S] int64 each segment's first token
    p_lengths,  # [S] int64
    p_numbers,  # NUMBERS, then the variants' weights
    p_nll_tokens,  # [1] what the supervised term is divided by
    p_coefficients,  # [N]
    p_sequences,  # [3, 2P] sums with token weights, the same of the reference, rewards
    p_pairs,  # [4, P] share of the loss, Σ supervised logp, log odds, logσ(log odds)
    n,
    pairs,  # P
    examples,  # what the mean over pairs is divided by
    VARIANTS: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    AVERAGED: tl.constexpr,
    HAS_LENGTH_WEIGHTS: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    HAS_PROMPTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Segments p, P + p and, with prompts, 2P + p: the chosen and the rejected response of pair p, and its prompt."""
    i_pair = tl.program_id(0)
    start_c, length_c = tl.load(p_starts + i_pair), tl.load(p_lengths + i_pair)
    start_r, length_r = tl.load(p_starts + pairs + i_pair), tl.load(p_lengths + pairs + i_pair)
    n_c, n_r = length_c.to(tl.float32), length_r.to(tl.float32)
    shorter, alpha = tl.minimum(length_c, length_r), tl.load(p_numbers + LENGTH_ALPHA)
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
    power = tl.load(p_numbers + EXPONENT)
    s_c, slope_c = _score(v_c, power, SCORE)
    s_r, slope_r = _score(v_r, power, SCORE)
    loss, by_s_c, by_s_r, by_v_c, by_v_r, log_odds, nls_odds = _pair_terms(
        v_c, v_r, s_c, s_r, n_c, n_r, p_numbers, VARIANTS, AVERAGED
    )
    share = 1.0 / examples
    if HAS_PAIR_WEIGHTS:
        share *= exp(aligned_c / n_c + aligned_r / n_r)
    by_c, by_r = share * (by_s_c * slope_c + by_v_c) * per_c, share * (by_s_r * slope_r + by_v_r) * per_r
    nll = -tl.load(p_numbers + SUPERVISED) / tl.load(p_nll_tokens)

    _write_coefficients(p_coefficients, start_c, length_c, n, by_c, nll, shorter, alpha, HAS_LENGTH_WEIGHTS, BLOCK)
    _write_coefficients(p_coefficients, start_r, length_r, n, by_r, 0.0, shorter, alpha, HAS_LENGTH_WEIGHTS, BLOCK)
    if HAS_PROMPTS:
        start, length = tl.load(p_starts + 2 * pairs + i_pair), tl.load(p_lengths + 2 * pairs + i_pair)
        prompt, _, _, _ = _segment_sums(
            p_logp, p_reference, p_log_sum_sq, start, length, n, length, alpha, NO, NO, NO, BLOCK
        )
        _write_coefficients(p_coefficients, start, length, n, 0.0, nll, length, alpha, NO, BLOCK)
        supervised += prompt
    beta = tl.load(p_numbers + BETA)
    i_chosen, i_rejected = i_pair, pairs + i_pair
    tl.store(p_sequences + i_chosen, sum_c)
    tl.store(p_sequences + i_rejected, sum_r)
    tl.store(p_sequences + 2 * pairs + i_chosen, ref_c)
    tl.store(p_sequences + 2 * pairs + i_rejected, ref_r)
    tl.store(p_sequences + 4 * pairs + i_chosen, beta * (v_c if HAS_REFERENCE else s_c))
    tl.store(p_sequences + 4 * pairs + i_rejected, beta * (v_r if HAS_REFERENCE else s_r))
    tl.store(p_pairs + i_pair, share * loss + nll * supervised)
    tl.store(p_pairs + pairs + i_pair, supervised)
    tl.store(p_pairs + 2 * pairs + i_pair, log_odds)
    tl.store(p_pairs + 3 * pairs + i_pair, -nls_odds)


@triton.jit(do_not_specialize=["n", "rows"])
def _row_kernel(
    p_logp,  # [N]
    p_reference,  # [N]
    p_starts,  # [S] int64
    p_lengths,  # [S] int64
    p_labels,  # [R] int8, 1 for desirable
    p_kl,  # [1]
    p_numbers,
    p_coefficients,  # [N]
    p_sequences,  # [3, R] sums, the same of the reference, rewards
    p_share,  # [R] of the loss
    n,
    rows,  # R; the S − R sequences after them are mismatched: their coefficients are 0
    examples,
    BLOCK: tl.constexpr,
):
    """KTO: w·σ(z)/examples with z = ∓β(ratio − KL), − for a desirable row; ∂/∂L = ∓w·β·σ(z)σ(−z)/examples."""
    i_row = tl.program_id(0)
    start, length = tl.load(p_starts + i_row), tl.load(p_lengths + i_row)
    if i_row < rows:
        total, _, reference, _ = _segment_sums(  # pyright: ignore[reportGeneralTypeIssues]
            p_logp, p_reference, p_logp, start, length, n, length, 1.0, YES, NO, NO, BLOCK
        )
        ratio = total - reference  # pyright: ignore[reportOperatorIssue]
        beta = tl.load(p_numbers + BETA)
        desirable = tl.load(p_labels + i_row) != 0
        weight = tl.where(desirable, tl.load(p_numbers + DESIRABLE), tl.load(p_numbers + UNDESIRABLE)) / examples
        sign = tl.where(desirable, -1.0, 1.0)
        _, _, sigma, sigma_not = logistic(sign * beta * (ratio - tl.load(p_kl)))
        slope = sign * weight * beta * (sigma * sigma_not)
        _write_coefficients(p_coefficients, start, length, n, slope, 0.0, length, 1.0, NO, BLOCK)
        tl.store(p_sequences + i_row, total)
        tl.store(p_sequences + rows + i_row, reference)
        tl.store(p_sequences + 2 * rows + i_row, beta * ratio)
        tl.store(p_share + i_row, weight * sigma)
    else:
        _write_coefficients(p_coefficients, start, length, n, 0.0, 0.0, length, 1.0, NO, BLOCK)
