"""Token log-probabilities of a linear head by tiles of the vocabulary, in plain torch operations.

With z = softcap(a·(h·W + b))/τ and the target y, one walk over the vocabulary updates, for every row, the running
maximum m and the sums below *without the target's column*, where E = exp(z − m):

    s_o = Σ_{v≠y} E_v                    O = Σ_{v≠y} E_v · softcap'_v · W_v
    logp = (z_y − m) − log(s_o + e^{z_y − m})
    g = ∂logp/∂h = (a/τ) · [ (s_o/s) · softcap'_y · W_y − O/s ],     s = s_o + e^{z_y − m}

A loss depends on the model only through logp. So with a frozen head g is the whole gradient up to one scalar per row,
and the backward pass needs no second walk. The sums exclude the target because W_y − Σ p_v·W_v cancels if p_y is near
one: there 1 − p_y must come from the sum over the other tokens.

Logits, exponentials and sums are float32 (float64 for float64 inputs), whatever the dtype of the inputs. All large
operations work in place in one tile, whose size fits the budget and the cache of a CPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.head_weight import HeadWeight

# Columns of a tile: wide enough for the matrix product, narrow enough that a tile of some hundred rows stays in cache.
TILE_COLUMNS = 8192
# In a matrix product with fewer rows or columns than this, the library may compute each value as one long sum.
FEW_ROWS = 16
RUN = 256  # columns of a tile that such a product may sum at a time


@dataclass(frozen=True)
class LogitTransform:
    """The function z = softcap(scale · x)/temperature of a raw logit x, where softcap(x) = c·tanh(x/c)."""

    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        """The factor by which the matrix product becomes z, or with a softcap the argument of tanh."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def slope(self) -> float:
        """The factor of dz/dx without softcap', the same for every logit."""
        return self.scale / self.temperature

    @property
    def cap(self) -> float:
        """The value of z where tanh is 1: c/τ, or 1 without a softcap."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature

    def softcap_slope(self, z: Tensor) -> Tensor | float:
        """Return softcap' at the logit whose transformed value is z."""
        if self.softcap is None:
            return 1.0
        return 1 - (z / self.cap).square()


class WalkResult(NamedTuple):
    """The results of one walk over the vocabulary for each row, float32 (float64 for float64 inputs)."""

    z_target: Tensor  # [N]
    maximum: Tensor  # [N] m, the offset of the sums; with Triton a number near the maximum
    sum_others: Tensor  # [N] s_o
    logp: Tensor  # [N]
    entropy: Tensor | None  # [N]
    mean_logit: Tensor | None  # [N]
    log_sum_sq_probs: Tensor | None  # [N]
    is_top1: Tensor | None  # [N] bool
    grad: Tensor | None  # [N, H] g, in the dtype of `hidden`; float32 for float16


class TileShape(NamedTuple):
    rows: int
    columns: int


def compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def plan_tile(
    hidden: Tensor,  # [N, H]
    vocabulary: int,
    budget: int,  # bytes
    *,
    buffers: int,  # [rows, columns] scratch tensors that exist at once
    weight_copies: int,  # [columns, H] scratch tensors that exist at once
) -> TileShape:
    """Return the largest tile within the budget: first the columns, whose weight copies may take half, then the rows.

    Only a tile of one row and one column may exceed the budget.
    """
    n, width = hidden.shape
    size = compute_dtype(hidden).itemsize
    copied = weight_copies * width * size  # bytes per column
    columns = min(TILE_COLUMNS, vocabulary, budget // (buffers * size + copied))
    if copied:
        columns = min(columns, budget // 2 // copied)
    columns = max(1, columns)
    spare = budget - columns * copied
    return TileShape(max(1, min(n, spare // (buffers * columns * size))), columns)


def _spans(length: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class _Scratch:
    """The scratch tiles of one walk, allocated once and cut to the size of each tile."""

    def __init__(self, hidden: Tensor, tile: TileShape, *, buffers: int, cast_weight: bool, trained: int = 0):
        dtype = compute_dtype(hidden)
        self._buffers = [hidden.new_empty(tile, dtype=dtype) for _ in range(buffers)]
        self._cast = hidden.new_empty((tile.columns, hidden.shape[1]), dtype=dtype) if cast_weight else None
        self._grads = hidden.new_empty((tile.columns, trained), dtype=dtype)

    def __getitem__(self, place: tuple[int, int, int]) -> Tensor:
        buffer, rows, columns = place
        return self._buffers[buffer][:rows, :columns]

    def weights(self, weight: Tensor) -> Tensor:
        """Return a slice of the weight [c, H] in the dtype of the computation: itself, or a copy."""
        return weight if self._cast is None else self._cast[: weight.shape[0]].copy_(weight)

    def weight_grads(self, columns: int) -> Tensor:
        """Return zeros for a slice of the weight's gradient, [columns, T]."""
        return self._grads[:columns].zero_()


def _logits(
    out: Tensor,  # [n, c] scratch
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [c, H]
    bias: Tensor | None,  # [c]
    transform: LogitTransform,
) -> Tensor:
    """Write gain·(h·Wᵀ + b) to `out`, which is z, or with a softcap the tanh t of it, with z = (c/τ)·t."""
    gain = transform.gain
    if bias is None:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=gain, out=out)
    else:
        torch.addmm(bias.to(hidden.dtype), hidden, weight.t(), beta=gain, alpha=gain, out=out)
    return out if transform.softcap is None else out.tanh_()


def _softcap_slope(tangent: Tensor) -> Tensor:
    """Compute softcap' = 1 − t² in place."""
    return tangent.square_().neg_().add_(1)


def _add_product(out: Tensor, e: Tensor, w: Tensor) -> None:
    """Add e [n, c] · w [c, H] to `out` [n, H].

    For large matrices a BLAS splits the sums over c into blocks. For a few rows it need not: MKL adds up all 8,192
    columns of a tile one after another, with an error of 10 to 50 roundings instead of one. So they are split here.
    """
    if e.shape[1] <= RUN or min(out.shape) >= FEW_ROWS:
        out.addmm_(e, w)
        return
    part = torch.empty_like(out)
    for a, b in _spans(e.shape[1], RUN):
        out += torch.mm(e[:, a:b], w[a:b], out=part)


def _put_targets(
    tile: Tensor,  # [n, c]
    targets: Tensor,  # [n] int64
    start: int,  # the tile's first column
    value: Tensor | float,  # [n]
) -> tuple[Tensor, Tensor]:
    """Put a value at every target inside this tile. Return which targets are inside, [n] bool, and the old values, [n].

    No shape depends on the targets, so that the host does not wait for the device and fake tensors work.
    """
    place = targets - start
    inside, columns = (place >= 0) & (place < tile.shape[1]), place.clamp(0, tile.shape[1] - 1)[:, None]
    before = tile.gather(1, columns)[:, 0]
    tile.scatter_(1, columns, torch.where(inside, value, before)[:, None])
    return inside, before


def walk_vocabulary(
    hidden: Tensor,  # [N, H]
    weight: HeadWeight,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    *,
    outputs: tuple[str, ...],
    budget: int,  # bytes
    with_grad: bool,
) -> WalkResult:
    """Walk over the vocabulary for all rows. Return log-probabilities, the requested outputs, and g if `with_grad`."""
    spread = "entropy" in outputs or "log_sum_sq_probs" in outputs
    buffers = 1 + (transform.softcap is not None) + spread
    cast = weight.dtype != compute_dtype(hidden)
    tile = plan_tile(hidden, weight.shape[0], budget, buffers=buffers, weight_copies=weight.copies + cast)
    scratch = _Scratch(hidden, tile, buffers=buffers, cast_weight=cast)
    parts = []
    for r, q in _spans(hidden.shape[0], tile.rows):
        rows = _Rows(hidden[r:q], targets[r:q], transform, outputs, with_grad)
        for a, b in _spans(weight.shape[0], tile.columns):
            w = scratch.weights(weight.rows(a, b))
            z = _logits(scratch[0, q - r, b - a], rows.hidden, w, None if bias is None else bias[a:b], transform)
            tangent = None
            if transform.softcap is not None:
                tangent, z = z, torch.mul(z, transform.cap, out=scratch[1, q - r, b - a])
            rows.fold(z, tangent, scratch[-1, q - r, b - a] if spread else z, w, a)
        parts.append(rows.result(weight, hidden.dtype))
    if len(parts) == 1:
        return parts[0]
    return WalkResult._make(None if column[0] is None else torch.cat(column) for column in zip(*parts))


class _Rows:
    """The running sums of n rows during the walk over the vocabulary, float32 (or float64)."""

    def __init__(
        self, hidden: Tensor, targets: Tensor, transform: LogitTransform, outputs: tuple[str, ...], with_grad: bool
    ):
        h = self.hidden = hidden.to(compute_dtype(hidden))  # [n, H]
        n = len(h)
        self.targets, self.transform, self.outputs = targets, transform, outputs
        self.maximum = h.new_full((n,), float("-inf"))  # m, over all columns
        self.z_target = h.new_zeros(n)
        self.sum_others = h.new_zeros(n)  # s_o
        self.sum_z = h.new_zeros(n)  # Σ z
        self.sum_ez = h.new_zeros(n)  # Σ_{v≠y} E·(z − m)
        self.sum_ee = h.new_zeros(n)  # Σ_{v≠y} E²
        self.leads = torch.zeros(n, dtype=torch.bool, device=h.device)  # whether the target became the maximum
        self.others = torch.zeros_like(h) if with_grad else None  # O

    def fold(
        self,
        z: Tensor,  # [n, c], overwritten
        tangent: Tensor | None,  # [n, c], overwritten
        e: Tensor,  # [n, c] output for the exponentials; z itself if z is not needed any more
        w: Tensor,  # [c, H]
        start: int,  # the tile's first column
    ) -> None:
        """Add one tile of the vocabulary to the sums."""
        if "is_top1" in self.outputs:
            tile_maximum, where = z.max(dim=1)
            self.leads |= (tile_maximum > self.maximum) & (where == self.targets - start)
        else:
            tile_maximum = z.amax(dim=1)
        if "mean_logit" in self.outputs:
            self.sum_z += z.sum(dim=1)
        maximum = torch.maximum(self.maximum, tile_maximum)
        # A value whose exp is 0, but finite, so that its product with 0 is 0.
        inside, values = _put_targets(z, self.targets, start, torch.finfo(z.dtype).min / 4)
        self.z_target = torch.where(inside, values, self.z_target)

        moved = self.maximum - maximum  # −inf at the first tile, where every sum is still zero
        shrink = moved.exp()
        spread = e is not z
        torch.exp(z.sub_(maximum[:, None]), out=e)
        if spread:
            before = torch.where(self.sum_others > 0, shrink * (self.sum_ez + moved * self.sum_others), 0)
            self.sum_ez = before + z.mul_(e).sum(dim=1)
            self.sum_ee = self.sum_ee * shrink.square() + torch.linalg.vector_norm(e, dim=1).square()
        self.sum_others = self.sum_others * shrink + e.sum(dim=1)
        if self.others is not None:
            weighted = e if tangent is None else _softcap_slope(tangent).mul_(e)
            if start:
                self.others.mul_(shrink[:, None])
            _add_product(self.others, weighted, w)
        self.maximum = maximum

    def result(self, weight: HeadWeight, dtype: torch.dtype) -> WalkResult:
        """Compute the results from the sums of all tiles; `dtype` is that of the hidden states."""
        behind = self.z_target - self.maximum  # ≤ 0
        e_target = behind.exp()
        # Accurate even if the target is the maximum and s_o is tiny.
        log_s = torch.log1p(self.sum_others + torch.expm1(behind))
        s = self.sum_others + e_target
        entropy = log_s - (self.sum_ez + e_target * behind) / s
        log_sum_sq_probs = (self.sum_ee + e_target.square()).log() - 2 * log_s
        return WalkResult(
            z_target=self.z_target,
            maximum=self.maximum,
            sum_others=self.sum_others,
            logp=behind - log_s,
            entropy=entropy if "entropy" in self.outputs else None,
            mean_logit=self.sum_z / weight.shape[0] if "mean_logit" in self.outputs else None,
            log_sum_sq_probs=log_sum_sq_probs if "log_sum_sq_probs" in self.outputs else None,
            is_top1=self.leads & (self.z_target >= self.maximum) if "is_top1" in self.outputs else None,
            grad=None if self.others is None else self._gradient(self.others, s, weight, dtype),
        )

    def _gradient(self, others: Tensor, s: Tensor, weight: HeadWeight, dtype: torch.dtype) -> Tensor:
        """Compute g in the memory of O."""
        w_target = weight.gather(self.targets).to(others.dtype)
        coefficient = self.sum_others / s * self.transform.softcap_slope(self.z_target)
        others.mul_((-1 / s)[:, None]).addcmul_(w_target, coefficient[:, None])
        # float16 stays float32: a confident token's g would vanish before the loss scale reaches it.
        return others.mul_(self.transform.slope).to(others.dtype if dtype == torch.float16 else dtype)


def scale_rows(
    grad: Tensor,  # [N, H] g
    coefficient: Tensor,  # [N] ∂loss/∂logp
    positions: Tensor | None,  # [N] int64 in [0, M), repeats allowed; None: row n has position n
    rows: int,  # M
    dtype: torch.dtype,
) -> Tensor:
    """Return coefficient·g at every row's position, [M, H] of `dtype`: sums at repeated positions, zeros elsewhere."""
    scaled = grad * coefficient[:, None]
    if positions is not None:
        scaled = scaled.new_zeros(rows, grad.shape[1]).index_add_(0, positions, scaled)
    return scaled.to(dtype)


class HeadGrads(NamedTuple):
    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, T] for the trainable columns
    bias: Tensor | None  # [V]


def recompute_gradients(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: HeadWeight,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    statistics: Tensor,  # [3, N] z_target, maximum, sum_others
    *,
    budget: int,  # bytes
    wanted: tuple[bool, bool, bool],  # hidden, weight, bias
) -> HeadGrads:
    """Compute the gradients of Σ grad_logp·logp for a trainable head, for which each tile's logits are recomputed.

    ∂logp/∂z_v = −E_v/s for v ≠ y, and s_o/s for the target. The outer loop is over the vocabulary, so that each slice
    of the weight's gradient is accumulated in float32 and written once.
    """
    z_target, maximum, sum_others = statistics
    dtype = compute_dtype(hidden)
    want_hidden, want_weight, want_bias = wanted
    trained = weight.trained if want_weight else None
    cast, columns_trained = weight.dtype != dtype, 0 if trained is None else trained.shape[1]
    in_place = trained is not None and trained.dtype == dtype  # whether to sum in the gradient itself
    copies = weight.copies + cast + (trained is not None and not in_place)
    buffers = 1 + (transform.softcap is not None)
    tile = plan_tile(hidden, weight.shape[0], budget, buffers=buffers, weight_copies=copies)
    scratch = _Scratch(hidden, tile, buffers=buffers, cast_weight=cast, trained=0 if in_place else columns_trained)
    h = hidden.to(dtype)
    factor = grad_logp.to(dtype) * transform.slope / (sum_others + (z_target - maximum).exp())  # [N]
    at_target = factor * sum_others * transform.softcap_slope(z_target)  # [N]
    d_hidden = torch.zeros_like(h) if want_hidden else None
    d_weight = None if trained is None else torch.zeros_like(trained) if in_place else torch.empty_like(trained)
    d_bias = torch.empty_like(bias) if want_bias and bias is not None else None

    for a, b in _spans(weight.shape[0], tile.columns):
        w = scratch.weights(weight.rows(a, b))
        dw = None
        if d_weight is not None:
            dw = d_weight[a:b] if in_place else scratch.weight_grads(b - a)
        db = w.new_zeros(b - a) if d_bias is not None else None
        for r, q in _spans(h.shape[0], tile.rows):
            z = _logits(scratch[0, q - r, b - a], h[r:q], w, None if bias is None else bias[a:b], transform)
            tangent = None
            if transform.softcap is not None:
                tangent, z = z, torch.mul(z, transform.cap, out=scratch[1, q - r, b - a])
            d = z.sub_(maximum[r:q, None]).exp_()
            if tangent is not None:
                d.mul_(_softcap_slope(tangent))
            d.mul_(factor[r:q, None].neg())
            _put_targets(d, targets[r:q], a, at_target[r:q])
            if d_hidden is not None:
                _add_product(d_hidden[r:q], d, w)
            if dw is not None:
                dw.addmm_(d.t(), h[r:q, -columns_trained:])
            if db is not None:
                db += d.sum(dim=0)
        if d_weight is not None and dw is not None and not in_place:
            d_weight[a:b] = dw
        if d_bias is not None and db is not None:
            d_bias[a:b] = db
    return HeadGrads(None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias)
