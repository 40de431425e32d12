"""Elementary functions for Triton kernels, in float32, accurate to a few units in the last place.

Triton has no expm1 and no log1p (libdevice's do not run in its interpreter), and a GPU's exp has an error of |x|
roundings. A clamp is written as `where(x > bound, bound, x)`, which, unlike a minimum, propagates a NaN.
"""

import triton
import triton.language as tl

# ln 2 in two parts, the first with so few bits that its product with a whole number is exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
LN2, LOG2_E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def _exp_parts(x):
    """Return 2ᵏ and e^r − 1 with eˣ = 2ᵏ·e^r, |r| ≤ ½ ln 2.

    Outside the range of float32, 2ᵏ is 0 (below e⁻⁸⁷) or infinite (above e⁸⁸).
    """
    tiny = x < -87.0
    x = tl.where(tiny, -87.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    k = tl.floor(x * LOG2_E + 0.5)
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # exact, unlike some GPUs' exp2
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    tail = 1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320))
    tail = 0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * tail)))
    return tl.where(tiny, 0.0, power), r + r * r * tail


@triton.jit
def exp(x):
    scale, rest = _exp_parts(x)  # pyright: ignore[reportGeneralTypeIssues]
    return scale * (1.0 + rest)


@triton.jit
def expm1(x):
    scale, rest = _exp_parts(x)  # pyright: ignore[reportGeneralTypeIssues]
    return scale * rest + (scale - 1.0)


@triton.jit
def log1p(u):
    """Return 2·artanh(u/(2 + u)), for −½ ≤ u ≤ 1."""
    t = u / (2.0 + u)
    q = t * t
    tail = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17))))
    tail = q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * tail)))
    return 2.0 * (t + t * tail)


@triton.jit
def logistic(x):
    """Return −logσ(x), −logσ(−x), σ(x) and σ(−x), all from one exponential."""
    e = exp(-tl.abs(x))
    rest = log1p(e)
    larger, smaller = 1.0 / (1.0 + e), e / (1.0 + e)
    positive = x >= 0
    return (
        rest + tl.where(positive, 0.0, -x),
        rest + tl.where(positive, x, 0.0),
        tl.where(positive, larger, smaller),
        tl.where(positive, smaller, larger),
    )
