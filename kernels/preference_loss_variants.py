"""The table of the losses of one pair: each entry is a Triton function that states a loss and its derivatives.

To add a loss, add one function with `@variant` here, and its formula in torch to `fastpref/losses/pairs.py`. Kernels,
launches and the compile report take their losses from `VARIANTS`; a kernel compiles only the entries that it is given.
"""
# Some releases of Triton type a call of a compiled function as NoReturn.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastpref.kernels.elementary_triton import LN2, exp, expm1, log1p, logistic

VARIANTS: dict[str, Any] = {}  # name → Triton function, in the order in which a kernel adds them up

LARGEST_EXPONENT = tl.constexpr(80.0)  # the same bound as in `losses.pairs._bounded_expm1`
LARGEST_ROOT = tl.constexpr(1e18)  # the same bound as in `losses.pairs._bounded_square`
LARGEST_AVERAGE = tl.constexpr(-1e-30)  # the same bound as in `losses.pairs._log1mexp`


class Pair(NamedTuple):
    """The arguments of a loss of one pair, float32 scalars. _c is the chosen completion, _r the rejected one."""

    x: Any  # β(s_c − s_r) − margin, where s are the scores
    m: Any  # difference of the scores per token
    v_c: Any  # value: log-probability or log-ratio, a mean if AVERAGED
    v_r: Any
    numbers: Any  # the loss's `Numbers`


class PairTerm(NamedTuple):
    """A loss of one pair, its derivatives with respect to the fields of `Pair`, and the metrics that ORPO logs."""

    loss: Any
    by_x: Any = 0.0
    by_m: Any = 0.0
    by_c: Any = 0.0  # with respect to v_c, without the paths through x or m
    by_r: Any = 0.0
    log_odds: Any = 0.0  # logged by ORPO
    nls_odds: Any = 0.0  # −logσ(log_odds)


class VariantSet(tuple):
    """Some functions of the table, as a compile-time constant of a kernel and part of its cache key."""

    @property
    def cache_key(self) -> str:
        """The key for Triton's disk cache, which would otherwise miss a change in a function inside a tuple."""
        return "-".join(function.cache_key for function in self)


def variant(function: Callable[..., Any]) -> Any:
    """Compile a function from a `Pair` to a `PairTerm`, and add it to the table under its name."""
    VARIANTS[function.__name__] = compiled = triton.jit(function)
    return compiled


# --- losses of x ------------------------------------------------------------------------------------------------------
# nls is −logσ, ε the label smoothing.


@variant
def sigmoid(pair):
    """−(1−ε)·logσ(x) − ε·logσ(−x);  ∂ₓ = −(1−ε)·σ(−x) + ε·σ(x)"""
    eps = pair.numbers.smoothing
    nls_x, nls_not_x, sigma_x, sigma_not_x = logistic(pair.x)
    return PairTerm((1.0 - eps) * nls_x + eps * nls_not_x, by_x=eps * sigma_x - (1.0 - eps) * sigma_not_x)


@variant
def hinge(pair):
    """max(0, 1 − x);  ∂ₓ = −[x < 1]"""
    room = 1.0 - pair.x
    return PairTerm(tl.where(room < 0, 0.0, room), by_x=tl.where(room > 0, -1.0, 0.0))


@variant
def exo_pair(pair):
    """q(log q − log(1−ε)) + (1−q)(log(1−q) − log ε), q = σ(x);  ∂ₓ = q(1−q)(x − log(1−ε) + log ε)"""
    log_kept, log_flipped = pair.numbers.log_unsmoothed, pair.numbers.log_smoothing
    nls_x, nls_not_x, sigma_x, sigma_not_x = logistic(pair.x)
    return PairTerm(
        exp(-nls_x) * (-nls_x - log_kept) + exp(-nls_not_x) * (-nls_not_x - log_flipped),
        by_x=(sigma_x * sigma_not_x) * (pair.x - log_kept + log_flipped),
    )


@variant
def robust(pair):
    """(−(1−ε)·logσ(x) + ε·logσ(−x))/(1−2ε);  ∂ₓ = −((1−ε)·σ(−x) + ε·σ(x))/(1−2ε)"""
    eps, scale = pair.numbers.smoothing, 1.0 / pair.numbers.unflipped
    nls_x, nls_not_x, sigma_x, sigma_not_x = logistic(pair.x)
    return PairTerm(
        scale * ((1.0 - eps) * nls_x - eps * nls_not_x), by_x=-scale * ((1.0 - eps) * sigma_not_x + eps * sigma_x)
    )


@variant
def discopop(pair):
    """−logσ(x)·σ(−y) + e^{logσ(y) − x}, y = x/τ
    ∂ₓ = −σ(−x)·σ(−y) + logσ(x)·σ(y)σ(−y)/τ + e^{logσ(y) − x}·(σ(−y)/τ − 1)"""
    tau = pair.numbers.discopop_tau
    nls_x, _, _, sigma_not_x = logistic(pair.x)
    nls_y, _, sigma_y, sigma_not_y = logistic(pair.x / tau)
    exponent = -nls_y - pair.x
    inside = exponent <= LARGEST_EXPONENT
    exponential = exp(tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent))
    by_x = tl.where(inside, exponential * (sigma_not_y / tau - 1.0), 0.0)
    by_x -= sigma_not_x * sigma_not_y + nls_x * (sigma_y * sigma_not_y / tau)
    return PairTerm(nls_x * sigma_not_y + exponential, by_x=by_x)


