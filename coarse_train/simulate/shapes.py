"""One region as a hurried person draws it: each function takes a region and the area that may be drawn, and gives a shape.

Lengths scale with the region, since a person's error on an object 300 pixels wide is larger than on one 10 pixels wide;
`size_of` is that length. ``depth`` is the distance of a region's pixels to its edge, at least 1; the edge of the image is
none, for people draw right up to it. Everything happens in a window around the region, (h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, pi, sqrt

import contourpy
import numpy as np
import scipy
from PIL import Image, ImageDraw

# Of a region's size: nothing is drawn further out. Dilated goes 0.09 times an uneven factor, mostly below 2.
REACH = 0.25
_GRID = 48  # strokes are planned on at most so many cells a side: 2 ms a stroke, whatever the resolution


def size_of(region: np.ndarray, depth: np.ndarray) -> float:
    """Side of a square of this area, but at most three widths of what is long and thin: a pole, a vessel, a fence."""
    width = 4 * float(depth[region].mean())
    return min(sqrt(float(region.sum())), 3 * width)


def exact(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    return fractured(region, depth, area, pen, rng) if area < 0.95 * region.sum() else region.copy()


def eroded(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """The inside of the region, at an uneven distance from its edge."""
    drawn = region
    if area < 0.98 * region.sum():
        level = np.where(region, depth * _uneven(region.shape, rng), 0)
        left_out = max(0, int(region.sum() - area))
        drawn = level >= np.partition(level[region], left_out)[left_out]
    smooth = _smoothed(drawn, 0.03 * size_of(region, depth))
    return smooth if smooth.any() else drawn & region


def dilated(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """Too wide all round; where less area is wanted, unfinished."""
    reach = max(1.0, rng.uniform(0.03, 0.09) * size_of(region, depth))
    wide = scipy.ndimage.distance_transform_edt(~region) <= reach * _uneven(region.shape, rng)
    return wide if area > 0.8 * region.sum() else fractured(wide, depth, area, pen, rng)


def polygon(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """A few straight edges around the inside; holes that are small beside the region are not left out."""
    size = size_of(region, depth)
    inside = eroded(region, depth, area, pen, rng)
    holes, count = scipy.ndimage.label(~inside)
    areas = np.bincount(holes.ravel(), minlength=count + 1)
    edge = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    filled = areas < 0.1 * size**2
    filled[edge] = False
    filled[0] = False
    return _simplified(inside | filled[holes], size, rng)


def fractured(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """One or two pieces, cut by lines across the region, with the wanted area together."""
    rows, columns = np.nonzero(region)
    angle = rng.uniform(0, 2 * pi)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    along += 0.06 * max(1.0, float(np.ptp(along))) * np.log(_uneven(region.shape, rng)[rows, columns])
    place = np.empty(len(along))
    place[np.argsort(along, kind="stable")] = (np.arange(len(along)) + 0.5) / len(along)
    kept = min(1.0, max(area, 1.0) / len(along))
    pieces = 1 + int(rng.random() < 0.4)
    gaps = rng.dirichlet(np.ones(pieces + 1)) * (1 - kept)
    parts = rng.dirichlet(np.full(pieces, 4.0)) * kept
    starts = np.cumsum(gaps)[:-1] + np.concatenate([[0], np.cumsum(parts)[:-1]])
    result = np.zeros_like(region)
    for start, part in zip(starts, parts, strict=True):
        piece = (place >= start) & (place < start + part)
        result[rows[piece], columns[piece]] = True
    return result if result.any() else region & (depth >= depth[region].max())


def shifted(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """The outline in the wrong place."""
    shape = eroded(region, depth, area, pen, rng)
    angle, length = rng.uniform(0, 2 * pi), max(1.0, rng.uniform(0.03, 0.09) * size_of(region, depth))
    down, right = round(length * np.sin(angle)), round(length * np.cos(angle))
    moved = np.zeros_like(shape)
    height, width = shape.shape
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = shape[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved if moved.any() else shape


def scribble(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """Strokes of the pen along the middle of the region, from one part of it to another, each where no other was."""
    # a fine pen for what is thin: at most half as wide as a strip
    pen = min(pen, max(1.0, 2 * float(depth[region].mean())))
    nodes, values, graph = _ridge(region, depth)
    canvas = Image.new("1", region.shape[::-1])
    pencil = ImageDraw.Draw(canvas)
    drawn, attraction = np.zeros_like(region), values.copy()
    for _ in range(8):
        length = (area - drawn.sum()) / pen
        if length < 1.5 * pen and drawn.any():
            break
        start = int(rng.choice(len(nodes), p=attraction / attraction.sum()))
        reach, before = scipy.sparse.csgraph.dijkstra(graph, indices=start, return_predecessors=True)
        reach[~np.isfinite(reach)] = 0
        path = [int(rng.choice(np.flatnonzero(reach >= np.quantile(reach, 0.7))))]
        while path[-1] != start:
            path.append(int(before[path[-1]]))
        line = _by_hand(nodes[path], values[path], length - pen, rng)
        _stroke(pencil, line, pen)
        drawn = np.asarray(canvas)
        taken = np.hypot(*(nodes[:, None] - line).transpose(2, 0, 1)).min(1) < 2 * pen
        attraction[taken] *= 0.05
        detour = scipy.sparse.diags_array(np.where(taken, 2.0, 1.0))
        graph = (detour @ graph @ detour).tocsr()
    return drawn if drawn.any() else region & (depth >= depth[region].max())


def spots(region: np.ndarray, depth: np.ndarray, area: float, pen: float, rng: np.random.Generator) -> np.ndarray:
    """A few discs inside."""
    radius = max(pen / 2, sqrt(area / pi / rng.integers(1, 5)))
    drawn = np.zeros_like(region)
    rows, columns = np.ogrid[: region.shape[0], : region.shape[1]]
    for _ in range(12):
        left = area - drawn.sum()
        if left < 0.3 * radius**2 and drawn.any():
            break
        free = np.where(region & ~drawn, depth, 0)
        if not free.any():
            break
        places = np.flatnonzero(free >= min(radius, 0.8 * free.max()))
        row, column = np.unravel_index(rng.choice(places), region.shape)
        inner = max(0.7, min(radius * rng.uniform(0.8, 1.2), float(depth[row, column]), sqrt(max(left, 1) / pi)))
        flat = sqrt(rng.uniform(0.7, 1.4))
        drawn |= ((rows - row) * flat) ** 2 + ((columns - column) / flat) ** 2 <= inner**2
    return drawn


KINDS: dict[str, Callable[[np.ndarray, np.ndarray, float, float, np.random.Generator], np.ndarray]] = {
    shape.__name__: shape for shape in (exact, eroded, dilated, polygon, fractured, shifted, scribble, spots)
}


def _uneven(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """(h, w) smooth random factors around 1, mostly in 0.6 to 1.6: a hand does not keep its distance."""
    coarse = Image.fromarray(rng.normal(0, 0.25, (4, 4)).astype(np.float32))
    return np.exp(np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)))


def _smoothed(shape: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.5:
        return shape
    return scipy.ndimage.gaussian_filter(shape.astype(np.float32), sigma, mode="nearest", truncate=2.5) > 0.5


def _simplified(shape: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """The outlines with few corners, each of them a little off."""
    lines = contourpy.contour_generator(z=np.pad(shape, 1).astype(np.float32)).lines(0.5)
    outlines = [np.asarray(line) for line in lines]
    canvas = Image.new("1", shape.shape[::-1])
    pencil = ImageDraw.Draw(canvas)
    loops = [(_area(loop), loop - 1) for loop in outlines if len(loop) > 3]
    for area, loop in sorted(loops, key=lambda pair: -abs(pair[0])):
        corners = douglas_peucker(loop, 0.06 * size)
        corners = corners + rng.normal(0, 0.02 * size, corners.shape)
        if len(corners) > 2:
            pencil.polygon([(float(x), float(y)) for x, y in corners], fill=int(area > 0))
    drawn = np.array(canvas)
    return drawn if drawn.any() else shape


def _area(loop: np.ndarray) -> float:
    """Signed area of a closed outline (n, 2): contourpy has what is inside on the left, so a hole's is negative."""
    x, y = loop.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def douglas_peucker(loop: np.ndarray, tolerance: float) -> np.ndarray:
    """The corners (m, 2) of a closed outline (n, 2) that keep every point within ``tolerance`` of the polygon."""
    points = loop[:-1] if np.array_equal(loop[0], loop[-1]) else loop
    far = int(np.hypot(*(points - points[0]).T).argmax())
    kept = {0, far}
    pending = [(0, far), (far, len(points))]
    ring = np.concatenate([points, points[:1]])
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        chord = ring[last] - ring[first]
        offset = ring[first + 1 : last] - ring[first]
        length = float(np.hypot(*chord))
        if length > 0:
            t = np.clip(offset @ chord / length**2, 0, 1)
            distance = np.hypot(*(offset - t[:, None] * chord).T)
        else:
            distance = np.hypot(*offset.T)
        split = int(distance.argmax())
        if distance[split] > tolerance:
            middle = first + 1 + split
            kept.add(middle)
            pending += [(first, middle), (middle, last)]
    return points[sorted(kept)]


