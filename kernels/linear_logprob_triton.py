"""Triton kernels of the vocabulary walk, the loop over the vocabulary that never stores the matrix of all logits.

The main loop, `_walk_kernel`, has two parts. First comes the product of a row block with columns of the weight, in
float32 registers (FUSED), or a tile of that product from the library (on GPUs that fused tiles do not fit). Then comes
an epilogue, by mode:

    FORWARD    folds the columns of one split into softmax statistics, [splits, N]
    EXP        stores E = e^{z − base}·softcap' of one tile for the library's product E·W, and the tile's statistics
    GRADIENT   stores ∂loss/∂(h·W + b) of one tile, for a trainable head's two products

A launch covers one slice of the weight, `columns` rows of the vocabulary from `first` on, which may be all of it.

`_combine_kernel` adds partial statistics by blocks in a fixed order, without atomics: results repeat bit for bit.

In EXP every row and column block first chooses its base: the row's running offset, unless the block's maximum is more
than `lazy` above it. bfloat16 has float32's range, so an offset need only be near the maximum; float16 does not, so
there `lazy` is 0. `_rescale_kernel` then brings the tile's blocks, and the accumulator O, to one offset per row. It
returns at once if no base moved. `_gradient_kernel` computes g from O. `_scale_kernel` scales g in the backward pass
and writes it to its positions.

    z = softcap(a·(h·W + b))/τ        s_o = Σ_{v≠y} e^{z_v − offset}        O = Σ_{v≠y} e^{z_v − offset}·softcap'_v·W_v
    logp = (z_y − offset) − log(s_o + e^{z_y − offset})        g = (a/τ)·[(s_o/s)·softcap'_y·W_y − O/s]

`linear_logprob_launch.py` launches them. The naive reference is `linear_logprob_naive.py`; the same walk in plain torch
is `linear_logprob_torch.py`.
"""

import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
EXP: tl.constexpr = tl.constexpr(1)
GRADIENT: tl.constexpr = tl.constexpr(2)


@triton.jit
def _tanh(x):
    # 2σ(2x) − 1 loses at most one rounding of 1 near zero, far below the softcap it is multiplied with.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


# The numbers of rows, which differ from batch to batch, and the addresses that depend on them are not specialised: a
# different remainder of n by 4 or 16 would compile the main loop again, in the middle of a run.
_ROWS = ("p_targets", "p_offset", "p_factor", "p_at_target")
_SPLITS = ("p_base", "p_sum", "p_target", "p_ez", "p_ee", "p_z", "p_maximum", "p_ahead")


