"""Launches of the Triton kernels of the vocabulary walk, by the same functions as in `linear_logprob_torch.py`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.head_weight import DenseWeight, HeadWeight
from fastpref.kernels.launch import launch
from fastpref.kernels.linear_logprob_plan import WIDE, blocks_per_split, plan_tile, whole_blocks
from fastpref.kernels.linear_logprob_torch import HeadGrads, LogitTransform, TileShape, WalkResult
from fastpref.kernels.linear_logprob_triton import (
    EXP,
    FORWARD,
    GRADIENT,
    _combine_kernel,
    _gradient_kernel,
    _rescale_kernel,
    _scale_kernel,
    _walk_kernel,
)
from fastpref.kernels.tiles import Tile, cdiv, choose_tiles, interpreted

# How far, in nats, a maximum may be above a row's offset before the offset moves. With e^20, sums of squares over any
# vocabulary stay far inside float32's range. float16 ends at 65,504, so there the offset moves with every maximum.
LAZY = 20.0
# Row blocks that share L2: 16 of 128 rows of 4,096 hidden units are 17 MB in bfloat16, and GPUs have 40 MB or more.
GROUP = 16
# Splits, rows and columns of the blocks of the other kernels.
COMBINE_BLOCK = (64, 32)
RESCALE_ROWS = 32
GRADIENT_BLOCK = (16, 128)
SCALE_BLOCK = 1024


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
    lazy: float = LAZY,
    tile: Tile | None = None,
) -> WalkResult:
    """Compute the same as `linear_logprob_torch.walk_vocabulary`. `lazy` is explained at LAZY.

    Comparisons choose a `tile`; otherwise it is that of the table.
    """
    tile = tile or _choose_tile(hidden, bias, transform, outputs, stored=with_grad)
    shape = plan_tile(hidden, weight, budget, tile, stored=with_grad)
    logits = _Logits(bias, transform, outputs, tile, _product_tile(hidden, shape, tile))
    hidden = _rows_contiguous(hidden)
    parts = []
    for a in range(0, hidden.shape[0], shape.rows):
        block = _RowBlock(hidden[a : a + shape.rows], targets[a : a + shape.rows], logits, lazy)
        block.run(weight, shape.columns, with_grad=with_grad)
        parts.append(block.result(weight, outputs))
    if len(parts) == 1:
        return parts[0]
    return WalkResult._make(None if part[0] is None else torch.cat(part) for part in zip(*parts))


def _choose_tile(
    hidden: Tensor, bias: Tensor | None, transform: LogitTransform, outputs: tuple[str, ...], *, stored: bool
) -> Tile:
    tiles = choose_tiles(hidden)
    if tiles is None:
        raise ValueError(f"linear_logprob: the triton backend has no tile for {hidden.dtype} on {hidden.device}")
    capped = transform.softcap is not None
    return tiles.choose(bias=bias is not None, softcap=capped, outputs=bool(outputs), stored=stored)


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _product_tile(hidden: Tensor, shape: TileShape, tile: Tile) -> Tensor | None:
    """Return memory for the library's product, or None. The kernel reads whole blocks, so the rest of them is 0."""
    if tile.fused:
        return None
    rows, columns = shape
    return torch.zeros((rows, whole_blocks(columns, tile.v)), dtype=torch.float32, device=hidden.device)


class _Statistics(NamedTuple):
    """The softmax statistics of rows, float32: running ones [n], or those of S splits [S, n]. E = e^{z − base}.

    The kernels take them as pointers in this order.
    """

    base: Tensor  # the offset of the sums
    sum_others: Tensor  # Σ_{v≠y} E
    z_target: Tensor  # z_y, or −inf if the target is not among the columns
    sum_ez: Tensor  # Σ_{v≠y} E·(z − base)
    sum_ee: Tensor  # Σ_{v≠y} E²
    sum_z: Tensor  # Σ z
    largest: Tensor  # the largest z
    ahead: Tensor  # the largest z before the target's column

    @classmethod
    def of_splits(cls, splits: int, rows: int, device: torch.device) -> "_Statistics":
        """Allocate the statistics of S splits."""
        return cls(*torch.empty((len(cls._fields), splits, rows), dtype=torch.float32, device=device).unbind(0))

    @classmethod
    def of_no_columns(cls, rows: int, device: torch.device) -> "_Statistics":
        """Return the running statistics before the first column."""
        # Filled on the device: a copy of numbers from the host would make the host wait for the device.
        half = len(cls._fields) // 2
        sums = iter(torch.zeros((half, rows), dtype=torch.float32, device=device))
        maxima = iter(torch.full((half, rows), float("-inf"), dtype=torch.float32, device=device))
        return cls(*(next(sums if name.startswith("sum_") else maxima) for name in cls._fields))