# --- losses of m ------------------------------------------------------------------------------------------------------


@variant
def ipo(pair):
    """(m − 1/2β)²;  ∂ₘ = 2(m − 1/2β)"""
    root = pair.m - pair.numbers.half_inverse_beta
    inside = (root >= -LARGEST_ROOT) & (root <= LARGEST_ROOT)
    root = tl.where(root > LARGEST_ROOT, LARGEST_ROOT, root)
    root = tl.where(root < -LARGEST_ROOT, -LARGEST_ROOT, root)
    return PairTerm(root * root, by_m=tl.where(inside, 2.0 * root, 0.0))


@variant
def sigmoid_norm(pair):
    """−logσ(βm);  ∂ₘ = −β·σ(−βm)"""
    beta = pair.numbers.beta
    nls_m, _, _, sigma_not_m = logistic(beta * pair.m)
    return PairTerm(nls_m, by_m=-beta * sigma_not_m)


# --- losses of v_c and v_r --------------------------------------------------------------------------------------------
# r_c = β·v_c and r_r = β·v_r are the rewards; σ′ = σ(1 − σ).


@variant
def nca_pair(pair):
    """−logσ(r_c) − ½logσ(−r_c) − ½logσ(−r_r);  ∂_c = β(½σ(r_c) − σ(−r_c)), ∂_r = ½β·σ(r_r)"""
    beta = pair.numbers.beta
    nls_c, nls_not_c, sigma_c, sigma_not_c = logistic(beta * pair.v_c)
    _, nls_not_r, sigma_r, _ = logistic(beta * pair.v_r)
    return PairTerm(
        nls_c + 0.5 * nls_not_c + 0.5 * nls_not_r,
        by_c=beta * (0.5 * sigma_c - sigma_not_c),
        by_r=beta * (0.5 * sigma_r),
    )


@variant
def bco_pair(pair):
    """−logσ(r_c) − logσ(−r_r);  ∂_c = −β·σ(−r_c), ∂_r = β·σ(r_r)"""
    beta = pair.numbers.beta
    nls_c, _, _, sigma_not_c = logistic(beta * pair.v_c)
    _, nls_not_r, sigma_r, _ = logistic(beta * pair.v_r)
    return PairTerm(nls_c + nls_not_r, by_c=-beta * sigma_not_c, by_r=beta * sigma_r)


@variant
def sppo_hard(pair):
    """(v_c − 1/2β)² + (v_r + 1/2β)²;  ∂_c = 2(v_c − 1/2β), ∂_r = 2(v_r + 1/2β)"""
    half = pair.numbers.half_inverse_beta
    root_c, root_r = pair.v_c - half, pair.v_r + half
    return PairTerm(root_c * root_c + root_r * root_r, by_c=2.0 * root_c, by_r=2.0 * root_r)


@variant
def apo_zero(pair):
    """σ(−r_c) + σ(r_r);  ∂_c = −β·σ′(r_c), ∂_r = β·σ′(r_r)"""
    beta = pair.numbers.beta
    _, _, sigma_c, sigma_not_c = logistic(beta * pair.v_c)
    _, _, sigma_r, sigma_not_r = logistic(beta * pair.v_r)
    return PairTerm(sigma_not_c + sigma_r, by_c=-beta * (sigma_c * sigma_not_c), by_r=beta * (sigma_r * sigma_not_r))


@variant
def apo_down(pair):
    """σ(r_c) + σ(d), d = r_r − r_c;  ∂_c = β(σ′(r_c) − σ′(d)), ∂_r = β·σ′(d)"""
    beta = pair.numbers.beta
    _, _, sigma_c, sigma_not_c = logistic(beta * pair.v_c)
    _, _, sigma_d, sigma_not_d = logistic(beta * pair.v_r - beta * pair.v_c)
    return PairTerm(
        sigma_c + sigma_d,
        by_c=beta * (sigma_c * sigma_not_c - sigma_d * sigma_not_d),
        by_r=beta * (sigma_d * sigma_not_d),
    )


@variant
def odds_ratio(pair):
    """−logσ(o_c − o_r), o = v − log(1 − eᵛ);  ∂_c = −σ(o_r − o_c)/(1 − e^{v_c}), ∂_r = σ(o_r − o_c)/(1 − e^{v_r})"""
    odds_c, slope_c = _log_odds(pair.v_c)
    odds_r, slope_r = _log_odds(pair.v_r)
    log_odds = odds_c - odds_r
    nls_odds, _, _, sigma_not_odds = logistic(log_odds)
    return PairTerm(
        nls_odds, by_c=-sigma_not_odds * slope_c, by_r=sigma_not_odds * slope_r, log_odds=log_odds, nls_odds=nls_odds
    )


@triton.jit
def _log_odds(v):
    """v − log(1 − eᵛ) and its derivative 1/(1 − eᵛ), for v ≤ 0."""
    x = tl.where(v > LARGEST_AVERAGE, LARGEST_AVERAGE, v)
    near = x > -LN2
    missing = -expm1(x)
    large = tl.where(near, -1.0, x)  # each branch gets only the values for which it is accurate
    log1mexp = tl.where(near, tl.log(missing), log1p(-exp(large)))
    return v - log1mexp, tl.where(v > LARGEST_AVERAGE, 1.0, 1.0 / missing)
