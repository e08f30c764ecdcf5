"""The objective and its gradients in float64, in closed form and in NumPy: a second derivation beside the reference backend,
which autograd differentiates, and twenty times as fast on images of a few pixels. Each is held to the other.

Per pixel, p, A, q, T as in `coarse_kernels.functional`; D = sum_j p[j] q[j], r[j] = p[j] q[j] / D:

    d nll / d s[j] = p[j] - r[j]                            d nll / d a[i, j] = r[j] A[i, j] - p[j] T[i, y] A[i, j] / D
    d nll / d T[i, y] = -sum_j A[i, j] p[j] / D             d tr A / d a[i, j] = A[j, j] ([i = j] - A[i, j])
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tensors import Tensors, numbers

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Truth:
    """sizes: of each gradient the 2-norm of the weights of the pixels that it is a sum over, each of which adds differences of
    probabilities; of a transition's, whose pixels add quotients, what it would be if none of them cancelled another; of each
    loss the sum of these weights, each of which adds differences of logits. shares: what `sizes` has of a transition, entry by
    entry, and the sum of the pixels' weights. ruled_out: where a transition is 0. counts: labelled weight of each kind."""

    losses: dict[str, Array]
    gradients: dict[str, Array]
    sizes: dict[str, float]
    shares: dict[str, tuple[Array, float]]
    ruled_out: dict[str, Array]
    counts: list[float]
    posterior: Array


