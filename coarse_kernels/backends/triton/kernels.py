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
    cm_gradient,
    column_terms,
    fold,
    gradient_factor,
    label_and_weight,
    load_columns,
    number,
    plane_of,
    source_of,
    spread,
)


@triton.jit
def add_evidence(joint_top, joint_sum, joint):
    """(max, sum of exp(joint - max)) over the columns so far and those of joint (BJ, BLOCK)."""
    top = tl.maximum(joint_top, tl.max(joint, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    joint_sum = joint_sum * tl.exp(joint_top - shift) + tl.sum(tl.exp(joint - shift[None, :]), 0)
    return top, joint_sum


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
    pixels, image, C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    IDENTITY: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
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
        tl.store(grad_seg + at, tl.where(live, w * (p - r), 0.0).to(grad_seg.dtype.element_ty), mask=mask)
    if grad_cm is not None:
        i = tl.arange(0, CP)[:, None]
        gradient = cm_gradient(e, inv_z, h, r, ajj, j, y, live, w, wt, IDENTITY, C, CP)
        at_cm = grad_cm + (plane_of(i * C + j[None, :], pixels, WIDE) + px[None, :])
        mask_cm = (i < C) & mask[None, :]
        if SHARED:  # this thread's own sum, image after image
            gradient += tl.load(at_cm, mask=mask_cm & (image > 0), other=0.0)
        tl.store(at_cm, gradient.to(grad_cm.dtype.element_ty), mask=mask_cm)


@triton.jit
def one_image(
    seg, cm, labels, transition, class_weight, pixel_weight,
    loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
    factor, trace_factor, ignore_index, b, image, first,
    batch, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w, pixels_again,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SHARED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of image ``b``. Returns their weighted nll and trace."""
    ONE_TILE: tl.constexpr = BJ >= C
    IDENTITY: tl.constexpr = transition is None
    pixels = depth * height * width
    seg += b * pixels * C
    cm += b * cm_stride
    if grad_seg is not None:
        grad_seg += b * pixels * C
    if posterior is not None:
        posterior += b * pixels * C
    if grad_cm is not None:
        grad_cm += b * grad_cm_stride

    # Pairs of a column and a pixel: label and weight are read for each, which costs less than handing them round.
    pair = tl.arange(0, BJ * BLOCK)
    px = first + pair % BLOCK
    j = pair // BLOCK
    inside = px < pixels
    y, labelled, w = label_and_weight(
        labels, class_weight, pixel_weight, b * pixels + px, inside, ignore_index, C, R
    )  # fmt: skip
    w = tl.where(labelled, w * factor, 0.0)
    wt = w * trace_factor
    use = labelled
    if posterior is not None:
        use = inside  # p is wanted where there is no label, too

    own_px = first + tl.arange(0, BLOCK)
    own = own_px < pixels
    at_px = b * pixels + own_px
    _, own_labelled, weight = label_and_weight(
        labels, class_weight, pixel_weight, at_px, own, ignore_index, C, R
    )  # fmt: skip

    if ONE_TILE:
        s = tl.load(seg + (plane_of(j, pixels, WIDE) + px), mask=(j < C) & use, other=0.0).to(R)
        s = tl.where(j < C, s, float("-inf"))
        scores = fold(s, BJ, BLOCK)
    else:
        every_j = tl.arange(0, CP)[:, None]
        at_scores = plane_of(every_j, pixels, WIDE) + own_px[None, :]
        wanted = own
        if posterior is None:
            wanted = own_labelled
        scores = tl.load(seg + at_scores, mask=(every_j < C) & wanted[None, :], other=0.0).to(R)
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
        joint_top, joint_sum = add_evidence(joint_top, joint_sum, fold(joint, BJ, BLOCK))
        trace = tl.sum(fold(ajj, BJ, BLOCK), 0)
    else:
        trace = tl.zeros((BLOCK,), R)
        for j0 in range(0, C, BJ):
            at = plane_of(j0 + j, pixels, WIDE) + px
            s = tl.load(seg + at, mask=(j0 + j < C) & use, other=0.0).to(R) - s_tops
            e, inv_z, h, ajj, joint = columns_of_pixels(
                seg, cm, j0 + j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
                C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
            )  # fmt: skip
            joint_top, joint_sum = add_evidence(joint_top, joint_sum, fold(joint, BJ, BLOCK))
            trace += tl.sum(fold(ajj, BJ, BLOCK), 0)

    shift = tl.where(joint_top == float("-inf"), 0.0, joint_top)
    # A label that no class can explain: D = 0. NaN is no such thing: it has to be seen.
    nll = tl.where(joint_sum != 0, tl.log(s_sum) - (shift + tl.log(joint_sum)), float("inf"))
    weighs = own_labelled & (weight != 0)  # 0 * inf is not 0
    weighted_nll = tl.where(weighs, weight * nll, 0.0)
    weighted_trace = tl.where(weighs, weight * trace, 0.0)
    if nll_map is not None:
        loss = factor * (weighted_nll + trace_factor * weighted_trace)
        tl.store(loss_map + at_px, tl.where(factor == 0, 0.0, loss), mask=own)
        tl.store(nll_map + at_px, weighted_nll, mask=own)
        tl.store(trace_map + at_px, weighted_trace, mask=own)
    if evidence is not None:
        plane_size = batch.to(tl.int64) * pixels
        tl.store(evidence + at_px, s_top, mask=own)
        tl.store(evidence + plane_size + at_px, shift, mask=own)
        tl.store(evidence + 2 * plane_size + at_px, joint_sum, mask=own)

    if (grad_seg is not None) or (grad_cm is not None) or (posterior is not None):
        if ONE_TILE:
            write_columns(
                grad_seg, grad_cm, posterior, e, inv_z, h, ajj, s, joint, j, px, y, s_sum, shift, joint_sum,
                inside, labelled, w, wt, pixels_again, image, C, CP, BJ, BLOCK, IDENTITY, SHARED, WIDE,
            )  # fmt: skip
        else:
            for j0 in range(0, C, BJ):
                # The same arithmetic on the same values as above, so that joint - joint_top cancels exactly.
                at = plane_of(j0 + j, pixels, WIDE) + px
                s = tl.load(seg + at, mask=(j0 + j < C) & use, other=0.0).to(R) - s_tops
                e, inv_z, h, ajj, joint = columns_of_pixels(
                    seg, cm, j0 + j, px, y, transition, labelled, s, depth, height, width, grid_d, grid_h, grid_w,
                    C, CP, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                )  # fmt: skip
                write_columns(
                    grad_seg, grad_cm, posterior, e, inv_z, h, ajj, s, joint, j0 + j, px, y, s_sum, shift, joint_sum,
                    inside, labelled, w, wt, pixels_again, image, C, CP, BJ, BLOCK, IDENTITY, SHARED, WIDE,
                )  # fmt: skip
    return weighted_nll, weighted_trace


PIXEL_SIZES = ["ignore_index", "batch", "cm_stride", "grad_cm_stride", "depth", "height", "width", "grid_d",
               "grid_h", "grid_w", "pixels_again"]  # fmt: skip


# No size is specialised on: a width known to divide by 16 would give a lane four neighbouring pixels, and four times the
# registers, at BLOCK = 32.
@triton.jit(do_not_specialize=PIXEL_SIZES)
def pixel_kernel(
    seg, cm, labels, transition, class_weight, pixel_weight, scale,
    partials, loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
    loss_scale, loss_scale_low, trace_weight, trace_weight_low, ignore_index,
    batch, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w, pixels_again,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    SHARED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one image, or of all images one after the other where they share the field's gradient (SHARED).

    The pairs of a tile are BJ columns of BLOCK pixels: a pixel is a lane and a column a warp. Only the sums over j go
    from warp to warp. Up to 32 classes BJ holds every column and the logits are read once. Beyond, columns come BJ at a
    time and twice: first for the evidence, then for the gradient. The second reading is meant to hit L2: a block is 32
    pixels, the fewest that fill a warp, and 32 C^2 logits (139 KB at C = 33 in float32).
    """
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0)
    first = program % blocks * BLOCK
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
                batch, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w, pixels_again,
                C, CP, BJ, BLOCK, MODE_D, MODE_H, MODE_W, CORNERS, SHARED, WIDE, R,
            )  # fmt: skip
            nll_sum += nll.to(tl.float64)
            trace_sum += trace.to(tl.float64)
    else:
        # Not a loop of one round: the compiler would keep every address, which the rounds share, in registers.
        nll, trace = one_image(
            seg, cm, labels, transition, class_weight, pixel_weight,
            loss_map, nll_map, trace_map, evidence, grad_seg, grad_cm, posterior,
            factor, trace_factor, ignore_index, (program // blocks).to(tl.int64), 0, first,
            batch, cm_stride, grad_cm_stride, depth, height, width, grid_d, grid_h, grid_w, pixels_again,
            C, CP, BJ, BLOCK, MODE_D, MODE_H, MODE_W, CORNERS, SHARED, WIDE, R,
        )  # fmt: skip
        nll_sum = nll.to(tl.float64)  # over pixels of very different weight
        trace_sum = trace.to(tl.float64)
    if partials is not None:
        tl.store(partials + 2 * program.to(tl.int64), tl.sum(nll_sum, 0))
        tl.store(partials + 2 * program.to(tl.int64) + 1, tl.sum(trace_sum, 0))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    partials, scale, loss, nll, trace, loss_scale, loss_scale_low, trace_weight, trace_weight_low, count,
    BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The partial sums in fixed order and float64, then the three scalars. One program; 65536 partials: 16 rounds."""
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
    tl.store(loss, tl.where(factor == 0, 0.0, factor * total_loss).to(R))
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
            tl.store(values + at, (value.to(by.dtype) * by).to(value.dtype), mask=at < count)


# --- gradient of a field on its own grid --------------------------------------------------------------------------------


@triton.jit
def first_pixel(point, grid, size):
    """Of the cell that begins at a grid point: the first pixel at or beyond it. Cell 0 has all before point 1, too."""
    doubled = (2 * point + 1).to(tl.int64) * size - grid  # source >= point, times 2 grid
    first = (doubled + 2 * grid - 1) // (2 * grid)
    first = tl.where(point == 0, 0, first)
    return tl.where(point >= grid, size, first).to(tl.int32)


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


@triton.jit
def share_of(position, point, bit, grid, size, MODE: tl.constexpr, R: tl.constexpr):
    """Weight of each corner (K, 1) at each pixel (1, P) along an axis; a last cell has no second point."""
    share = (position * 0).to(R) + 1.0
    if MODE == LINEAR:
        weight = tl.minimum(tl.maximum(source_of(position, grid, size, R) - point.to(R), 0.0), 1.0)
        weight = tl.where(point + 1 < grid, weight, 0.0)
        share = tl.where(bit == 1, weight, 1.0 - weight)
    return share


@triton.jit(do_not_specialize=[
    "ignore_index", "batch", "images", "cm_stride", "depth", "height", "width", "grid_d", "grid_h", "grid_w",
    "first_d", "first_h", "first_w", "cells_d", "cells_h", "cells_w", "fields", "copies", "entry_stride", "node_stride",
    "field_stride", "copy_stride",
])  # fmt: skip
def cell_kernel(
    seg, cm, labels, transition, class_weight, pixel_weight, scale, evidence, grad,
    loss_scale, loss_scale_low, trace_weight, trace_weight_low, ignore_index,
    batch, images, cm_stride, depth, height, width, grid_d, grid_h, grid_w,
    first_d, first_h, first_w, cells_d, cells_h, cells_w, fields, copies,
    entry_stride, node_stride, field_stride, copy_stride,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, P: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
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
        y, labelled, weight = label_and_weight(labels, class_weight, pixel_weight, at_px, inside, ignore_index, C, R)
        w = tl.where(labelled, weight * factor, 0.0)
        joint_sum = tl.load(evidence + 2 * plane_size + at_px, mask=labelled, other=0.0)
        live = labelled & (w != 0) & (joint_sum != 0)
        if tl.max(live.to(tl.int32), 0) > 0:  # drawings are coarse: whole cells have no label
            s_top = tl.load(evidence + at_px, mask=live, other=0.0)
            joint_top = tl.load(evidence + plane_size + at_px, mask=live, other=0.0)
            s = tl.load(seg + (b * C + j) * pixels + px, mask=live & (j < C), other=0.0).to(R)
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
    "ignore_index", "batch", "cm_stride", "depth", "height", "width", "grid_d", "grid_h", "grid_w", "programs",
])  # fmt: skip
def transition_kernel(
    seg, cm, labels, class_weight, pixel_weight, scale, evidence, partials,
    loss_scale, loss_scale_low, ignore_index,
    batch, cm_stride, depth, height, width, grid_d, grid_h, grid_w, programs,
    C: tl.constexpr, CP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
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
            labels, class_weight, pixel_weight, at, px < pixels, ignore_index, C, R
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
                s = tl.load(seg + (b * C + j) * pixels + px, mask=live & (j < C), other=0.0).to(R)
                # p A / D in one exponential: each factor alone may leave the range
                u = ((s - s_top) - log_d)[None, :] + (a - top[None, :])
                reported = tl.where((live & (j < C))[None, :], tl.exp(u) * (w / z)[None, :], 0.0)
                total -= tl.sum(reported.to(tl.float64), 1)
    at_i = tl.arange(0, CP)
    tl.store(partials + program.to(tl.int64) * C + at_i, total, mask=at_i < C)