@dataclass(frozen=True)
class _Logits:
    """The settings for computing logits, and the sums of them that are needed."""

    bias: Tensor | None  # [V]
    transform: LogitTransform
    outputs: tuple[str, ...]
    tile: Tile
    product: Tensor | None  # [rows, columns] float32 scratch if the library multiplies

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_SPREAD": "entropy" in self.outputs or "log_sum_sq_probs" in self.outputs,
            "HAS_MEAN": "mean_logit" in self.outputs,
            "HAS_TOP1": "is_top1" in self.outputs,
        }

    def launch(
        self,
        mode: int,
        hidden: Tensor,  # [n, H]
        weight: Tensor,  # [c, H] a slice of the head
        targets: Tensor,  # [n]
        first: int,  # the slice's first index in the vocabulary
        per_split: int,  # blocks of columns
        rows: tuple[Tensor, Tensor, Tensor],  # [n] each: offset, factor, at_target; not every mode reads them
        out: Tensor,  # [n, whole blocks of columns] the stored tile
        parts: _Statistics,  # [splits, n]
        lazy: float = 0.0,
    ) -> None:
        tile, n, columns = self.tile, hidden.shape[0], weight.shape[0]
        weight = _rows_contiguous(weight)
        bias = hidden if self.bias is None else self.bias[first : first + columns]
        product = hidden
        if self.product is not None:
            multiply(hidden, weight, self.product[:n, :columns])
            product = self.product
        splits = cdiv(cdiv(columns, tile.v), per_split)
        launch(_walk_kernel, (cdiv(n, tile.n) * splits,),
            hidden, weight, product, bias, targets, *rows, out, *parts,
            n, first, columns, hidden.shape[1], hidden.stride(0), weight.stride(0), product.stride(0),
            out.stride(0), per_split, self.transform.gain, self.transform.cap, lazy,
            MODE=mode, FUSED=tile.fused, HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.transform.softcap is not None, **self.flags,
            BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_H=tile.h, GROUP=GROUP,
            PRECISION=tile.precision, UPCAST=interpreted(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


class _RowBlock:
    """The running statistics of some rows during the walk over the vocabulary, and the launches that update them."""

    def __init__(self, hidden: Tensor, targets: Tensor, logits: _Logits, lazy: float):
        self.hidden, self.targets, self.logits = hidden, targets, logits
        self.lazy = 0.0 if hidden.dtype == torch.float16 else lazy
        n, device = hidden.shape[0], hidden.device
        self.running = _Statistics.of_no_columns(n, device)  # [n]
        self.shrunk = torch.empty(n, dtype=torch.float32, device=device)  # [N] the factor for O
        self.others: Tensor | None = None  # [N, H] O

    def run(self, weight: HeadWeight, columns: int, *, with_grad: bool) -> None:
        """Walk over the vocabulary, `columns` at a time. With a gradient, store exponentials and add E·W to O."""
        n, vocabulary = self.hidden.shape[0], weight.shape[0]
        tile, stored = self.logits.tile, None
        if with_grad:
            stored = self.hidden.new_empty((n, whole_blocks(min(columns, vocabulary), tile.v)))
            self.others = torch.zeros_like(self.hidden, dtype=torch.float32)
        for first in range(0, vocabulary, columns):
            slice_ = weight.rows(first, min(first + columns, vocabulary))
            width = slice_.shape[0]
            if stored is None or self.others is None:
                blocks = cdiv(n, tile.n), cdiv(width, tile.v)
                per_split = blocks_per_split(*blocks, processors(self.hidden.device))
                self._fold(FORWARD.value, slice_, first, per_split, self.shrunk[:, None])
                continue
            whole = stored[:, : whole_blocks(width, tile.v)]
            base = self._fold(EXP.value, slice_, first, 1, whole)
            self._rescale(whole, base, is_factor=False)
            if first:
                self._rescale(self.others, self.shrunk, is_factor=True)
            add_product(self.others, whole[:, :width], slice_)

    def _fold(self, mode: int, slice_: Tensor, first: int, per_split: int, out: Tensor) -> Tensor:
        """Walk over a slice in splits and add their statistics to the running ones. Return the splits' bases [S, N]."""
        n, splits = self.hidden.shape[0], cdiv(cdiv(slice_.shape[0], self.logits.tile.v), per_split)
        parts = _Statistics.of_splits(splits, n, self.hidden.device)
        rows = (self.running.base, self.shrunk, self.shrunk)
        self.logits.launch(mode, self.hidden, slice_, self.targets, first, per_split, rows, out, parts, self.lazy)
        block_s, block_n = COMBINE_BLOCK
        launch(_combine_kernel, (cdiv(n, block_n),),
            *parts, *self.running, self.shrunk, n, splits, **self.logits.flags,
            BLOCK_S=block_s, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        return parts.base

    def _rescale(self, matrix: Tensor, base: Tensor, *, is_factor: bool) -> None:
        n, columns = matrix.shape
        block_v = self.logits.tile.v
        launch(_rescale_kernel, (cdiv(n, RESCALE_ROWS), cdiv(columns, block_v)),
            matrix, base, self.running.base, n, columns, matrix.stride(0),
            IS_FACTOR=is_factor, BLOCK_N=RESCALE_ROWS, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip

    def result(self, weight: HeadWeight, outputs: tuple[str, ...]) -> WalkResult:
        """Compute the results of every row from its running statistics."""
        running = self.running
        z_target = running.z_target
        behind = z_target - running.base
        x = running.sum_others.log() - behind  # log of the odds against the target
        logp = -torch.nn.functional.softplus(x)
        log_s = behind - logp
        e_target, s = behind.exp(), log_s.exp()
        grad = None
        if self.others is not None:
            transform = self.logits.transform
            coefficient = transform.slope * torch.sigmoid(x) * transform.softcap_slope(z_target)
            grad = self._gradient(self.others, weight, coefficient, transform.slope * (-log_s).exp())
        entropy = log_s - (running.sum_ez + e_target * behind) / s
        log_sum_sq_probs = (running.sum_ee + e_target.square()).log() - 2 * log_s
        return WalkResult(
            z_target=z_target,
            maximum=running.base,
            sum_others=running.sum_others,
            logp=logp,
            entropy=entropy if "entropy" in outputs else None,
            mean_logit=running.sum_z / weight.shape[0] if "mean_logit" in outputs else None,
            log_sum_sq_probs=log_sum_sq_probs if "log_sum_sq_probs" in outputs else None,
            is_top1=(z_target >= running.largest) & (z_target > running.ahead) if "is_top1" in outputs else None,
            grad=grad,
        )

    def _gradient(self, others: Tensor, weight: HeadWeight, coefficient: Tensor, inverse: Tensor) -> Tensor:
        n, width = others.shape
        dtype = torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype
        out = torch.empty((n, width), dtype=dtype, device=others.device)
        if isinstance(weight, DenseWeight):
            rows, index = _rows_contiguous(weight.weight), self.targets
        else:
            rows, index = weight.gather(self.targets), torch.arange(n, device=others.device)
        block_n, block_h = GRADIENT_BLOCK
        launch(_gradient_kernel, (cdiv(n, block_n), cdiv(width, block_h)),
            others, rows, index, coefficient, inverse, out, n, width,
            others.stride(0), rows.stride(0), out.stride(0), BLOCK_N=block_n, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
        return out


def scale_rows(
    grad: Tensor,  # [N, H]
    coefficient: Tensor,  # [N]
    positions: Tensor | None,  # [N] int64 in [0, M)
    rows: int,  # M
    dtype: torch.dtype,
) -> Tensor:
    """Compute the same as `linear_logprob_torch.scale_rows` without atomics: one program sums each of the M rows."""
    width = grad.shape[1]
    if positions is None:
        order, begin = (torch.arange(length, device=grad.device) for length in (rows, rows + 1))
    else:
        ascending, order = positions.sort(stable=True)
        begin = torch.searchsorted(ascending, torch.arange(rows + 1, device=grad.device))
    out = torch.empty((rows, width), dtype=dtype, device=grad.device)
    if out.numel():
        launch(_scale_kernel, (rows, cdiv(width, SCALE_BLOCK)),
            grad, coefficient.contiguous(), order, begin, out, width, grad.stride(0), out.stride(0),
            BLOCK_H=SCALE_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def recompute_gradients(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: HeadWeight,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    statistics: Tensor,  # [3, N] z_target, offset, sum_others
    *,
    budget: int,  # bytes
    wanted: tuple[bool, bool, bool],  # hidden, weight, bias
    tile: Tile | None = None,
) -> HeadGrads:
    """Compute the same as `linear_logprob_torch.recompute_gradients`. `tile` is that of `walk_vocabulary`.

    The kernel computes each tile of ∂loss/∂logits, the library its products. The outer loop is over the vocabulary.
    """
    tile = tile or _choose_tile(hidden, bias, transform, (), stored=True)
    hidden = _rows_contiguous(hidden)
    z_target, offset, sum_others = statistics
    behind = z_target - offset
    x = sum_others.log() - behind
    log_s = behind + torch.nn.functional.softplus(x)
    share = grad_logp.float() * transform.slope
    factor, at_target = -share * (-log_s).exp(), share * torch.sigmoid(x)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    # A slice of the weight's gradient in float32 is as wide as the tile, so this has a limit of its own.
    trained = weight.trained if wanted[1] else None
    shape = plan_tile(hidden, weight, budget, tile, stored=True, widest=None if trained is None else WIDE)
    logits = _Logits(bias, transform, (), tile, _product_tile(hidden, shape, tile))
    stored = hidden.new_empty((shape.rows, whole_blocks(min(shape.columns, vocabulary), tile.v)))
    want_hidden, _, want_bias = wanted
    kept = hidden if trained is None else hidden[:, -trained.shape[1] :]  # the hidden units of the trained columns
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if want_hidden else None
    d_weight = None if trained is None else torch.empty_like(trained)
    d_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    for first in range(0, vocabulary, shape.columns):
        slice_ = weight.rows(first, min(first + shape.columns, vocabulary))
        last = first + slice_.shape[0]
        sums: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
        dw = torch.zeros((last - first, kept.shape[1]), **sums) if trained is not None else None
        db = torch.zeros(last - first, **sums) if d_bias is not None else None
        for a in range(0, n, shape.rows):
            b = min(a + shape.rows, n)
            whole = stored[: b - a, : whole_blocks(last - first, tile.v)]
            logits.launch(
                GRADIENT.value, hidden[a:b], slice_, targets[a:b], first, 1,
                (offset[a:b], factor[a:b], at_target[a:b]), whole, _Statistics(*[offset] * 8),
            )  # fmt: skip
            out = whole[:, : last - first]
            if d_hidden is not None:
                add_product(d_hidden[a:b], out, slice_)
            if dw is not None:
                add_product(dw, out.t(), kept[a:b])
            if db is not None:
                db += out.sum(0, dtype=torch.float32)
        if d_weight is not None and dw is not None:
            d_weight[first:last] = dw
        if d_bias is not None and db is not None:
            d_bias[first:last] = db
    return HeadGrads(None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias)


def multiply(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [c, H]
    out: Tensor,  # [n, c] float32
) -> Tensor:
    """Compute hidden·weightᵀ, accumulated and stored in float32, by the library's matrix product."""
    weight = weight.to(hidden.dtype).t()
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight, out_dtype=torch.float32, out=out)
    return torch.mm(hidden.float(), weight.float(), out=out)  # the interpreter's tensors, see `add_product`


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left·right to `total`, accumulated in float32, by the library's matrix product."""
    right = right.to(left.dtype)
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # the interpreter's tensors are on a CPU, whose product of half precision is rounded to half precision
        total.addmm_(left.float(), right.float())


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
