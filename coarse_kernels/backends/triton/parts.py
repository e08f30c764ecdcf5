"""What the Triton kernels are made of: one pixel, interpolation, tiles. See `kernels`."""

# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

# How an axis of a field's grid meets the pixels.
EQUAL, ONE_POINT, LINEAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# --- one pixel ----------------------------------------------------------------------------------------------------------


@triton.jit
def number(high, low, R: tl.constexpr):
    """A Python float in precision R. Triton passes floats as float32: float64 comes in two parts."""
    if R == tl.float64:
        return tl.full((), high, R) + tl.full((), low, R)
    else:
        return tl.full((), high, R)


@triton.jit
def gradient_factor(scale, loss_scale, loss_scale_low, R: tl.constexpr):
    factor = number(loss_scale, loss_scale_low, R)
    if scale is not None:
        factor *= tl.load(scale)
    return factor


@triton.jit
def label_and_weight(labels, class_weight, pixel_weight, at, inside, ignore_index, C: tl.constexpr, R: tl.constexpr):
    """(label as int32 with 0 where there is none, labelled, weight with 0 where there is no label)."""
    label = tl.load(labels + at, mask=inside, other=0).to(tl.int64)  # 64 bits: a comparison in 8 would wrap
    labelled = inside & (label >= 0) & (label < C) & (label != ignore_index)
    y = tl.where(labelled, label, 0).to(tl.int32)
    # Selects, not products: the weight of an unlabelled pixel, or of a class that nobody drew, may be inf or NaN.
    weight = tl.where(labelled, 1.0, 0.0).to(R)
    if class_weight is not None:
        weight = tl.load(class_weight + y, mask=labelled, other=0.0)
    if pixel_weight is not None:
        weight = weight * tl.load(pixel_weight + at, mask=labelled, other=0.0)
    return y, labelled, weight


# Of offsets (CP, N) that follow a label or a grid point neither axis is contiguous, and Triton 3.6 then makes axis 0 the
# fastest: whatever meets the load goes through shared memory to get there (C = 19 with a transition: 6 KB of spills).
# The hint [1, 2] makes it axis 1, as in every tile, and does nothing else: how many elements are loaded at once is bounded by
# their alignment, which for these offsets is one element. (It has to stand where the offsets are computed to be kept.)
@triton.jit
def column_terms(a, j, y, transition, C: tl.constexpr, CP: tl.constexpr):
    """Columns a[:, j] of pixels labelled y. Returns e, 1/Z (A = e/Z), h = p(observed | true, label), log q[j], A[j,j].

    Log space throughout, no epsilon: every exponential is of a difference of two logits and divided by a sum that
    contains it. A NaN stays one.
    """
    i = tl.arange(0, CP)[:, None]
    top = tl.max(a, 0)
    # i < C drops the exponentials of the rows beyond C when the kernel is compiled, here and below.
    e = tl.where(i < C, tl.exp(a - top[None, :]), 0.0)
    z = tl.sum(e, 0)
    inv_z = 1.0 / z
    ajj = tl.sum(tl.where(i == j[None, :], e, 0.0), 0) * inv_z
    if transition is None:
        at_label = tl.sum(tl.where(i == y[None, :], a, 0.0), 0)
        h = e  # one-hot at y: `cm_gradient` knows, and nothing is held for it
        log_q = (at_label - top) - tl.log(z)
    else:
        at = tl.max_contiguous(i * C + y[None, :], [1, 2])
        t = tl.load(transition + at, mask=i < C, other=0.0)
        # T is a factor, not a summand of the exponent: beside a logit of 1e4 its logarithm is lost.
        label_top = tl.max(tl.where(t != 0, a, float("-inf")), 0)
        shift = tl.where(label_top == float("-inf"), 0.0, label_top)  # -inf - -inf must not become NaN
        h = tl.where((i < C) & (t != 0), t * tl.exp(a - shift[None, :]), 0.0)
        q = tl.sum(h, 0)
        h = h * tl.where(q == 0, 0.0, 1.0 / q)[None, :]
        log_q = (shift - top) + (tl.log(q) - tl.log(z))
    return e, inv_z, h, log_q, ajj