def _ridge(region: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, scipy.sparse.csr_matrix]:
    """A graph to plan strokes on: positions (n, 2) as x, y, their depth (n,), and (n, n) costs between neighbours, which
    are small where it is deep. A node is the deepest pixel of a cell, so that what is connected stays so."""
    cell = ceil(max(region.shape) / _GRID)
    height, width = (ceil(side / cell) for side in region.shape)
    padding = ((0, height * cell - region.shape[0]), (0, width * cell - region.shape[1]))
    inside = np.pad(np.where(region, depth, 0), padding)
    cells = inside.reshape(height, cell, width, cell).swapaxes(1, 2).reshape(height, width, -1)
    deepest, value = cells.argmax(2), cells.max(2)
    number = np.full((height + 2, width + 2), -1)
    number[1:-1, 1:-1][value > 0] = np.arange(np.count_nonzero(value))
    row, column = np.nonzero(value)
    at = deepest[row, column]
    nodes = np.stack([column * cell + at % cell, row * cell + at // cell], 1).astype(np.float64)
    values = value[row, column].astype(np.float64)
    sources, targets = [], []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        other = number[row + 1 + down, column + 1 + right]
        sources.append(np.flatnonzero(other >= 0))
        targets.append(other[other >= 0])
    source, target = np.concatenate(sources), np.concatenate(targets)
    length = np.hypot(*(nodes[source] - nodes[target]).T)
    cost = length / np.minimum(values[source], values[target])
    graph = scipy.sparse.coo_matrix((cost, (source, target)), (len(nodes),) * 2).tocsr()
    return nodes, values, graph + graph.T


def _by_hand(path: np.ndarray, depth: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """A piece of a path (n, 2) with at most the wanted length, smooth, and wavering by a part of ``depth`` (n,)."""
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    if length < 1 or along[-1] == 0:
        return path[len(path) // 2][None]
    length = min(length, along[-1])
    start = rng.uniform(0, along[-1] - length)
    count = int(np.clip(length, 2, 40))
    at = np.linspace(start, start + length, count)
    smooth = scipy.ndimage.gaussian_filter1d(path, max(1.0, len(path) / 8), axis=0, mode="nearest")
    line = np.stack([np.interp(at, along, smooth[:, axis]) for axis in (0, 1)], 1)
    waver = scipy.ndimage.gaussian_filter1d(rng.normal(0, 1, (count, 2)), max(1.0, count / 7), axis=0)
    waver *= np.minimum(0.2 * np.interp(at, along, depth), 0.06 * length)[:, None] / (waver.std() + 1e-9)
    return line + waver


def _stroke(pencil: ImageDraw.ImageDraw, points: np.ndarray, pen: float) -> None:
    """A line with round ends."""
    corners = [(float(x), float(y)) for x, y in points]
    if len(corners) > 1:
        pencil.line(corners, fill=1, width=max(1, round(pen)), joint="curve")
    for x, y in (corners[0], corners[-1]):
        reach = max(0.0, (pen - 1) / 2)
        pencil.ellipse((x - reach, y - reach, x + reach, y + reach), fill=1)