@triton.jit(
    do_not_specialize=["n", "first", "columns", "blocks_per_split"],
    do_not_specialize_on_alignment=["p_bias", *_ROWS, *_SPLITS],
)
def _walk_kernel(
    p_hidden,  # [N, H] FUSED
    p_weight,  # [columns, H] FUSED
    p_product,  # [N, columns] float32, if not FUSED; columns are rounded up to BLOCK_V
    p_bias,  # [columns]
    p_targets,  # [N] int64
    p_offset,  # [N] EXP: running offset, −inf at first; GRADIENT: final offset
    p_factor,  # [N] GRADIENT: the factor of the columns that are not the target
    p_at_target,  # [N] GRADIENT: the value at the target's column
    p_tile,  # [N, columns] EXP, GRADIENT: the stored tile; columns are rounded up to BLOCK_V, with 0 in the rest
    p_base,  # [S, N] the base of a split's sums: its maximum, or in EXP the chosen base
    p_sum,  # [S, N] Σ_{v≠y} e^{z − base}
    p_target,  # [S, N] z_y, or −inf if the target is not in the split
    p_ez,  # [S, N] Σ_{v≠y} e^{z − base}·(z − base)
    p_ee,  # [S, N] Σ_{v≠y} e^{2(z − base)}
    p_z,  # [S, N] Σ z
    p_maximum,  # [S, N] the largest z of all columns
    p_ahead,  # [S, N] the largest z before the target's column
    n,
    first,  # the index in the vocabulary of the first column
    columns,
    width,  # H
    stride_hidden,
    stride_weight,
    stride_product,
    stride_tile,
    blocks_per_split,  # blocks of BLOCK_V columns; in EXP and GRADIENT 1, which is not read
    gain,  # a/τ, or with a softcap a/c
    cap,  # c/τ
    lazy,  # EXP: how far a maximum may be above the offset
    MODE: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Process one row block over one split of the columns.

    Programs are numbered by groups of row blocks, and in a group by splits. So programs that run at the same time share
    the group's hidden states and a few slices of the weight in the L2 cache.
    """
    row_blocks = tl.cdiv(n, BLOCK_N)
    splits = tl.num_programs(0) // row_blocks
    first_block = tl.program_id(0) // (GROUP * splits) * GROUP
    group = tl.minimum(row_blocks - first_block, GROUP)
    in_group = tl.program_id(0) - first_block * splits
    i_split = in_group // group
    first_row = (first_block + in_group % group) * BLOCK_N
    # Addresses are one 64-bit base per block with 32-bit offsets, which take half the registers of 64-bit offsets.
    i_n, i_v, i_inner = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    i_rows = first_row + i_n
    in_rows = i_rows < n
    # Relative to this slice's first column. The target may be outside the slice. 32 bits halve its comparisons.
    target = (tl.load(p_targets + i_rows, mask=in_rows, other=-1) - first).to(tl.int32)
    p_hidden += first_row.to(tl.int64) * stride_hidden
    p_product += first_row.to(tl.int64) * stride_product
    i_h = i_n[:, None] * stride_hidden + i_inner[None, :]
    i_w = i_v[None, :] * stride_weight + i_inner[:, None]
    base = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    z_target = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    ahead = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    ez = tl.zeros((BLOCK_N,), tl.float32)
    ee = tl.zeros((BLOCK_N,), tl.float32)
    z_sum = tl.zeros((BLOCK_N,), tl.float32)
    if MODE != FORWARD:
        base = tl.load(p_offset + i_rows, mask=in_rows, other=0.0)

    # One block is a constant for the compiler, which then carries no sums from block to block. A begin that is a
    # multiple of BLOCK_V lets it load and store 16 bytes at a time.
    begin = i_split * BLOCK_V
    end = tl.minimum(begin + BLOCK_V, columns)
    blocks = 1
    if MODE == FORWARD:
        begin = i_split * blocks_per_split * BLOCK_V
        end = tl.minimum(begin + blocks_per_split * BLOCK_V, columns)
        blocks = tl.cdiv(end - begin, BLOCK_V)
    for i_block in range(0, blocks):
        start = begin + i_block * BLOCK_V
        # --- the product, in float32 registers
        i_columns = start + i_v
        in_columns = i_columns < end
        if FUSED:
            p_w = p_weight + start.to(tl.int64) * stride_weight
            z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
            for k in range(0, width, BLOCK_H):
                inner = i_inner < width - k
                b_h = tl.load(p_hidden + k + i_h, mask=in_rows[:, None] & inner[None, :], other=0.0)
                b_w = tl.load(p_w + k + i_w, mask=in_columns[None, :] & inner[:, None], other=0.0).to(b_h.dtype)
                if UPCAST:  # Triton's interpreter multiplies bfloat16 as raw bits
                    b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
                z = tl.dot(b_h, b_w, z, input_precision=PRECISION)
        else:
            i_product = i_n[:, None] * stride_product + i_columns[None, :]
            z = tl.load(p_product + i_product, mask=in_rows[:, None], other=0.0)
        if HAS_BIAS:
            z += tl.load(p_bias + i_columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        z *= gain
        slope = 1.0
        if HAS_SOFTCAP:
            tangent = _tanh(z)
            z = tangent * cap
            slope = 1.0 - tangent * tangent  # softcap'

        # --- the epilogue
        is_target = i_columns[None, :] == target[:, None]
        z = tl.where(in_columns[None, :], z, float("-inf"))
        if MODE == GRADIENT:
            factor = tl.load(p_factor + i_rows, mask=in_rows, other=0.0)
            at_target = tl.load(p_at_target + i_rows, mask=in_rows, other=0.0)
            stored = tl.where(is_target, at_target[:, None], factor[:, None] * tl.exp(z - base[:, None])) * slope
        else:
            tile_largest = tl.max(z, 1)
            z_target = tl.maximum(z_target, tl.max(tl.where(is_target, z, float("-inf")), 1))
            if HAS_MEAN:
                z_sum += tl.sum(tl.where(in_columns[None, :], z, 0.0), 1)
            if HAS_TOP1:
                before = i_columns[None, :] < target[:, None]
                ahead = tl.maximum(ahead, tl.max(tl.where(before, z, float("-inf")), 1))
            if MODE == FORWARD:
                new = tl.maximum(base, tile_largest)
            else:
                largest = tile_largest  # in FORWARD it is the base
                new = tl.where(tile_largest - base > lazy, tile_largest, base)
            moved = base - new  # −inf at the first tile, where the sums are still zero
            shrink = tl.exp(moved)
            d = z - new[:, None]
            e = tl.where(is_target, 0.0, tl.exp(d))
            if HAS_SPREAD:
                carried = tl.where(total > 0, shrink * (ez + moved * total), 0.0)
                ez = carried + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
                ee = ee * shrink * shrink + tl.sum(e * e, 1)
            total = total * shrink + tl.sum(e, 1)
            base = new
            stored = e * slope
        if MODE != FORWARD:
            p_out = p_tile + first_row.to(tl.int64) * stride_tile + start
            p_out += i_n[:, None] * stride_tile + i_v[None, :]
            tl.store(p_out, stored.to(p_tile.dtype.element_ty), mask=in_rows[:, None])

    if MODE != GRADIENT:
        place = i_split.to(tl.int64) * n + i_rows
        tl.store(p_base + place, base, mask=in_rows)
        tl.store(p_sum + place, total, mask=in_rows)
        tl.store(p_target + place, z_target, mask=in_rows)
        if HAS_SPREAD:
            tl.store(p_ez + place, ez, mask=in_rows)
            tl.store(p_ee + place, ee, mask=in_rows)
        if HAS_MEAN:
            tl.store(p_z + place, z_sum, mask=in_rows)
        if HAS_TOP1:
            tl.store(p_maximum + place, base if MODE == FORWARD else largest, mask=in_rows)
            tl.store(p_ahead + place, ahead, mask=in_rows)


@triton.jit
def _places(i_splits, i_rows, splits, n):
    """Return the addresses of a block of [S, N] statistics, and which of them exist."""
    return i_splits[:, None] * n + i_rows[None, :], (i_splits < splits)[:, None] & (i_rows < n)[None, :]


_RUNNING = tuple(name.replace("p_", "p_running_") for name in _SPLITS)


@triton.jit(do_not_specialize=["n", "splits"], do_not_specialize_on_alignment=[*_SPLITS, *_RUNNING, "p_shrunk"])
def _combine_kernel(
    p_base,  # [S, N]
    p_sum,  # [S, N]
    p_target,  # [S, N]
    p_ez,  # [S, N]
    p_ee,  # [S, N]
    p_z,  # [S, N]
    p_maximum,  # [S, N]
    p_ahead,  # [S, N]
    p_running_base,  # [N] the same over all columns so far, updated in place
    p_running_sum,  # [N]
    p_running_target,  # [N]
    p_running_ez,  # [N]
    p_running_ee,  # [N]
    p_running_z,  # [N]
    p_running_maximum,  # [N]
    p_running_ahead,  # [N]
    p_shrunk,  # [N] e^{old base − new base}, the factor for O
    n,
    splits,
    HAS_SPREAD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the statistics of S splits to the running ones, a block of BLOCK_S splits at a time."""
    i_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_splits = tl.arange(0, BLOCK_S)
    mask = i_rows < n
    old = tl.load(p_running_base + i_rows, mask=mask, other=0.0)
    new = old
    for s in range(0, splits, BLOCK_S):
        place, inside = _places(s + i_splits, i_rows, splits, n)  # pyright: ignore[reportGeneralTypeIssues]
        new = tl.maximum(new, tl.max(tl.load(p_base + place, mask=inside, other=float("-inf")), 0))
    moved = old - new
    shrink = tl.exp(moved)
    total = tl.load(p_running_sum + i_rows, mask=mask, other=0.0)
    z_target = tl.load(p_running_target + i_rows, mask=mask, other=0.0)
    if HAS_SPREAD:
        ez = tl.load(p_running_ez + i_rows, mask=mask, other=0.0)
        ee = tl.load(p_running_ee + i_rows, mask=mask, other=0.0)
        ez = tl.where(total > 0, shrink * (ez + moved * total), 0.0)
        ee *= shrink * shrink
    if HAS_MEAN:
        z_sum = tl.load(p_running_z + i_rows, mask=mask, other=0.0)
    if HAS_TOP1:
        largest = tl.load(p_running_maximum + i_rows, mask=mask, other=0.0)
        ahead = tl.load(p_running_ahead + i_rows, mask=mask, other=0.0)
    total *= shrink
    for s in range(0, splits, BLOCK_S):
        place, inside = _places(s + i_splits, i_rows, splits, n)  # pyright: ignore[reportGeneralTypeIssues]
        own_moved = tl.load(p_base + place, mask=inside, other=float("-inf")) - new[None, :]
        own_shrink = tl.exp(own_moved)
        own = tl.load(p_sum + place, mask=inside, other=0.0)
        total += tl.sum(own * own_shrink, 0)
        z_target = tl.maximum(z_target, tl.max(tl.load(p_target + place, mask=inside, other=float("-inf")), 0))
        if HAS_SPREAD:
            own_ez = tl.load(p_ez + place, mask=inside, other=0.0)
            own_ee = tl.load(p_ee + place, mask=inside, other=0.0)
            own_ez = tl.where(own > 0, own_shrink * (own_ez + own_moved * own), 0.0)
            ez += tl.sum(own_ez, 0)  # pyright: ignore[reportOperatorIssue]
            ee += tl.sum(own_shrink * own_shrink * own_ee, 0)  # pyright: ignore[reportOperatorIssue]
        if HAS_MEAN:
            own_z = tl.load(p_z + place, mask=inside, other=0.0)
            z_sum += tl.sum(own_z, 0)  # pyright: ignore[reportOperatorIssue]
        if HAS_TOP1:
            largest = tl.maximum(largest, tl.max(tl.load(p_maximum + place, mask=inside, other=float("-inf")), 0))
            ahead = tl.maximum(ahead, tl.max(tl.load(p_ahead + place, mask=inside, other=float("-inf")), 0))
    tl.store(p_running_base + i_rows, new, mask=mask)
    tl.store(p_running_sum + i_rows, total, mask=mask)
    tl.store(p_running_target + i_rows, z_target, mask=mask)
    tl.store(p_shrunk + i_rows, tl.exp(old - new), mask=mask)
    if HAS_SPREAD:
        tl.store(p_running_ez + i_rows, ez, mask=mask)
        tl.store(p_running_ee + i_rows, ee, mask=mask)
    if HAS_MEAN:
        tl.store(p_running_z + i_rows, z_sum, mask=mask)
    if HAS_TOP1:
        tl.store(p_running_maximum + i_rows, largest, mask=mask)
        tl.store(p_running_ahead + i_rows, ahead, mask=mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_base", "p_offset"])
def _rescale_kernel(
    p_matrix,  # [N, columns], in place
    p_base,  # [S, N] the base of each block of BLOCK_V columns; for O, [1, N]: its factor
    p_offset,  # [N] the new base
    n,
    columns,
    stride,
    IS_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Multiply a block of rows and columns by e^{base − offset}, or by a factor. Do nothing if all factors are 1."""
    i_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_split = tl.program_id(1)
    mask = i_rows < n
    if IS_FACTOR:
        factor = tl.load(p_base + i_rows, mask=mask, other=1.0)
    else:
        base = tl.load(p_base + i_split.to(tl.int64) * n + i_rows, mask=mask, other=0.0)
        factor = tl.exp(base - tl.load(p_offset + i_rows, mask=mask, other=0.0))
    smallest = tl.min(factor, axis=0)
    if smallest < 1.0:  # pyright: ignore[reportOperatorIssue]
        i_columns = i_split * BLOCK_V + tl.arange(0, BLOCK_V)
        p = p_matrix + i_rows.to(tl.int64)[:, None] * stride + i_columns[None, :]
        inside = mask[:, None] & (i_columns < columns)[None, :]
        block = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        # A factor of 0 gives 0 even if the block holds infinities or NaN.
        block = tl.where(factor[:, None] > 0, block * factor[:, None], 0.0)
        tl.store(p, block.to(p_matrix.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_index", "p_coefficient", "p_inverse"])
def _gradient_kernel(
    p_others,  # [N, H] float32, O
    p_weight,  # [V, H], or rows of it
    p_index,  # [N] int64 the row of each W_y there
    p_coefficient,  # [N] slope·(s_o/s)·softcap'_y
    p_inverse,  # [N] slope/s
    p_out,  # [N, H]
    n,
    width,
    stride_others,
    stride_weight,
    stride_out,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute g = coefficient·W_y − inverse·O in float32, stored once."""
    i_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_inner = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = i_rows < n
    inside = mask[:, None] & (i_inner < width)[None, :]
    index = tl.load(p_index + i_rows, mask=mask, other=0)
    coefficient = tl.load(p_coefficient + i_rows, mask=mask, other=0.0)
    inverse = tl.load(p_inverse + i_rows, mask=mask, other=0.0)
    rows = i_rows.to(tl.int64)[:, None]
    others = tl.load(p_others + rows * stride_others + i_inner[None, :], mask=inside, other=0.0)
    w = tl.load(p_weight + index[:, None] * stride_weight + i_inner[None, :], mask=inside, other=0.0).to(tl.float32)
    g = coefficient[:, None] * w - inverse[:, None] * others
    tl.store(p_out + rows * stride_out + i_inner[None, :], g.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["p_coefficient", "p_order", "p_begin"])
def _scale_kernel(
    p_grad,  # [N, H] g
    p_coefficient,  # [N] ∂loss/∂logp
    p_order,  # [N] int64 rows of g in the order of their positions
    p_begin,  # [M + 1] int64 the index in that order where each position's rows begin
    p_out,  # [M, H]
    width,
    stride_grad,
    stride_out,
    BLOCK_H: tl.constexpr,
):
    """Compute out_m = Σ coefficient_n·g_n over the rows n with position m, in float32 and in order; 0 without any."""
    i_out = tl.program_id(0).to(tl.int64)
    i_inner = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = i_inner < width
    total = tl.zeros((BLOCK_H,), tl.float32)
    for i in range(tl.load(p_begin + i_out), tl.load(p_begin + i_out + 1)):
        i_row = tl.load(p_order + i)
        grad = tl.load(p_grad + i_row * stride_grad + i_inner, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(p_coefficient + i_row) * grad
    tl.store(p_out + i_out * stride_out + i_inner, total.to(p_out.dtype.element_ty), mask=mask)