@triton.jit
def cm_gradient(e, inv_z, h, r, ajj, j, y, live, w, wt, IDENTITY: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """w r (A - h) + wt A[j,j] ([i = j] - A); w and wt hold the pixel's weight. 0 where it does not count."""
    i = tl.arange(0, CP)[:, None]
    big_a = e * inv_z[None, :]
    diagonal = wt * ajj
    if IDENTITY:
        h = tl.where(i == y[None, :], 1.0, 0.0).to(e.dtype)
    gradient = (w * r)[None, :] * (big_a - h) - diagonal[None, :] * big_a
    gradient += tl.where(i == j[None, :], diagonal[None, :], 0.0)
    return tl.where(live[None, :] & (i < C), gradient, 0.0)  # beyond C a zero that the compiler sees


@triton.jit
def finite(top):
    """-inf - -inf must not become NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_exp(top, total, x):
    """(max, sum of exp(x - max)) over the rows so far, (BLOCK,) each, and those of x (rows, BLOCK)."""
    above = tl.maximum(top, tl.max(x, 0))
    shift = finite(above)
    return above, total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)


@triton.jit
def scaled_exp(factor, x):
    """factor * exp(x), where the exponential alone may leave the range: what is beyond e^60 is multiplied last."""
    beyond = tl.maximum(x - 60.0, 0.0)
    return factor * tl.exp(x - beyond) * tl.exp(beyond)


# --- interpolation: linear, align_corners=False; `linear_tap` of csrc/grid.h -------------------------------------


@triton.jit
def source_of(dst, grid, size, R: tl.constexpr):
    """Where pixel ``dst`` of an axis lies among the grid's points; in the arithmetic of F.interpolate."""
    if R == tl.float64:
        ratio = grid.to(R) / size.to(R)
    else:
        ratio = tl.div_rn(grid.to(R), size.to(R))  # the plain quotient may be 2 units off
    return tl.maximum(ratio * (dst.to(R) + 0.5) - 0.5, 0.0)


@triton.jit
def tap(dst, grid, size, MODE: tl.constexpr, R: tl.constexpr):
    """(first point, second point, weight of the second). Where nothing is interpolated no neighbour is touched."""
    first = dst
    if MODE == ONE_POINT:
        first = dst * 0
    second = first
    weight = tl.zeros_like(dst).to(R)
    if MODE == LINEAR:
        source = source_of(dst, grid, size, R)
        first = tl.minimum(source.to(tl.int32), grid - 1)
        second = tl.minimum(first + 1, grid - 1)
        weight = tl.minimum(source - first.to(R), 1.0)
    return first, second, weight


@triton.jit
def corner_of(first, second, weight, CORNER: tl.constexpr, BIT: tl.constexpr, MODE: tl.constexpr):
    """Point and weight of an axis for one of the corners, which are counted in bits, one for each linear axis."""
    point = first
    share = weight * 0.0 + 1.0
    if MODE == LINEAR:
        if (CORNER >> BIT) % 2 == 1:
            point = second
            share = weight
        else:
            share = 1.0 - weight
    return point, share


@triton.jit
def beside(x, plane):
    """x (N,) with the axes that ``plane`` has."""
    if len(plane.shape) == 2:
        return x[None, :]
    else:
        return x


@triton.jit
def at_node(plane, node):
    if len(plane.shape) == 2:
        return tl.max_contiguous(plane + node[None, :], [1, 2])
    else:
        return plane + node


@triton.jit
def load_field(
    field, plane, px, mask, other, depth, height, width, grid_d, grid_h, grid_w,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A field at pixels px (N,) of its image; ``plane``: where the planes begin, (N,), or (rows, N) or (rows, 1).

    Nothing is read where ``mask`` is not. There it is ``other`` on the pixel grid, and 0 on a grid of its own.
    """
    if (MODE_D == EQUAL) & (MODE_H == EQUAL) & (MODE_W == EQUAL):
        return tl.load(field + (plane + beside(px, plane)), mask=mask, other=other).to(R)
    else:
        d0, d1, d_weight = tap(px // (height * width), grid_d, depth, MODE_D, R)
        h0, h1, h_weight = tap(px // width % height, grid_h, height, MODE_H, R)
        w0, w1, w_weight = tap(px % width, grid_w, width, MODE_W, R)
        BIT_H: tl.constexpr = MODE_W // 2
        BIT_D: tl.constexpr = MODE_W // 2 + MODE_H // 2
        d, d_share = corner_of(d0, d1, d_weight, 0, BIT_D, MODE_D)
        h, h_share = corner_of(h0, h1, h_weight, 0, BIT_H, MODE_H)
        w, w_share = corner_of(w0, w1, w_weight, 0, 0, MODE_W)
        node = (d * grid_h + h) * grid_w + w
        value = tl.load(field + at_node(plane, node), mask=mask, other=0.0).to(R)
        if CORNERS > 1:
            value *= beside(d_share * h_share * w_share, plane)
            for corner in tl.static_range(1, CORNERS):
                d, d_share = corner_of(d0, d1, d_weight, corner, BIT_D, MODE_D)
                h, h_share = corner_of(h0, h1, h_weight, corner, BIT_H, MODE_H)
                w, w_share = corner_of(w0, w1, w_weight, corner, 0, MODE_W)
                node = (d * grid_h + h) * grid_w + w
                x = tl.load(field + at_node(plane, node), mask=mask, other=0.0).to(R)
                # Said which product is rounded: left to the compiler, classes with equal logits are not equal in between.
                value = tl.fma(x, beside(d_share * h_share * w_share, plane), value)
        return value


@triton.jit
def load_columns(
    cm, j, px, use, depth, height, width, grid_d, grid_h, grid_w,
    C: tl.constexpr, CP: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    CORNERS: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """a[:, j] of one image at pixels px: (CP, N); rows beyond C: -inf. Nothing is read where ``use`` is not."""
    i = tl.arange(0, CP)[:, None]
    mask = (i < C) & ((j < C) & use)[None, :]
    a = load_field(
        cm, plane_of(i * C + j[None, :], grid_d * grid_h * grid_w, WIDE), px, mask, float("-inf"),
        depth, height, width, grid_d, grid_h, grid_w, MODE_D, MODE_H, MODE_W, CORNERS, R,
    )  # fmt: skip
    if (MODE_D == EQUAL) & (MODE_H == EQUAL) & (MODE_W == EQUAL):
        return a
    else:
        return tl.where(i < C, a, float("-inf"))


@triton.jit
def load_scores(
    seg, j, px, use, depth, height, width, grid_d, grid_h, grid_w,
    C: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    CORNERS: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """s[j] of one image at pixels px (N,): j (N,), or (rows, N) or (rows, 1). 0 beyond C, and where ``use`` is not: nothing is
    read there.
    """
    return load_field(
        seg, plane_of(j, grid_d * grid_h * grid_w, WIDE), px, (j < C) & beside(use, j), 0.0,
        depth, height, width, grid_d, grid_h, grid_w, MODE_D, MODE_H, MODE_W, CORNERS, R,
    )  # fmt: skip


# --- the cells between grid points --------------------------------------------------------------------------------------


@triton.jit
def first_pixel(point, grid, size):
    """Of the cell that begins at a grid point: the first pixel at or beyond it. Cell 0 has all before point 1, too."""
    doubled = (2 * point + 1).to(tl.int64) * size - grid  # source >= point, times 2 grid
    first = (doubled + 2 * grid - 1) // (2 * grid)
    first = tl.where(point == 0, 0, first)
    return tl.where(point >= grid, size, first).to(tl.int32)


@triton.jit
def first_pixel_of(point, grid, size, WIDE: tl.constexpr):
    """`first_pixel`. A division in 64 bits is a call, for which registers are saved."""
    if WIDE:
        return first_pixel(point, grid, size)
    else:
        first = ((2 * point + 1) * size + grid - 1) // (2 * grid)
        return tl.where(point == 0, 0, tl.where(point >= grid, size, first))


@triton.jit
def pixels_of_cell(cell, grid, size, MODE: tl.constexpr, WIDE: tl.constexpr):
    """(first pixel, number of pixels) of an axis of the cell that begins at a grid point; none of one before point 0."""
    begin = cell * 0
    length = begin + size
    if MODE == EQUAL:
        begin = cell
        length = cell * 0 + 1
    if MODE == LINEAR:
        start = tl.maximum(cell, 0)
        begin = first_pixel_of(start, grid, size, WIDE)
        length = tl.where(cell < 0, 0, first_pixel_of(start + 1, grid, size, WIDE) - begin)
    return begin, length


@triton.jit
def share_of(position, point, bit, grid, size, MODE: tl.constexpr, R: tl.constexpr):
    """Weight of each corner (K, 1) at each pixel (1, P) along an axis; a last cell has no second point."""
    share = (position * 0).to(R) + 1.0
    if MODE == LINEAR:
        weight = tl.minimum(tl.maximum(source_of(position, grid, size, R) - point.to(R), 0.0), 1.0)
        weight = tl.where(point + 1 < grid, weight, 0.0)
        share = tl.where(bit == 1, weight, 1.0 - weight)
    return share


# --- every pixel: sums, maps, posterior, gradient of the class logits, and of a field on the pixel grid -----------------


@triton.jit
def fold(x, BJ: tl.constexpr, BLOCK: tl.constexpr):
    """(N,) -> (BJ, BLOCK): the columns of a pixel along axis 0."""
    return tl.reshape(x, (BJ, BLOCK))


@triton.jit
def spread(x, BJ: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) -> (N,): the pixel's value for each of its columns."""
    return tl.reshape(tl.broadcast_to(x[None, :], (BJ, BLOCK)), (BJ * BLOCK,))


@triton.jit
def plane_of(j, pixels, WIDE: tl.constexpr):
    if WIDE:
        return j.to(tl.int64) * pixels
    else:
        return j * pixels
