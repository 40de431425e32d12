"""Launches the Triton kernels of the vocabulary walk; the same functions as `linear_logprob_torch.py`."""

import torch
import triton
from torch import Tensor

from fastpref.kernels.linear_logprob_torch import HeadGrads, LogitTransform, Walk
from fastpref.kernels.linear_logprob_triton import (
    EXP,
    FORWARD,
    GRADIENT,
    _combine_kernel,
    _gradient_kernel,
    _rescale_kernel,
    _walk_kernel,
)
from fastpref.kernels.tiles import Tile, Tiles, choose_tiles, interpreted

# How far, in nats, a maximum may run above a row's offset before the offset moves: e^20 leaves sums of squares over any
# vocabulary far inside float32. float16 holds 65,504 at most, so there the offset moves with every maximum.
LAZY = 20.0


def walk_vocabulary(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    *,
    outputs: tuple[str, ...],
    budget: int,  # bytes
    with_grad: bool,
    lazy: float = LAZY,
) -> Walk:
    """As `linear_logprob_torch.walk_vocabulary`. `lazy` is how far a maximum may run ahead of its row's offset."""
    tiles = _tiles(hidden)
    lean = with_grad and bias is None and transform.softcap is None and not outputs
    tile = tiles.lean if lean else tiles.full
    rows, columns = hidden.shape[0], weight.shape[0]
    if with_grad:
        rows, columns = plan_tile(rows, columns, hidden.element_size(), budget, tile)
    parts = []
    for a in range(0, hidden.shape[0], rows):
        walk = _Walk(hidden[a : a + rows], weight, targets[a : a + rows], bias, transform, outputs, tile, lazy)
        parts.append(walk.with_gradient(columns) if with_grad else walk.forward())
    if len(parts) == 1:
        return parts[0]
    return Walk._make(None if part[0] is None else torch.cat(part) for part in zip(*parts))


def _tiles(hidden: Tensor) -> Tiles:
    tiles = choose_tiles(hidden)
    if tiles is None:
        raise ValueError(f"linear_logprob: the triton backend has no tile for {hidden.dtype} on {hidden.device}")
    return tiles


