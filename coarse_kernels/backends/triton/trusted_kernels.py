"""Kernels of trusted drawings, A = I, and of label maps: class logits on their own grid, interpolated where they are read.

Equations: csrc/cpu/trusted.h; schedule and traffic: the package's docstring. Tiles are (CB, N): classes, and pixels as lanes;
the classes of a pixel lie in one thread's registers, as in `kernels`. Kinds of drawings come in tuples, an element for each,
None where a part is absent: one kernel serves all kinds and layers, and forms p once.

Between the kernels a pixel leaves ``evidence``, the largest logit and sum exp(s - largest), and for each layer of a kind with
a transition ``mixed``, the largest logit that T allows and sum T exp(s - largest): pairs rather than their logarithms, because
exp(s - log_sum) loses two digits at a logit scale of 100. Logits that no label needs are not read: they count as 0.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    add_exp,
    finite,
    gradient_factor,
    label_and_weight,
    load_scores,
    number,
    pixels_of_cell,
    plane_of,
    scaled_exp,
    share_of,
)


@triton.jit
def layers_of(doubled, kind: tl.constexpr):
    """How many layers a kind has. It comes doubled: 1 would be a constant (in a tuple `do_not_specialize` is not heard), and
    Triton 3.6 fails to compile what becomes of a loop over one layer (T, uint8 labels, classes in several tiles).
    """
    return doubled[kind] // 2


@triton.jit
def drawn_on(
    labels, layers, b, px, inside, pixels, ignore_index, KINDS: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):
    """Where some layer of some kind has a label."""
    drawn = inside & (px < 0)
    for kind in tl.static_range(KINDS):
        for layer in range(layers_of(layers, kind)):
            at = (b * layers_of(layers, kind) + layer) * pixels + px
            _, labelled, _ = label_and_weight(labels[kind], None, None, at, inside, ignore_index, C, R)
            drawn = drawn | labelled
    return drawn


@triton.jit
def load_reported(transition, j, y, labelled, C: tl.constexpr):
    """T[j, y] of every pixel; 0 beyond C and where there is no label."""
    at = tl.max_contiguous(j * C + y[None, :], [1, 2])
    return tl.load(transition + at, mask=(j < C) & labelled[None, :], other=0.0)


@triton.jit
def mixed_terms(t, s, shift):
    """T exp(s - shift). T is a factor: beside a logit of 1e4 its logarithm is lost. Where it is 0, s may be anything."""
    return tl.where(t != 0, t * tl.exp(s - shift[None, :]), 0.0)


# --- every pixel: sums, maps, evidence, and the gradient of logits on the pixel grid ------------------------------------

SIZES = ["ignore_index", "batch", "depth", "height", "width", "grid_d", "grid_h", "grid_w"]


@triton.jit(do_not_specialize=SIZES)
def trusted_kernel(
    seg, labels, transition, class_weight, pixel_weight, scale, weight, weight_low, layers,
    partials, nll_map, evidence, mixed, grad, ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
    KINDS: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one image. Up to CB classes the logits are read once, and their gradient written from registers."""
    ONE_TILE: tl.constexpr = CB >= C
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    px = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = px < pixels
    seg += b * C * (grid_d * grid_h * grid_w)
    rows = tl.arange(0, CB)[:, None]
    drawn = drawn_on(labels, layers, b, px, inside, pixels, ignore_index, KINDS, C, R)

    if ONE_TILE:
        s = load_scores(
            seg, rows, px, drawn, depth, height, width, grid_d, grid_h, grid_w,
            C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
        )  # fmt: skip
        s = tl.where(rows < C, s, float("-inf"))
        top = tl.max(s, 0)
        e = tl.where(rows < C, tl.exp(s - top[None, :]), 0.0)
        s_sum = tl.sum(e, 0)
    else:
        top = tl.full((BLOCK,), float("-inf"), R)
        s_sum = tl.zeros((BLOCK,), R)
        for j0 in range(0, C, CB):
            s = load_scores(
                seg, j0 + rows, px, drawn, depth, height, width, grid_d, grid_h, grid_w,
                C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
            )  # fmt: skip
            s = tl.where(j0 + rows < C, s, float("-inf"))
            top, s_sum = add_exp(top, s_sum, s)
        s_sum = tl.where(top == float("-inf"), float("nan"), s_sum)  # what softmax makes of it

    if grad is not None:
        mass = tl.zeros((BLOCK,), R)
        own = tl.zeros((CB, BLOCK), R)
    flagged = inside & (px < 0)
    for kind in tl.static_range(KINDS):
        factor = gradient_factor(scale[kind], weight[kind], weight_low[kind], R)
        total = tl.zeros((BLOCK,), tl.float64)  # over pixels of very different weight
        for layer in range(layers_of(layers, kind)):
            at = (b * layers_of(layers, kind) + layer) * pixels + px
            y, labelled, w = label_and_weight(
                labels[kind], class_weight[kind], pixel_weight[kind], at, inside, ignore_index, C, R
            )  # fmt: skip
            if transition[kind] is None:
                if ONE_TILE:
                    at_label = tl.sum(tl.where(rows == y[None, :], s, 0.0), 0)
                else:
                    at_label = tl.sum(load_scores(
                        seg, y[None, :], px, labelled, depth, height, width, grid_d, grid_h, grid_w,
                        C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                    ), 0)  # fmt: skip
                nll = tl.log(s_sum) - (at_label - top)
                impossible = labelled & (nll == float("inf"))
                flagged = flagged | impossible
            else:
                if ONE_TILE:
                    t = load_reported(transition[kind], rows, y, labelled, C)
                    shift = finite(tl.max(tl.where(t != 0, s, float("-inf")), 0))
                    h = mixed_terms(t, s, shift)
                    d_sum = tl.sum(h, 0)
                else:
                    label_top = tl.full((BLOCK,), float("-inf"), R)
                    d_sum = tl.zeros((BLOCK,), R)
                    for j0 in range(0, C, CB):
                        s = load_scores(
                            seg, j0 + rows, px, labelled, depth, height, width, grid_d, grid_h, grid_w,
                            C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                        )  # fmt: skip
                        t = load_reported(transition[kind], j0 + rows, y, labelled, C)
                        above = tl.maximum(label_top, tl.max(tl.where(t != 0, s, float("-inf")), 0))
                        h = mixed_terms(t, s, finite(above))
                        d_sum = d_sum * tl.exp(label_top - finite(above)) + tl.sum(h, 0)
                        label_top = above
                    shift = finite(label_top)
                # A label that no class can explain. NaN among the logits is no such thing: it has to be seen.
                impossible = (d_sum == 0) & (s_sum == s_sum)
                nll = tl.where(impossible, float("inf"), tl.log(s_sum) - ((shift - top) + tl.log(d_sum)))
                if mixed[kind] is not None:
                    plane_size = batch.to(tl.int64) * layers_of(layers, kind) * pixels
                    tl.store(mixed[kind] + at, shift, mask=inside)
                    tl.store(mixed[kind] + plane_size + at, d_sum, mask=inside)
            weighted = tl.where(labelled & (w != 0), w * nll, 0.0)  # 0 * inf is not 0
            total += weighted.to(tl.float64)
            if nll_map is not None:
                tl.store(nll_map[kind] + at, weighted, mask=inside)
            if grad is not None:
                live = tl.where(labelled & (impossible == 0), w * factor, 0.0)
                mass += live
                if transition[kind] is None:
                    own += tl.where(rows == y[None, :], live[None, :], 0.0)
                else:
                    own += tl.where((live != 0)[None, :], (live / d_sum)[None, :] * h, 0.0)
        if partials is not None:
            tl.store(partials + program.to(tl.int64) * KINDS + kind, tl.sum(total, 0))

    if evidence is not None:
        plane_size = batch.to(tl.int64) * pixels
        tl.store(evidence + b * pixels + px, top, mask=inside)
        # The sign says that some label has nll = inf without a transition: `class_gradient` then looks which.
        tl.store(evidence + plane_size + b * pixels + px, tl.where(flagged, -s_sum, s_sum), mask=inside)
    if grad is not None:
        gradient = tl.where((mass != 0)[None, :], (mass / s_sum)[None, :] * e, 0.0) - own
        at_grad = grad + b * C * pixels + (plane_of(rows, pixels, WIDE) + px[None, :])
        tl.store(at_grad, gradient.to(grad.dtype.element_ty), mask=(rows < C) & inside[None, :])


