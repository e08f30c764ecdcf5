"""The Triton kernels. Equations, schedule and traffic: the package's docstring. Imported on first use only.

Every tile is (CP, N): observed class i, padded to a power of two, and pairs of a true class j and a pixel, one of which
is contiguous in memory. That, and no more axes, settles the layout in every version of Triton: the pairs are lanes and
warps, and the CP entries of a column lie in one thread's registers, where its reductions need no communication and the
rows beyond C cost nothing (their masks are constants).
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    EQUAL,
    LINEAR,
    ONE_POINT,
    add_exp,
    cm_gradient,
    column_terms,
    finite,
    first_pixel,
    fold,
    gradient_factor,
    label_and_weight,
    load_columns,
    load_scores,
    number,
    pixels_of_cell,
    plane_of,
    scaled_exp,
    share_of,
    spread,
)


@triton.jit
def columns_of_pixels(
    seg, cm, j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
    C: tl.constexpr, CP: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    CORNERS: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`column_terms` of columns j, and log(p[j] q[j]) up to a constant of the pixel; s is s[j] less its maximum."""
    a = load_columns(
        cm, j, px, labelled, depth, height, width, grid_d, grid_h, grid_w,
        C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
    )  # fmt: skip
    e, inv_z, h, log_q, ajj = column_terms(a, j, y, transition, C, CP)
    return e, inv_z, h, tl.where(j < C, ajj, 0.0), tl.where(j < C, s + log_q, float("-inf"))