def solve(tensors: Tensors, incoming: float | Array) -> Truth:
    """``incoming``: what the loss is multiplied with before backward, a number, or a map (B, *S) with reduction none."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return _solve(tensors, incoming)


def _solve(tensors: Tensors, incoming: float | Array) -> Truth:
    size = tensors.kinds[0].labels.shape[2:]
    pixels = math.prod(size)
    seg_own = numbers(tensors.seg)
    batch, classes = seg_own.shape[:2]
    per_pixel = tensors.reduction == "none"
    labels = [numbers(kind.labels, np.int64).reshape(batch, -1, pixels) for kind in tensors.kinds]
    valid = [own != tensors.ignore_index for own in labels]
    drawn = np.zeros((batch, pixels), bool)
    for own in valid:
        drawn |= own.any(1)
    seg = interpolate(seg_own, size).reshape(batch, classes, pixels)
    seg = np.where(np.isnan(seg) & ~drawn[:, None], 0.0, seg)  # NaN where nobody drew reaches nothing
    log_p = _log_softmax(seg)
    p = np.exp(log_p)
    grad_p = np.zeros_like(p)
    joint, total = log_p.copy(), 0.0 if not per_pixel else np.zeros((batch, pixels))
    losses: dict[str, Array] = {}
    gradients: dict[str, Array] = {}
    sizes: dict[str, float] = {"seg": 0.0}
    shares: dict[str, tuple[Array, float]] = {}
    ruled_out: dict[str, Array] = {}
    counts = []
    for number, kind in enumerate(tensors.kinds):
        cm_own = None if kind.cm is None else numbers(kind.cm)
        log_a = None
        if cm_own is not None:
            cm = interpolate(cm_own.reshape(cm_own.shape[0], classes * classes, *cm_own.shape[3:]), size)
            log_a = cm.reshape(-1, classes, classes, pixels)
            if np.isnan(log_a).any():
                log_a = np.where(np.isnan(log_a) & ~valid[number].any(1)[:, None, None], 0.0, log_a)
            log_a = _log_softmax(log_a)
        transition = None if kind.transition is None else numbers(kind.transition)
        weight = _weights(tensors, number, labels[number], valid[number])
        counts.append(float(weight.sum()))
        scale = 1.0
        if tensors.reduction == "mean":
            by = counts[-1] if kind.normalizer is None else float(kind.normalizer)
            scale = 1.0 / by if by else 0.0
        factor = kind.weight * scale * weight * (incoming if not per_pixel else incoming.reshape(batch, 1, pixels))
        maps = np.zeros((3, *weight.shape))  # loss, nll, trace
        grad_a = None if log_a is None else np.zeros((batch, classes, classes, pixels))
        grad_t, shares_t = np.zeros((classes, classes)), np.zeros((classes, classes))
        for layer in range(weight.shape[1]):
            y = np.where(valid[number][:, layer], labels[number][:, layer], 0)
            nll, trace, log_q, parts = _pixels(log_p, p, log_a, transition, y)
            w, f = weight[:, layer], np.where(np.isfinite(nll) | np.isnan(nll), factor[:, layer], 0.0)
            for row, term in enumerate((nll + kind.trace_weight * trace, nll, trace)):
                maps[row, :, layer] = np.where(w != 0, w * np.where(w != 0, term, 0.0), 0.0)
            known = valid[number][:, layer, None]
            joint = joint + np.where(known, log_q, 0.0)
            r, over = parts
            grad_p += np.where(known, f[:, None] * (p - r), 0.0)
            if grad_a is not None:
                assert log_a is not None
                a = np.exp(log_a)
                # not T times the rest: what T leaves out may be beyond float64
                named = np.exp(np.log(_reported(transition, y, classes))[:, :, None] + log_a + over[:, None])
                diagonal = np.einsum("bjjp->bjp", a)[:, None] * (np.eye(classes)[None, :, :, None] - a)
                change = r[:, None] * a - named + kind.trace_weight * diagonal
                grad_a += np.where(known[:, None], f[:, None, None] * change, 0.0)
            if transition is not None:
                explained = np.exp(over) if log_a is None else np.exp(log_a + over[:, None]).sum(2)
                explained = np.where(known & (f[:, None] != 0), f[:, None] * explained, 0.0)
                for label in range(classes):
                    own = np.where((y == label)[:, None], explained, 0.0)
                    grad_t[:, label] -= own.sum((0, 2))
                    shares_t[:, label] += np.abs(own).sum((0, 2))
        if per_pixel:
            total = total + (kind.weight * maps[0].sum(1) if kind.weight else 0.0)
            own = [(name, maps[row].reshape(kind.labels.shape)) for row, name in enumerate(("loss", "nll", "trace"))]
            losses |= {f"{name}{number}": values for name, values in own}
            losses[f"count{number}"] = weight.reshape(kind.labels.shape)
        else:
            sums = [float(row.sum()) for row in maps]
            sums = [0.0 if scale == 0 else scale * one for one in sums]
            losses |= {
                f"{name}{number}": np.array(one) for name, one in zip(("loss", "nll", "trace"), sums, strict=True)
            }
            losses[f"count{number}"] = np.array(counts[-1])
            total += 0.0 if kind.weight == 0 else kind.weight * sums[0]
        norm = float(np.linalg.norm(factor))
        sizes["seg"] += norm
        sizes[f"loss{number}"] = scale * counts[-1] * max(1.0, kind.trace_weight)
        sizes["loss"] = sizes.get("loss", 0.0) + kind.weight * sizes[f"loss{number}"]
        sizes |= {f"{term}{number}": sizes[f"loss{number}"] for term in ("nll", "trace", "count")}
        if grad_a is not None:
            assert cm_own is not None
            flat = grad_a.reshape(batch, classes * classes, *size)
            if cm_own.shape[0] == 1:
                flat = flat.sum(0, keepdims=True)
            back = _gathered(flat, cm_own.shape[3:])
            gradients[f"cm{number}"] = back.reshape(cm_own.shape)
            sizes[f"cm{number}"] = norm * max(1.0, kind.trace_weight)
        if kind.learned:
            gradients[f"transition{number}"] = grad_t
            sizes[f"transition{number}"] = float(np.linalg.norm(shares_t))
            shares[f"transition{number}"] = shares_t, float(np.abs(factor).sum())
            assert transition is not None
            ruled_out[f"transition{number}"] = transition == 0
    losses["loss"] = np.asarray(total).reshape((batch, *size) if per_pixel else ())
    gradients["seg"] = _gathered(grad_p.reshape(batch, classes, *size), seg_own.shape[2:])
    top = joint.max(1, keepdims=True)
    possible = top > -math.inf
    posterior = np.exp(joint - np.where(possible, top, 0.0))
    posterior = np.where(possible, posterior / posterior.sum(1, keepdims=True), p)
    return Truth(losses, gradients, sizes, shares, ruled_out, counts, posterior.reshape(batch, classes, *size))


def _pixels(log_p: Array, p: Array, log_a: Array | None, transition: Array | None, y: Array) -> Any:
    """nll, trace (B, P), log q (B, C, P), and r and log(p / D), both (B, C, P)."""
    classes = log_p.shape[1]
    if log_a is None:
        log_q = np.log(_reported(transition, y, classes))
        trace = np.zeros(y.shape)
    else:
        if transition is None:
            log_q = np.take_along_axis(np.broadcast_to(log_a, (len(y), *log_a.shape[1:])), y[:, None, None], 1)[:, 0]
        else:
            terms = np.log(transition[:, y]).transpose(1, 0, 2)[:, :, None] + log_a
            log_q = _logsumexp(terms, 1)
        trace = np.broadcast_to(np.exp(np.einsum("bjjp->bjp", log_a)).sum(1), y.shape)
    joint = log_p + log_q
    log_d = _logsumexp(joint, 1)[:, None]
    possible = log_d > -math.inf
    safe = np.where(possible, log_d, 0.0)
    r = np.where(possible, np.exp(joint - safe), p)
    return -log_d[:, 0], trace, log_q, (r, log_p - safe)


def _reported(transition: Array | None, y: Array, classes: int) -> Array:
    """T[i, y], (B, C, P)."""
    if transition is None:
        return (y[:, None] == np.arange(classes)[None, :, None]).astype(np.float64)
    return transition[:, y].transpose(1, 0, 2)


def _weights(tensors: Tensors, number: int, labels: Array, valid: Array) -> Array:
    kind = tensors.kinds[number]
    weight = valid.astype(np.float64)
    if kind.class_weight is not None:
        weight = np.where(valid, numbers(kind.class_weight)[np.where(valid, labels, 0)], 0.0)
    if kind.pixel_weight is not None:
        weight = np.where(valid, weight * numbers(kind.pixel_weight).reshape(weight.shape), 0.0)
    return weight


def _logsumexp(x: Array, axis: int) -> Array:
    top = x.max(axis, keepdims=True)
    top = np.where(top == -math.inf, 0.0, top)
    return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# --- grids ---------------------------------------------------------------------------------------------------------------


_KEPT = 20_000  # entries: those of long signals are 70 MB each


def _taps(points: int, pixels: int) -> Array:
    """(pixels, points) of `F.interpolate(align_corners=False)` along one axis."""
    return _small_taps(points, pixels) if points * pixels <= _KEPT else _all_taps(points, pixels)


def _all_taps(points: int, pixels: int) -> Array:
    matrix = np.zeros((pixels, points))
    for k in range(pixels):
        # the position as a quotient of integers: of a coordinate of 2,000 a double keeps 12 digits behind the point
        first, rest = divmod(max((2 * k + 1) * points - pixels, 0), 2 * pixels)
        share = rest / (2 * pixels)
        matrix[k, first] += 1 - share
        matrix[k, min(first + 1, points - 1)] += share
    return matrix


_small_taps = functools.lru_cache(512)(_all_taps)  # 80 MB at most


def interpolate(x: Array, size: tuple[int, ...]) -> Array:
    """(N, K, *G) -> (N, K, *S)."""
    grid = x.shape[2:]
    if all(points == 1 for points in grid):
        return np.broadcast_to(x, (*x.shape[:2], *size))
    for axis, (points, pixels) in enumerate(zip(grid, size, strict=True)):
        if points != pixels:
            x = np.moveaxis(np.tensordot(x, _taps(points, pixels), (axis + 2, 1)), -1, axis + 2)
    return x


def _gathered(x: Array, grid: tuple[int, ...]) -> Array:
    """The gradient on the pixels (N, K, *S) as that on the grid."""
    for axis, points in enumerate(grid):
        pixels = x.shape[axis + 2]
        if points != pixels:
            x = np.moveaxis(np.tensordot(x, _taps(points, pixels), (axis + 2, 0)), -1, axis + 2)
    return x