def plan_tile(n: int, vocabulary: int, size: int, budget: int, tile: Tile) -> tuple[int, int]:
    """Rows and columns of the stored tile: all rows while they leave it 2,048 columns wide, then fewer rows."""
    columns = max(2048, min(8192, budget // (n * size))) // tile.v * tile.v
    columns = min(columns, triton.cdiv(vocabulary, tile.v) * tile.v)
    return max(1, min(n, budget // (columns * size))), columns


class _Walk:
    """The walk of some rows: running statistics, and the launches that add to them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        outputs: tuple[str, ...],
        tile: Tile,
        lazy: float,
    ):
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.targets, self.bias, self.transform, self.outputs, self.tile = targets, bias, transform, outputs, tile
        self.lazy = 0.0 if hidden.dtype == torch.float16 else lazy
        n = hidden.shape[0]
        running = [float("-inf"), 0.0, float("-inf"), 0.0, 0.0, 0.0, float("-inf"), float("-inf")]
        start = torch.tensor(running, dtype=torch.float32, device=hidden.device)
        self.running = start[:, None].repeat(1, n)  # [8, N]
        self.shrunk = torch.empty(n, dtype=torch.float32, device=hidden.device)
        self.flags = {
            "HAS_SPREAD": "entropy" in outputs or "log_sum_sq_probs" in outputs,
            "HAS_MEAN": "mean_logit" in outputs,
            "HAS_TOP1": "is_top1" in outputs,
        }

    def forward(self) -> Walk:
        """Statistics alone: the vocabulary in as many splits as keep the device busy."""
        n, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        row_blocks, column_blocks = triton.cdiv(n, self.tile.n), triton.cdiv(vocabulary, self.tile.v)
        splits = max(1, min(column_blocks, triton.cdiv(4 * processors(self.hidden.device), row_blocks), 64))
        per_split = triton.cdiv(column_blocks, splits) * self.tile.v
        splits = triton.cdiv(vocabulary, per_split)
        self._launch(FORWARD.value, 0, vocabulary, per_split, splits, tile=None)
        return self._result(None)

    def with_gradient(self, columns: int) -> Walk:
        """Statistics and g: the exponentials of `columns` columns at a time, and the product with the weight."""
        n, width = self.hidden.shape
        vocabulary = self.weight.shape[0]
        stored = torch.empty((n, min(columns, vocabulary)), dtype=self.hidden.dtype, device=self.hidden.device)
        others = torch.zeros((n, width), dtype=torch.float32, device=self.hidden.device)  # O
        for first in range(0, vocabulary, columns):
            last = min(first + columns, vocabulary)
            blocks = triton.cdiv(last - first, self.tile.v)
            base = self._launch(EXP.value, first, last, self.tile.v, blocks, tile=stored)
            tile = stored[:, : last - first]
            self._rescale(tile, base, is_factor=False)
            if first:
                self._rescale(others, self.shrunk, is_factor=True)
            add_product(others, tile, self.weight[first:last])
        return self._result(others)

    def _launch(self, mode: int, first: int, last: int, per_split: int, splits: int, tile: Tensor | None) -> Tensor:
        """Walk columns [first, last) in splits and combine their statistics. Returns the splits' bases, [S, N]."""
        n = self.hidden.shape[0]
        parts = torch.empty((8, splits, n), dtype=torch.float32, device=self.hidden.device)
        out = self.shrunk if tile is None else tile  # anything: FORWARD stores no tile
        launch_walk(
            mode, self.hidden, self.weight, self.bias, self.targets, self.running[0], self.shrunk, self.shrunk, out,
            parts, first, last, per_split, splits, self.transform, self.flags, self.tile, self.lazy,
        )  # fmt: skip
        block = 128
        _combine_kernel[(triton.cdiv(n, block),)](
            *parts.unbind(0), self.running, self.shrunk, n, splits, **self.flags, BLOCK_N=block, num_warps=4
        )
        return parts[0]

    def _rescale(self, matrix: Tensor, base: Tensor, *, is_factor: bool) -> None:
        n, columns = matrix.shape
        block_n, block_v = 32, self.tile.v
        _rescale_kernel[(triton.cdiv(n, block_n), triton.cdiv(columns, block_v))](
            matrix, base, self.running[0], n, columns, matrix.stride(0),
            IS_FACTOR=is_factor, BLOCK_N=block_n, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip

    def _result(self, others: Tensor | None) -> Walk:
        offset, sum_others, z_target, sum_ez, sum_ee, sum_z, largest, ahead = self.running.unbind(0)
        behind = z_target - offset
        x = sum_others.log() - behind  # log of the odds against the target
        logp = -torch.nn.functional.softplus(x)
        log_s = behind - logp
        e_target, s = behind.exp(), log_s.exp()
        grad = None
        if others is not None:
            slope = self.transform.slope
            coefficient = slope * torch.sigmoid(x) * self.transform.softcap_slope(z_target)
            grad = self._gradient(others, coefficient, slope * (-log_s).exp())
        entropy = log_s - (sum_ez + e_target * behind) / s
        log_sum_sq_probs = (sum_ee + e_target.square()).log() - 2 * log_s
        return Walk(
            z_target=z_target,
            maximum=offset,
            sum_others=sum_others,
            logp=logp,
            entropy=entropy if "entropy" in self.outputs else None,
            mean_logit=sum_z / self.weight.shape[0] if "mean_logit" in self.outputs else None,
            log_sum_sq_probs=log_sum_sq_probs if "log_sum_sq_probs" in self.outputs else None,
            is_top1=(z_target >= largest) & (z_target > ahead) if "is_top1" in self.outputs else None,
            grad=grad,
        )

    def _gradient(self, others: Tensor, coefficient: Tensor, inverse: Tensor) -> Tensor:
        n, width = others.shape
        dtype = torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype
        out = torch.empty((n, width), dtype=dtype, device=others.device)
        block_n, block_h = 16, 128
        _gradient_kernel[(triton.cdiv(n, block_n), triton.cdiv(width, block_h))](
            others, self.weight, self.targets, coefficient, inverse, out, n, width,
            others.stride(0), self.weight.stride(0), out.stride(0), BLOCK_N=block_n, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
        return out


def recompute_gradients(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    walk: tuple[Tensor, Tensor, Tensor],  # z_target, offset, sum_others: each [N]
    *,
    budget: int,  # bytes
    wanted: tuple[bool, bool, bool],  # hidden, weight, bias
) -> HeadGrads:
    """As `linear_logprob_torch.recompute_gradients`: the tile of ∂loss/∂logits from the kernel, its products from the
    library, the vocabulary outermost."""
    lean = bias is None and transform.softcap is None
    tile = _tiles(hidden).lean if lean else _tiles(hidden).full
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    z_target, offset, sum_others = walk
    behind = z_target - offset
    x = sum_others.log() - behind
    log_s = behind + torch.nn.functional.softplus(x)
    share = grad_logp.float() * transform.slope
    factor, at_target = -share * (-log_s).exp(), share * torch.sigmoid(x)
    (n, width), vocabulary = hidden.shape, weight.shape[0]
    rows, columns = plan_tile(n, vocabulary, hidden.element_size(), budget, tile)
    stored = torch.empty((rows, min(columns, vocabulary)), dtype=hidden.dtype, device=hidden.device)
    want_hidden, want_weight, want_bias = wanted
    d_hidden = torch.zeros((n, width), dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = torch.empty_like(weight) if want_weight else None
    d_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    flags = {"HAS_SPREAD": False, "HAS_MEAN": False, "HAS_TOP1": False}
    for first in range(0, vocabulary, columns):
        last = min(first + columns, vocabulary)
        dw = torch.zeros((last - first, width), dtype=torch.float32, device=hidden.device) if want_weight else None
        db = torch.zeros(last - first, dtype=torch.float32, device=hidden.device) if d_bias is not None else None
        for a in range(0, n, rows):
            b = min(a + rows, n)
            out = stored[: b - a, : last - first]
            launch_walk(
                GRADIENT.value, hidden[a:b], weight, bias, targets[a:b], offset[a:b], factor[a:b], at_target[a:b], out,
                offset[None, None].expand(8, 1, n), first, last, tile.v, triton.cdiv(last - first, tile.v), transform,
                flags, tile, 0.0,
            )  # fmt: skip
            if d_hidden is not None:
                add_product(d_hidden[a:b], out, weight[first:last])
            if dw is not None:
                add_product(dw, out.t(), hidden[a:b])
            if db is not None:
                db += out.sum(0, dtype=torch.float32)
        if d_weight is not None and dw is not None:
            d_weight[first:last] = dw
        if d_bias is not None and db is not None:
            d_bias[first:last] = db
    return HeadGrads(None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias)


def launch_walk(
    mode: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    factor: Tensor,
    at_target: Tensor,
    out: Tensor,
    parts: Tensor,  # [8, S, N]
    first: int,
    last: int,
    per_split: int,
    splits: int,
    transform: LogitTransform,
    flags: dict[str, bool],
    tile: Tile,
    lazy: float,
) -> None:
    _walk_kernel[(triton.cdiv(hidden.shape[0], tile.n), splits)](
        hidden, weight, hidden if bias is None else bias, targets, offset, factor, at_target, out, *parts.unbind(0),
        hidden.shape[0], first, last, hidden.shape[1], hidden.stride(0), weight.stride(0),
        out.stride(0) if out.dim() == 2 else 0, per_split, transform.gain, transform.cap, lazy,
        MODE=mode, HAS_BIAS=bias is not None, HAS_SOFTCAP=transform.softcap is not None, **flags,
        BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_H=tile.h,
        PRECISION=tile.precision, UPCAST=interpreted(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right, accumulated in float32, by the library's matrix product."""
    right = right.to(left.dtype)
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # the interpreter's tensors are on a CPU, where a product of half precision is rounded to it
        total.addmm_(left.float(), right.float())


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