@triton.jit
def write_columns(
    grad_seg, grad_cm, posterior, e, inv_z, h, ajj, s, joint, j, px, y, s_sum, shift, joint_sum, inside, labelled, w, wt,
    begin, seg_pixels, pixels, image, C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    IDENTITY: tl.constexpr, SHARED: tl.constexpr, BAND: tl.constexpr, ADD_SEG: tl.constexpr, ADD_CM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The outputs of columns j. Everything inside the image is written: zeros where the pixel does not count."""
    joint_sum = spread(joint_sum, BJ, BLOCK)
    p = tl.exp(s) / spread(s_sum, BJ, BLOCK)
    r = tl.exp(joint - spread(shift, BJ, BLOCK)) / joint_sum
    known = labelled & (joint_sum != 0)
    live = known & (w != 0)
    at = plane_of(j, pixels, WIDE) + px
    mask = (j < C) & inside
    if posterior is not None:
        tl.store(posterior + at, tl.where(known, r, p).to(posterior.dtype.element_ty), mask=mask)
    if grad_seg is not None:
        at_seg = grad_seg + at
        if BAND:
            at_seg = grad_seg + (plane_of(j, seg_pixels, WIDE) + (px - begin))
        gradient = tl.where(live, w * (p - r), 0.0)
        if ADD_SEG:  # to that of other kinds and layers
            gradient += tl.load(at_seg, mask=mask, other=0.0)
        tl.store(at_seg, gradient.to(grad_seg.dtype.element_ty), mask=mask)
    if grad_cm is not None:
        i = tl.arange(0, CP)[:, None]
        gradient = cm_gradient(e, inv_z, h, r, ajj, j, y, live, w, wt, IDENTITY, C, CP)
        at_cm = grad_cm + (plane_of(i * C + j[None, :], pixels, WIDE) + px[None, :])
        mask_cm = (i < C) & mask[None, :]
        if ADD_CM:
            gradient += tl.load(at_cm, mask=mask_cm, other=0.0)
        elif SHARED:  # this thread's own sum, image after image
            gradient += tl.load(at_cm, mask=mask_cm & (image > 0), other=0.0)
        tl.store(at_cm, gradient.to(grad_cm.dtype.element_ty), mask=mask_cm)


@triton.jit
def one_image(
    seg, cm, labels, transition, class_weight, pixel_weight,
    loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
    factor, trace_factor, ignore_index, b, image, first,
    batch, layers, layer, begin, end, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w,
    seg_d, seg_h, seg_w, seg_pixels, pixels_again,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SEG_D: tl.constexpr, SEG_H: tl.constexpr, SEG_W: tl.constexpr, SEG_CORNERS: tl.constexpr,
    SHARED: tl.constexpr, ADD_SEG: tl.constexpr, ADD_CM: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of image ``b``. Returns their weighted nll and trace."""
    ONE_TILE: tl.constexpr = BJ >= C
    IDENTITY: tl.constexpr = transition is None
    BAND: tl.constexpr = not ((SEG_D == EQUAL) & (SEG_H == EQUAL) & (SEG_W == EQUAL))
    pixels = depth * height * width
    seg += b * C * (seg_d * seg_h * seg_w)
    cm += b * cm_stride
    if grad_seg is not None:
        grad_seg += b * seg_pixels * C
    if posterior is not None:
        posterior += b * pixels * C
    if grad_cm is not None:
        grad_cm += b * grad_cm_stride

    # Pairs of a column and a pixel: label and weight are read for each, which costs less than handing them round.
    pair = tl.arange(0, BJ * BLOCK)
    px = first + pair % BLOCK
    j = pair // BLOCK
    inside = px < end
    at_layer = (b * layers + layer) * pixels
    y, labelled, w = label_and_weight(
        labels, class_weight, pixel_weight, at_layer + px, inside, ignore_index, C, R
    )  # fmt: skip
    w = tl.where(labelled, w * factor, 0.0)
    wt = w * trace_factor
    use = labelled
    if posterior is not None:
        use = inside  # p is wanted where there is no label, too

    own_px = first + tl.arange(0, BLOCK)
    own = own_px < end
    at_own = at_layer + own_px
    _, own_labelled, weight = label_and_weight(
        labels, class_weight, pixel_weight, at_own, own, ignore_index, C, R
    )  # fmt: skip

    if ONE_TILE:
        s = load_scores(
            seg, j, px, use, depth, height, width, seg_d, seg_h, seg_w,
            C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
        )  # fmt: skip
        s = tl.where(j < C, s, float("-inf"))
        scores = fold(s, BJ, BLOCK)
    else:
        every_j = tl.arange(0, CP)[:, None]
        wanted = own
        if posterior is None:
            wanted = own_labelled
        scores = load_scores(
            seg, every_j, own_px, wanted, depth, height, width, seg_d, seg_h, seg_w,
            C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
        )  # fmt: skip
        scores = tl.where(every_j < C, scores, float("-inf"))
    s_top = tl.max(scores, 0)
    s_sum = tl.sum(tl.exp(scores - s_top[None, :]), 0)
    s_tops = spread(s_top, BJ, BLOCK)

    # Evidence: D = joint_sum * exp(joint_top) / s_sum.
    joint_top = tl.full((BLOCK,), float("-inf"), R)
    joint_sum = tl.zeros((BLOCK,), R)
    if ONE_TILE:
        s -= s_tops
        e, inv_z, h, ajj, joint = columns_of_pixels(
            seg, cm, j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
            C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
        )  # fmt: skip
        joint_top, joint_sum = add_exp(joint_top, joint_sum, fold(joint, BJ, BLOCK))
        trace = tl.sum(fold(ajj, BJ, BLOCK), 0)
    else:
        trace = tl.zeros((BLOCK,), R)
        for j0 in range(0, C, BJ):
            s = load_scores(
                seg, j0 + j, px, use, depth, height, width, seg_d, seg_h, seg_w,
                C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
            )  # fmt: skip
            s -= s_tops
            e, inv_z, h, ajj, joint = columns_of_pixels(
                seg, cm, j0 + j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
                C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
            )  # fmt: skip
            joint_top, joint_sum = add_exp(joint_top, joint_sum, fold(joint, BJ, BLOCK))
            trace += tl.sum(fold(ajj, BJ, BLOCK), 0)

    shift = finite(joint_top)
    # A label that no class can explain: D = 0. NaN is no such thing: it has to be seen.
    nll = tl.where(joint_sum != 0, tl.log(s_sum) - (shift + tl.log(joint_sum)), float("inf"))
    weighs = own_labelled & (weight != 0)  # 0 * inf is not 0
    weighted_nll = tl.where(weighs, weight * nll, 0.0)
    weighted_trace = tl.where(weighs, weight * trace, 0.0)
    if nll_map is not None:
        loss = factor * (weighted_nll + trace_factor * weighted_trace)
        tl.store(loss_map + at_own, tl.where(factor == 0, 0.0, loss), mask=own)
        tl.store(nll_map + at_own, weighted_nll, mask=own)
        tl.store(trace_map + at_own, weighted_trace, mask=own)
    if evidence is not None:
        at_px = b * pixels + own_px
        plane_size = batch.to(tl.int64) * pixels
        tl.store(evidence + at_px, s_top, mask=own)
        tl.store(evidence + plane_size + at_px, shift, mask=own)
        tl.store(evidence + 2 * plane_size + at_px, joint_sum, mask=own)

    if (grad_seg is not None) or (grad_cm is not None) or (posterior is not None):
        if ONE_TILE:
            write_columns(
                grad_seg, grad_cm, posterior, e, inv_z, h, ajj, s, joint, j, px, y, s_sum, shift, joint_sum,
                inside, labelled, w, wt, begin, seg_pixels, pixels_again, image, C, CP, BJ, BLOCK,
                IDENTITY, SHARED, BAND, ADD_SEG, ADD_CM, WIDE,
            )  # fmt: skip
        else:
            for j0 in range(0, C, BJ):
                # The same arithmetic on the same values as above, so that joint - joint_top cancels exactly.
                s = load_scores(
                    seg, j0 + j, px, use, depth, height, width, seg_d, seg_h, seg_w,
                    C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
                )  # fmt: skip
                s -= s_tops
                e, inv_z, h, ajj, joint = columns_of_pixels(
                    seg, cm, j0 + j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
                    C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                )  # fmt: skip
                write_columns(
                    grad_seg, grad_cm, posterior, e, inv_z, h, ajj, s, joint, j0 + j, px, y, s_sum, shift, joint_sum,
                    inside, labelled, w, wt, begin, seg_pixels, pixels_again, image, C, CP, BJ, BLOCK,
                    IDENTITY, SHARED, BAND, ADD_SEG, ADD_CM, WIDE,
                )  # fmt: skip
    return weighted_nll, weighted_trace


PIXEL_SIZES = ["ignore_index", "batch", "layers", "layer", "begin", "end", "cm_stride", "grad_cm_stride", "depth", "height",
               "width", "grid_d", "grid_h", "grid_w", "seg_d", "seg_h", "seg_w", "seg_pixels", "pixels_again"]  # fmt: skip


# No size is specialised on: a width known to divide by 16 would give a lane four neighbouring pixels, and four times the
# registers, at BLOCK = 32.
@triton.jit(do_not_specialize=PIXEL_SIZES)
def pixel_kernel(
    seg, cm, labels, transition, class_weight, pixel_weight, scale,
    partials, loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
    loss_scale, loss_scale_low, trace_weight, trace_weight_low, ignore_index,
    batch, layers, layer, begin, end, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w,
    seg_d, seg_h, seg_w, seg_pixels, pixels_again,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SEG_D: tl.constexpr, SEG_H: tl.constexpr, SEG_W: tl.constexpr, SEG_CORNERS: tl.constexpr,
    SHARED: tl.constexpr, ADD_SEG: tl.constexpr, ADD_CM: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BLOCK of the pixels from ``begin`` to ``end`` of one image, one layer of its labels; or of all images one after the other
    where they share the field's gradient (SHARED).

    ``grad_seg`` has ``seg_pixels`` pixels an image: all, or, where the class logits have a grid of their own, those from
    ``begin`` to ``end``, which `gather_kernel` then folds onto the grid. ADD_SEG, ADD_CM: to what the gradients hold.

    The pairs of a tile are BJ columns of BLOCK pixels: a pixel is a lane and a column a warp. Only the sums over j go
    from warp to warp. Up to 32 classes BJ holds every column and the logits are read once. Beyond, columns come BJ at a
    time and twice: first for the evidence, then for the gradient. The second reading is meant to hit L2: a block is 32
    pixels, the fewest that fill a warp, and 32 C^2 logits (139 KB at C = 33 in float32).
    """
    blocks = tl.cdiv(end - begin, BLOCK)
    program = tl.program_id(0)
    first = begin + program % blocks * BLOCK
    factor = gradient_factor(scale, loss_scale, loss_scale_low, R)
    trace_factor = number(trace_weight, trace_weight_low, R)
    if SHARED:
        nll_sum = tl.zeros((BLOCK,), tl.float64)
        trace_sum = tl.zeros((BLOCK,), tl.float64)
        for image in range(batch):
            nll, trace = one_image(
                seg, cm, labels, transition, class_weight, pixel_weight,
                loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
                factor, trace_factor, ignore_index, (program * 0 + image).to(tl.int64), image, first,
                batch, layers, layer, begin, end, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w,
                seg_d, seg_h, seg_w, seg_pixels, pixels_again,
                C, CP, BJ, BLOCK, MODE_D, MODE_H, MODE_W, CORNERS, SEG_D, SEG_H, SEG_W, SEG_CORNERS,
                SHARED, ADD_SEG, ADD_CM, WIDE, R,
            )  # fmt: skip
            nll_sum += nll.to(tl.float64)
            trace_sum += trace.to(tl.float64)
    else:
        # Not a loop of one round: the compiler would keep every address, which the rounds share, in registers.
        nll, trace = one_image(
            seg, cm, labels, transition, class_weight, pixel_weight,
            loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
            factor, trace_factor, ignore_index, (program // blocks).to(tl.int64), 0, first,
            batch, layers, layer, begin, end, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w,
            seg_d, seg_h, seg_w, seg_pixels, pixels_again,
            C, CP, BJ, BLOCK, MODE_D, MODE_H, MODE_W, CORNERS, SEG_D, SEG_H, SEG_W, SEG_CORNERS,
            SHARED, ADD_SEG, ADD_CM, WIDE, R,
        )  # fmt: skip
        nll_sum = nll.to(tl.float64)  # over pixels of very different weight
        trace_sum = trace.to(tl.float64)
    if partials is not None:
        tl.store(partials + 2 * program.to(tl.int64), tl.sum(nll_sum, 0))
        tl.store(partials + 2 * program.to(tl.int64) + 1, tl.sum(trace_sum, 0))


@triton.jit(do_not_specialize=["count", "slot"])
def finish_kernel(
    partials, scale, loss, nll, trace, weighted, slot,
    loss_scale, loss_scale_low, trace_weight, trace_weight_low, count, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The partial sums of a kind in fixed order and float64, then its scalars. One program; 65536 partials: 16 rounds."""
    nll_sum = tl.zeros((BLOCK,), tl.float64)
    trace_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        nll_sum += tl.load(partials + 2 * at.to(tl.int64), mask=at < count, other=0.0)
        trace_sum += tl.load(partials + 2 * at.to(tl.int64) + 1, mask=at < count, other=0.0)
    total_nll = tl.sum(nll_sum, 0)
    total_trace = tl.sum(trace_sum, 0)
    plain = tl.full((), 1.0, tl.float64)
    if scale is not None:
        plain = tl.load(scale).to(tl.float64)
    factor = plain * number(loss_scale, loss_scale_low, tl.float64)
    total_loss = total_nll + number(trace_weight, trace_weight_low, tl.float64) * total_trace
    # a weight of 0 counts for nothing, even if the sum is inf
    tl.store(weighted + slot, tl.where(factor == 0, 0.0, factor * total_loss))
    tl.store(loss, tl.where(plain == 0, 0.0, plain * total_loss).to(R))
    tl.store(nll, tl.where(plain == 0, 0.0, plain * total_nll).to(R))
    tl.store(trace, tl.where(plain == 0, 0.0, plain * total_trace).to(R))


@triton.jit(do_not_specialize=["count", "ignore_index"])
def labelled_weight_kernel(
    labels, class_weight, pixel_weight, partials, count, ignore_index,
    C: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Summed weight of the labelled among BLOCK, 2 BLOCK, ... pixels, every program its own partial sum."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, _, weight = label_and_weight(labels, class_weight, pixel_weight, at, at < count, ignore_index, C, R)
        total += weight.to(tl.float64)
    tl.store(partials + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor in place; where that is 1, as after loss.backward(), nothing is read or written."""
    by = tl.load(factor)
    if by != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(values + at, mask=at < count)
            scaled = tl.where(by == 0, 0.0, value.to(by.dtype) * by)  # inf times 0 is NaN
            tl.store(values + at, scaled.to(value.dtype), mask=at < count)


# --- gradient of class logits on a grid of their own --------------------------------------------------------------------


@triton.jit
def support(point, first, last, grid, size, MODE: tl.constexpr, WIDE: tl.constexpr):
    """(first pixel, number of pixels) of an axis that a grid point has a share of, among those from ``first`` to ``last``."""
    begin, length = pixels_of_cell(point, grid, size, MODE, WIDE)
    end = begin + length
    if MODE == LINEAR:  # the cell before it, too
        before, length = pixels_of_cell(point - 1, grid, size, MODE, WIDE)
        begin = tl.where(length > 0, before, begin)
    begin = tl.maximum(begin, first)
    return begin, tl.maximum(tl.minimum(end, last) - begin, 0)


@triton.jit
def share_of_point(position, point, grid, size, MODE: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr):
    """Of a pixel in the `support` of a point: its weight there."""
    first, _ = pixels_of_cell(point, grid, size, MODE, WIDE)
    second = tl.where(position < first, 1, 0)  # the point is the second of the cell before it
    return share_of(position, point - second, second, grid, size, MODE, R)


GATHER_SIZES = ["begin", "seg_pixels", "first_point", "last_point", "first_d", "last_d", "first_h", "last_h", "first_w",
                "last_w", "depth", "height", "width", "seg_d", "seg_h", "seg_w"]  # fmt: skip


@triton.jit(do_not_specialize=GATHER_SIZES)
def gather_kernel(
    band, grad, begin, seg_pixels, first_point, last_point, first_d, last_d, first_h, last_h, first_w, last_w,
    depth, height, width, seg_d, seg_h, seg_w,
    C: tl.constexpr, CB: tl.constexpr, POINTS: tl.constexpr, PIX: tl.constexpr,
    SEG_D: tl.constexpr, SEG_H: tl.constexpr, SEG_W: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """grad[b, c, point] += sum of share * band[b, c, pixel - begin] over a box of pixels: CB classes of POINTS points.

    A point has PIX lanes, which go through its pixels in fixed order, and is written by one program.
    """
    points = seg_d * seg_h * seg_w
    blocks = tl.cdiv(last_point - first_point, POINTS)
    chunks: tl.constexpr = (C + CB - 1) // CB
    program = tl.program_id(0)
    first = first_point + program % blocks * POINTS
    program = program // blocks
    rows = program % chunks * CB + tl.arange(0, CB)[:, None]
    b = (program // chunks).to(tl.int64)

    lane = tl.arange(0, POINTS * PIX)
    point = first + lane // PIX
    exists = point < last_point
    point = tl.where(exists, point, 0)
    w_point = point % seg_w
    h_point = point // seg_w % seg_h
    d_point = point // (seg_w * seg_h)
    w_begin, w_length = support(w_point, first_w, last_w, seg_w, width, SEG_W, WIDE)
    h_begin, h_length = support(h_point, first_h, last_h, seg_h, height, SEG_H, WIDE)
    d_begin, d_length = support(d_point, first_d, last_d, seg_d, depth, SEG_D, WIDE)
    box = tl.where(exists, d_length * h_length * w_length, 0)
    w_length = tl.maximum(w_length, 1)  # divisors
    h_length = tl.maximum(h_length, 1)
    plane = plane_of(rows, seg_pixels, WIDE)
    band += b * C * seg_pixels
    total = tl.zeros((CB, POINTS * PIX), R)
    for step in range(tl.cdiv(tl.max(box, 0), PIX)):
        index = step * PIX + lane % PIX
        inside = (index >= 0) & (index < box)  # below 0: beyond 2^31
        w_px = w_begin + index % w_length
        h_px = h_begin + index // w_length % h_length
        d_px = d_begin + index // (w_length * h_length)
        share = (
            share_of_point(d_px, d_point, seg_d, depth, SEG_D, WIDE, R)
            * share_of_point(h_px, h_point, seg_h, height, SEG_H, WIDE, R)
            * share_of_point(w_px, w_point, seg_w, width, SEG_W, WIDE, R)
        )
        px = (d_px * height + h_px) * width + w_px - begin
        values = tl.load(band + (plane + px[None, :]), mask=(rows < C) & inside[None, :], other=0.0)
        total += values * tl.where(inside, share, 0.0)[None, :]

    summed = tl.sum(tl.reshape(total, (CB, POINTS, PIX)), 2)
    out = first + tl.arange(0, POINTS)[None, :]
    at = grad + b * C * points + (plane_of(rows, points, WIDE) + out)
    mask = (rows < C) & (out < last_point)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + summed, mask=mask)


# --- the posterior of several kinds -------------------------------------------------------------------------------------


LOG_Q_SIZES = ["ignore_index", "layers", "layer", "cm_stride", "depth", "height", "width", "grid_d", "grid_h", "grid_w"]


@triton.jit(do_not_specialize=LOG_Q_SIZES)
def log_q_kernel(
    cm, labels, transition, out, ignore_index, layers, layer, cm_stride, depth, height, width, grid_d, grid_h, grid_w,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    ADD: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """log q[j] of one layer of labels, 0 where there is none: BJ columns of BLOCK pixels. ADD: to what ``out`` holds."""
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    chunks: tl.constexpr = (C + BJ - 1) // BJ
    program = tl.program_id(0)
    pair = tl.arange(0, BJ * BLOCK)
    j = program % chunks * BJ + pair // BLOCK
    program = program // chunks
    px = program % blocks * BLOCK + pair % BLOCK
    b = (program // blocks).to(tl.int64)
    inside = px < pixels
    y, labelled, _ = label_and_weight(
        labels, None, None, (b * layers + layer) * pixels + px, inside, ignore_index, C, R
    )
    a = load_columns(
        cm + b * cm_stride, j, px, labelled, depth, height, width, grid_d, grid_h, grid_w,
        C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
    )  # fmt: skip
    _, _, _, log_q, _ = column_terms(a, j, y, transition, C, CP)
    log_q = tl.where(labelled, log_q, 0.0)
    at = out + b * C * pixels + (plane_of(j, pixels, WIDE) + px)
    mask = (j < C) & inside
    if ADD:
        log_q += tl.load(at, mask=mask, other=0.0)
    tl.store(at, log_q, mask=mask)


# --- gradient of a field on its own grid --------------------------------------------------------------------------------


@triton.jit
def cell_range(index, first, grid, size, MODE: tl.constexpr):
    """(grid point, first pixel, number of pixels) of an axis of a cell."""
    point = first + 2 * index
    begin = index * 0
    length = size
    if MODE == EQUAL:
        point = index
        begin = index
        length = index * 0 + 1
    if MODE == ONE_POINT:
        point = index * 0
    if MODE == LINEAR:
        begin = first_pixel(point, grid, size)
        length = first_pixel(point + 1, grid, size) - begin
    return point, begin, length


@triton.jit(do_not_specialize=[
    "ignore_index", "batch", "layers", "layer", "images", "cm_stride", "depth", "height", "width", "grid_d", "grid_h",
    "grid_w", "seg_d", "seg_h", "seg_w", "first_d", "first_h", "first_w", "cells_d", "cells_h", "cells_w", "fields",
    "copies", "entry_stride", "node_stride", "field_stride", "copy_stride",
])  # fmt: skip
def cell_kernel(
    seg, cm, labels, transition, class_weight, pixel_weight, scale, evidence, grad,
    loss_scale, loss_scale_low, trace_weight, trace_weight_low, ignore_index,
    batch, layers, layer, images, cm_stride, depth, height, width, grid_d, grid_h, grid_w, seg_d, seg_h, seg_w,
    first_d, first_h, first_w, cells_d, cells_h, cells_w, fields, copies,
    entry_stride, node_stride, field_stride, copy_stride,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, P: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SEG_D: tl.constexpr, SEG_H: tl.constexpr, SEG_W: tl.constexpr, SEG_CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Gradient of one cell's corners from its pixels, or from one of ``copies`` shares of them; BJ columns.

    The pairs of a tile are P pixels of BJ columns: a column is a lane, so that the corners' logits and the sums of their
    gradients stay in its registers while the pixels go by. A sum over pixels then costs one multiply-add for a corner
    and entry; with a pixel a lane it would cost five shuffles. ``cm`` is (fields, points, C, C): a row of it is
    contiguous. Cells of one colour share no grid point: the sums are added to ``grad`` without atomics.
    """
    blocks_j: tl.constexpr = (C + BJ - 1) // BJ
    program = tl.program_id(0)
    first_j = program % blocks_j * BJ
    program = program // blocks_j
    w_point, w_begin, w_length = cell_range(program % cells_w, first_w, grid_w, width, MODE_W)
    program = program // cells_w
    h_point, h_begin, h_length = cell_range(program % cells_h, first_h, grid_h, height, MODE_H)
    program = program // cells_h
    d_point, d_begin, d_length = cell_range(program % cells_d, first_d, grid_d, depth, MODE_D)
    program = program // cells_d
    field = (program % fields).to(tl.int64)
    copy = program // fields

    pair = tl.arange(0, P * BJ)
    j = first_j + pair % BJ
    i = tl.arange(0, CP)
    corner = tl.arange(0, CORNERS)
    w_bit = corner % 2 * (MODE_W // 2)
    h_bit = corner // (1 + MODE_W // 2) % 2 * (MODE_H // 2)
    d_bit = corner // ((1 + MODE_W // 2) * (1 + MODE_H // 2)) % 2 * (MODE_D // 2)
    exists = (d_point + d_bit < grid_d) & (h_point + h_bit < grid_h) & (w_point + w_bit < grid_w)
    node = (((d_point + d_bit) * grid_h + h_point + h_bit) * grid_w + w_point + w_bit).to(tl.int64)
    at = field * cm_stride + (node * C * C)[None, :, None] + (i[:, None] * C)[:, :, None] + j[None, None, :]
    mask = (i < C)[:, None, None] & (j < C)[None, None, :] & exists[None, :, None]
    corners = tl.load(cm + at, mask=mask, other=0.0).to(R)
    corners = tl.where((i < C)[:, None, None], corners, 0.0)

    factor = gradient_factor(scale, loss_scale, loss_scale_low, R)
    trace_factor = number(trace_weight, trace_weight_low, R)
    pixels = depth * height * width
    plane_size = batch.to(tl.int64) * pixels
    box = d_length * h_length * w_length
    if WIDE:
        count = box.to(tl.int64) * images
    else:
        count = box * images
    steps = tl.cdiv(count, P)
    share = tl.cdiv(steps, copies)
    total = tl.zeros((CP, CORNERS, P * BJ), R)
    for step in range(copy * share, tl.minimum(copy * share + share, steps)):
        index = step * P + pair // BJ
        inside = index < count
        w_px = (w_begin + index % w_length).to(tl.int32)
        h_px = (h_begin + index // w_length % h_length).to(tl.int32)
        d_px = (d_begin + index // (w_length * h_length) % d_length).to(tl.int32)
        b = field + index // box
        px = (d_px * height + h_px) * width + w_px
        at_px = b * pixels + px
        y, labelled, weight = label_and_weight(
            labels, class_weight, pixel_weight, (b * layers + layer) * pixels + px, inside, ignore_index, C, R
        )  # fmt: skip
        w = tl.where(labelled, weight * factor, 0.0)
        joint_sum = tl.load(evidence + 2 * plane_size + at_px, mask=labelled, other=0.0)
        live = labelled & (w != 0) & (joint_sum != 0)
        if tl.max(live.to(tl.int32), 0) > 0:  # drawings are coarse: whole cells have no label
            s_top = tl.load(evidence + at_px, mask=live, other=0.0)
            joint_top = tl.load(evidence + plane_size + at_px, mask=live, other=0.0)
            s = load_scores(
                seg + b * C * (seg_d * seg_h * seg_w), j, px, live, depth, height, width, seg_d, seg_h, seg_w,
                C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
            )  # fmt: skip
            shares = (
                share_of(d_px[None, :], d_point, d_bit[:, None], grid_d, depth, MODE_D, R)
                * share_of(h_px[None, :], h_point, h_bit[:, None], grid_h, height, MODE_H, R)
                * share_of(w_px[None, :], w_point, w_bit[:, None], grid_w, width, MODE_W, R)
            )[None, :, :]
            a = tl.where((i < C)[:, None], tl.sum(corners * shares, 1), float("-inf"))
            e, inv_z, h, log_q, ajj = column_terms(a, j, y, transition, C, CP)
            r = tl.exp((s - s_top) + log_q - joint_top) / joint_sum
            gradient = cm_gradient(
                e, inv_z, h, r, ajj, j, y, live, w, w * trace_factor, transition is None, C, CP
            )  # fmt: skip
            total += gradient[:, None, :] * shares

    summed = tl.sum(tl.reshape(total, (CP, CORNERS, P, BJ)), 2)
    j = first_j + tl.arange(0, BJ)
    out = field * field_stride + copy.to(tl.int64) * copy_stride
    entry = ((i * C)[:, None, None] + j[None, None, :]).to(tl.int64)
    at = grad + out + entry * entry_stride + (node * node_stride)[None, :, None]
    mask = (i < C)[:, None, None] & (j < C)[None, None, :] & exists[None, :, None]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + summed, mask=mask)


# --- gradient of the transition -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[
    "ignore_index", "batch", "layers", "layer", "cm_stride", "depth", "height", "width", "grid_d", "grid_h", "grid_w",
    "seg_d", "seg_h", "seg_w", "programs",
])  # fmt: skip
def transition_kernel(
    seg, cm, labels, class_weight, pixel_weight, scale, evidence, partials,
    loss_scale, loss_scale_low, ignore_index,
    batch, layers, layer, cm_stride, depth, height, width, grid_d, grid_h, grid_w, seg_d, seg_h, seg_w, programs,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SEG_D: tl.constexpr, SEG_H: tl.constexpr, SEG_W: tl.constexpr, SEG_CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """partials[share, y, i] = -sum over a share of the blocks' pixels labelled y of w (sum_j A[i,j] p[j]) / D.

    A program has one label and looks at the logits of no block without it: drawings are coherent, a block has few.
    """
    program = tl.program_id(0)
    wanted = program % C
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    plane_size = batch.to(tl.int64) * pixels
    pair = tl.arange(0, BJ * BLOCK)
    factor = gradient_factor(scale, loss_scale, loss_scale_low, R)
    total = tl.zeros((CP,), tl.float64)
    for block in range(program // C, blocks * batch, programs):
        px = block % blocks * BLOCK + pair % BLOCK
        b = (block // blocks).to(tl.int64)
        at = b * pixels + px
        y, labelled, weight = label_and_weight(
            labels, class_weight, pixel_weight, (b * layers + layer) * pixels + px, px < pixels, ignore_index, C, R
        )  # fmt: skip
        w = tl.where(labelled, weight * factor, 0.0)
        mine = labelled & (y == wanted) & (w != 0)
        if tl.max(mine.to(tl.int32), 0) > 0:
            joint_sum = tl.load(evidence + 2 * plane_size + at, mask=mine, other=0.0)
            live = mine & (joint_sum != 0)
            s_top = tl.load(evidence + at, mask=live, other=0.0)
            joint_top = tl.load(evidence + plane_size + at, mask=live, other=0.0)
            log_d = joint_top + tl.log(tl.where(live, joint_sum, 1.0))  # and - log s_sum, as log p has
            for j0 in range(0, C, BJ):
                j = j0 + pair // BLOCK
                a = load_columns(
                    cm + b * cm_stride, j, px, live, depth, height, width, grid_d, grid_h, grid_w,
                    C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                )  # fmt: skip
                top = tl.max(a, 0)
                z = tl.sum(tl.exp(a - top[None, :]), 0)
                s = load_scores(
                    seg + b * C * (seg_d * seg_h * seg_w), j, px, live, depth, height, width, seg_d, seg_h, seg_w,
                    C, SEG_D, SEG_H, SEG_W, SEG_CORNERS, WIDE, R,
                )  # fmt: skip
                # p A / D in one exponential: each factor alone may leave the range
                u = ((s - s_top) - log_d)[None, :] + (a - top[None, :])
                reported = tl.where((live & (j < C))[None, :], scaled_exp((w / z)[None, :], u), 0.0)
                total -= tl.sum(reported.to(tl.float64), 1)
    at_i = tl.arange(0, CP)
    tl.store(partials + program.to(tl.int64) * C + at_i, total, mask=at_i < C)