@triton.jit(do_not_specialize=["count"])
def trusted_finish_kernel(
    partials, scale, weight, weight_low, weighted, nll, count, KINDS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr
):
    """The partial sums of each kind in fixed order and float64, then the scalars. One program."""
    for kind in tl.static_range(KINDS):
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            sums += tl.load(partials + at.to(tl.int64) * KINDS + kind, mask=at < count, other=0.0)
        total = tl.sum(sums, 0)
        plain = tl.full((), 1.0, tl.float64)
        if scale[kind] is not None:
            plain = tl.load(scale[kind]).to(tl.float64)
        factor = plain * number(weight[kind], weight_low[kind], tl.float64)
        # a weight of 0 counts for nothing, even if the sum is inf
        tl.store(weighted + kind, tl.where(factor == 0, 0.0, factor * total))
        tl.store(nll[kind], tl.where(plain == 0, 0.0, plain * total).to(R))


# --- gradient of the class logits, from the evidence --------------------------------------------------------------------


@triton.jit
def class_gradient(
    seg, s, j, b, px, drawn, labels, transition, class_weight, pixel_weight, scale, weight, weight_low, layers,
    evidence, mixed, ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
    KINDS: tl.constexpr, C: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    CORNERS: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sum over kinds and layers of w (p[j] - r[j]) at pixels px, for a tile s of logits; 0 where nothing counts."""
    pixels = depth * height * width
    at_px = b * pixels + px
    top = tl.load(evidence + at_px, mask=drawn, other=0.0)
    s_sum = tl.load(evidence + batch.to(tl.int64) * pixels + at_px, mask=drawn, other=1.0)
    flagged = s_sum < 0
    some_flagged = tl.max(flagged.to(tl.int32), 0) > 0
    s_sum = tl.abs(s_sum)
    mass = tl.zeros_like(s_sum)
    own = tl.zeros_like(s)
    for kind in tl.static_range(KINDS):
        factor = gradient_factor(scale[kind], weight[kind], weight_low[kind], R)
        for layer in range(layers_of(layers, kind)):
            at = (b * layers_of(layers, kind) + layer) * pixels + px
            y, labelled, w = label_and_weight(
                labels[kind], class_weight[kind], pixel_weight[kind], at, drawn, ignore_index, C, R
            )  # fmt: skip
            live = tl.where(labelled, w * factor, 0.0)
            if transition[kind] is None:
                if some_flagged:
                    at_label = tl.sum(load_scores(
                        seg, y[None, :], px, labelled & flagged, depth, height, width, grid_d, grid_h, grid_w,
                        C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                    ), 0)  # fmt: skip
                    live = tl.where(at_label == float("-inf"), 0.0, live)
                own += tl.where(j == y[None, :], live[None, :], 0.0)
            else:
                plane_size = batch.to(tl.int64) * layers_of(layers, kind) * pixels
                shift = tl.load(mixed[kind] + at, mask=labelled, other=0.0)
                d_sum = tl.load(mixed[kind] + plane_size + at, mask=labelled, other=1.0)
                live = tl.where((d_sum == 0) & (s_sum == s_sum), 0.0, live)
                h = mixed_terms(load_reported(transition[kind], j, y, labelled, C), s, shift)
                own += tl.where((live != 0)[None, :], (live / d_sum)[None, :] * h, 0.0)
            mass += live
    return tl.where((mass != 0)[None, :], (mass / s_sum)[None, :] * tl.exp(s - top[None, :]), 0.0) - own


@triton.jit(do_not_specialize=SIZES)
def trusted_pixel_kernel(
    seg, labels, transition, class_weight, pixel_weight, scale, weight, weight_low, layers, evidence, mixed, grad,
    ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
    KINDS: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Gradient of logits on the pixel grid that are too many for one tile: CB classes of BLOCK pixels."""
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    chunks: tl.constexpr = (C + CB - 1) // CB
    program = tl.program_id(0)
    j = program % chunks * CB + tl.arange(0, CB)[:, None]
    program = program // chunks
    b = (program // blocks).to(tl.int64)
    px = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = px < pixels
    seg += b * C * pixels
    drawn = drawn_on(labels, layers, b, px, inside, pixels, ignore_index, KINDS, C, R)
    s = load_scores(
        seg, j, px, drawn, depth, height, width, grid_d, grid_h, grid_w,
        C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
    )  # fmt: skip
    gradient = class_gradient(
        seg, s, j, b, px, drawn, labels, transition, class_weight, pixel_weight, scale, weight, weight_low, layers,
        evidence, mixed, ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
        KINDS, C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
    )  # fmt: skip
    at = grad + b * C * pixels + (plane_of(j, pixels, WIDE) + px[None, :])
    tl.store(at, gradient.to(grad.dtype.element_ty), mask=(j < C) & inside[None, :])


@triton.jit(do_not_specialize=[*SIZES, "copies", "copy_stride"])
def trusted_grid_kernel(
    seg, labels, transition, class_weight, pixel_weight, scale, weight, weight_low, layers, evidence, mixed, grad,
    ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w, copies, copy_stride,
    KINDS: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, POINTS: tl.constexpr, PIX: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Gradient of logits on a grid of their own: CB classes of POINTS grid points, gathered from the cells around them.

    A grid point has PIX lanes, which go through the pixels of one cell after the other, the corners' logits in their registers.
    Each point is written once (by each of ``copies`` shares of the cells' pixels), so that nothing is added in memory; each
    pixel's p is formed once for each of its corners.
    """
    pixels = depth * height * width
    points = grid_d * grid_h * grid_w
    blocks = tl.cdiv(points, POINTS)
    chunks: tl.constexpr = (C + CB - 1) // CB
    program = tl.program_id(0)
    first = program % blocks * POINTS
    program = program // blocks
    rows = tl.arange(0, CB)
    if chunks > 1:  # else the rows beyond C are known when the kernel is compiled
        rows += program % chunks * CB
        program = program // chunks
    b = (program % batch).to(tl.int64)
    copy = program // batch
    seg += b * C * points

    lane = tl.arange(0, POINTS * PIX)
    point = first + lane // PIX
    exists = point < points
    point = tl.where(exists, point, 0)
    w_point = point % grid_w
    h_point = point // grid_w % grid_h
    d_point = point // (grid_w * grid_h)
    corner = tl.arange(0, CORNERS)[:, None]
    w_bit = corner % 2 * (MODE_W // 2)
    h_bit = corner // (1 + MODE_W // 2) % 2 * (MODE_H // 2)
    d_bit = corner // ((1 + MODE_W // 2) * (1 + MODE_H // 2)) % 2 * (MODE_D // 2)
    plane = plane_of(rows, points, WIDE)[:, None, None]
    j = rows[:, None]
    total = tl.zeros((CB, POINTS * PIX), R)
    for cell in range(CORNERS):  # the point is corner number ``cell`` of it
        w_own = cell % 2 * (MODE_W // 2)
        h_own = cell // (1 + MODE_W // 2) % 2 * (MODE_H // 2)
        d_own = cell // ((1 + MODE_W // 2) * (1 + MODE_H // 2)) % 2 * (MODE_D // 2)
        w_cell = w_point - w_own
        h_cell = h_point - h_own
        d_cell = d_point - d_own
        w_begin, w_length = pixels_of_cell(w_cell, grid_w, width, MODE_W, WIDE)
        h_begin, h_length = pixels_of_cell(h_cell, grid_h, height, MODE_H, WIDE)
        d_begin, d_length = pixels_of_cell(d_cell, grid_d, depth, MODE_D, WIDE)
        box = tl.where(exists, d_length * h_length * w_length, 0)
        w_length = tl.maximum(w_length, 1)  # divisors
        h_length = tl.maximum(h_length, 1)
        w_node = w_cell[None, :] + w_bit
        h_node = h_cell[None, :] + h_bit
        d_node = d_cell[None, :] + d_bit
        node = (d_node * grid_h + h_node) * grid_w + w_node
        given = (w_node < grid_w) & (h_node < grid_h) & (d_node < grid_d) & (box > 0)[None, :]
        at = tl.max_contiguous(plane + node[None, :, :], [1, 1, 2])
        corners = tl.load(seg + at, mask=(rows < C)[:, None, None] & given[None, :, :], other=0.0).to(R)
        steps = tl.cdiv(tl.max(box, 0), PIX)
        share = tl.cdiv(steps, copies)
        for step in range(copy * share, tl.minimum(copy * share + share, steps)):
            index = step * PIX + lane % PIX
            inside = (index >= 0) & (index < box)  # below 0: beyond 2^31
            w_px = w_begin + index % w_length
            h_px = h_begin + index // w_length % h_length
            d_px = d_begin + index // (w_length * h_length)
            px = (d_px * height + h_px) * width + w_px
            drawn = drawn_on(labels, layers, b, px, inside, pixels, ignore_index, KINDS, C, R)
            if tl.max(drawn.to(tl.int32), 0) > 0:  # drawings are coarse: whole cells have no label
                shares = (
                    share_of(d_px[None, :], d_cell[None, :], d_bit, grid_d, depth, MODE_D, R)
                    * share_of(h_px[None, :], h_cell[None, :], h_bit, grid_h, height, MODE_H, R)
                    * share_of(w_px[None, :], w_cell[None, :], w_bit, grid_w, width, MODE_W, R)
                )
                own_share = (
                    share_of(d_px, d_cell, d_own, grid_d, depth, MODE_D, R)
                    * share_of(h_px, h_cell, h_own, grid_h, height, MODE_H, R)
                    * share_of(w_px, w_cell, w_own, grid_w, width, MODE_W, R)
                )
                s = tl.sum(corners * shares[None, :, :], 1)
                gradient = class_gradient(
                    seg, s, j, b, px, drawn, labels, transition, class_weight, pixel_weight,
                    scale, weight, weight_low, layers, evidence, mixed,
                    ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
                    KINDS, C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
                )  # fmt: skip
                total += tl.where((j < C) & drawn[None, :], gradient * own_share[None, :], 0.0)

    summed = tl.sum(tl.reshape(total, (CB, POINTS, PIX)), 2)
    out = first + tl.arange(0, POINTS)[None, :]
    at = grad + copy.to(tl.int64) * copy_stride + b * C * points + (plane_of(j, points, WIDE) + out)
    tl.store(at, summed.to(grad.dtype.element_ty), mask=(j < C) & (out < points))


# --- gradient of a transition -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "layers", "shares"])
def trusted_transition_kernel(
    seg, labels, class_weight, pixel_weight, scale, mixed, partials, weight, weight_low,
    ignore_index, batch, layers, depth, height, width, grid_d, grid_h, grid_w, shares,
    C: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """partials[share, y, i] = -sum over a share of the blocks' pixels labelled y of w p[i] / D, of one kind.

    A program has one label and looks at the logits of no block without it: drawings are coherent, a block has few.
    """
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    chunks: tl.constexpr = (C + CB - 1) // CB
    program = tl.program_id(0)
    rows = tl.arange(0, CB)
    if chunks > 1:
        rows += program % chunks * CB
        program = program // chunks
    wanted = program % C
    j = rows[:, None]
    factor = gradient_factor(scale, weight, weight_low, R)
    plane_size = batch.to(tl.int64) * layers * pixels
    total = tl.zeros((CB,), tl.float64)
    for block in range(program // C, blocks * batch * layers, shares):
        px = block % blocks * BLOCK + tl.arange(0, BLOCK)
        layer = (block // blocks).to(tl.int64)
        at = layer * pixels + px
        y, labelled, w = label_and_weight(
            labels, class_weight, pixel_weight, at, px < pixels, ignore_index, C, R
        )  # fmt: skip
        w = tl.where(labelled, w * factor, 0.0)
        mine = labelled & (y == wanted) & (w != 0)
        if tl.max(mine.to(tl.int32), 0) > 0:
            shift = tl.load(mixed + at, mask=mine, other=0.0)
            d_sum = tl.load(mixed + plane_size + at, mask=mine, other=0.0)
            live = mine & (d_sum != 0)
            s = load_scores(
                seg + layer // layers * C * (grid_d * grid_h * grid_w), j, px, live,
                depth, height, width, grid_d, grid_h, grid_w, C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
            )  # fmt: skip
            # p / D without p: the denominator of the softmax cancels
            terms = scaled_exp((w / tl.where(live, d_sum, 1.0))[None, :], s - shift[None, :])
            total -= tl.sum(tl.where((j < C) & live[None, :], terms, 0.0).to(tl.float64), 1)
    at_entry = ((program // C).to(tl.int64) * C + wanted) * C + rows
    tl.store(partials + at_entry, total, mask=rows < C)


# --- the posterior, of any kinds ----------------------------------------------------------------------------------------


@triton.jit
def joint_of(
    s, log_q, labels, transition, layers, j, b, px, inside, ignore_index, pixels,
    KINDS: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """log(p[j] prod q[j]) up to a constant of the pixel, for a tile s of its logits."""
    if log_q is not None:  # of the kinds with a matrix
        s += tl.load(log_q + (plane_of(j, pixels, WIDE) + px[None, :]), mask=(j < C) & inside[None, :], other=0.0)
    for kind in tl.static_range(KINDS):
        for layer in range(layers_of(layers, kind)):
            at = (b * layers_of(layers, kind) + layer) * pixels + px
            y, labelled, _ = label_and_weight(labels[kind], None, None, at, inside, ignore_index, C, R)
            if transition[kind] is None:
                own = tl.where(j == y[None, :], 0.0, float("-inf"))
            else:
                t = load_reported(transition[kind], j, y, labelled, C)
                own = tl.where(t == 0, float("-inf"), tl.log(tl.where(t == 0, 1.0, t)))
            s += tl.where(labelled[None, :], own, 0.0)
    return tl.where(j < C, s, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def posterior_kernel(
    seg, labels, transition, layers, log_q, out, ignore_index, batch, depth, height, width, grid_d, grid_h, grid_w,
    KINDS: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """p[j] prod q[j], normalised; p where no class explains all labels. ``labels``, ``transition``: of the trusted kinds.

    ``log_q`` may be ``out``: a thread reads its elements before it writes them.
    """
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    px = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = px < pixels
    seg += b * C * (grid_d * grid_h * grid_w)
    out += b * C * pixels
    if log_q is not None:
        log_q += b * C * pixels
    rows = tl.arange(0, CB)[:, None]
    top = tl.full((BLOCK,), float("-inf"), R)
    s_sum = tl.zeros((BLOCK,), R)
    joint_top = tl.full((BLOCK,), float("-inf"), R)
    joint_sum = tl.zeros((BLOCK,), R)
    for j0 in range(0, C, CB):
        j = j0 + rows
        s = load_scores(
            seg, j, px, inside, depth, height, width, grid_d, grid_h, grid_w,
            C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
        )  # fmt: skip
        s = tl.where(j < C, s, float("-inf"))
        top, s_sum = add_exp(top, s_sum, s)
        joint = joint_of(
            s, log_q, labels, transition, layers, j, b, px, inside, ignore_index, pixels, KINDS, C, WIDE, R
        )  # fmt: skip
        joint_top, joint_sum = add_exp(joint_top, joint_sum, joint)
    for j0 in range(0, C, CB):
        j = j0 + rows
        s = load_scores(
            seg, j, px, inside, depth, height, width, grid_d, grid_h, grid_w,
            C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
        )  # fmt: skip
        joint = joint_of(
            s, log_q, labels, transition, layers, j, b, px, inside, ignore_index, pixels, KINDS, C, WIDE, R
        )  # fmt: skip
        p = tl.exp(s - top[None, :]) / s_sum[None, :]  # NaN where all logits are -inf, as softmax has it
        r = tl.exp(joint - finite(joint_top)[None, :]) / joint_sum[None, :]
        value = tl.where((joint_sum != 0)[None, :], r, p).to(out.dtype.element_ty)
        tl.store(out + (plane_of(j, pixels, WIDE) + px[None, :]), value, mask=(j < C) & inside[None, :])


# --- the most probable class --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["depth", "height", "width", "grid_d", "grid_h", "grid_w"])
def label_map_kernel(
    seg, out, depth, height, width, grid_d, grid_h, grid_w,
    C: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, CORNERS: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """argmax over the classes of BLOCK pixels: the first of equals, and NaN before all, as torch.argmax has it."""
    pixels = depth * height * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    px = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = px < pixels
    seg += b * C * (grid_d * grid_h * grid_w)
    rows = tl.arange(0, CB)[:, None]
    best = tl.full((BLOCK,), float("-inf"), R)
    label = tl.zeros((BLOCK,), tl.int32)
    settled = inside & (px < 0)  # by a NaN
    for j0 in range(0, C, CB):
        j = j0 + rows
        s = load_scores(
            seg, j, px, inside, depth, height, width, grid_d, grid_h, grid_w,
            C, MODE_D, MODE_H, MODE_W, CORNERS, WIDE, R,
        )  # fmt: skip
        nan = s != s
        top = tl.max(tl.where(nan | (j >= C), float("-inf"), s), 0)
        first_top = tl.min(tl.where((j < C) & (s == top[None, :]), j, C), 0)
        first_nan = tl.min(tl.where(nan, j, C), 0)
        better = top > best
        label = tl.where(settled, label, tl.where(first_nan < C, first_nan, tl.where(better, first_top, label)))
        best = tl.where(better, top, best)
        settled = settled | (first_nan < C)
    tl.store(out + b * pixels + px, label.to(out.dtype.element_ty), mask=inside)
