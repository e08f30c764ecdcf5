"""A problem is one line of text, such as

    c19 1024x2048 seg4 cm8 bf16 positive+trusted fb blobs

    c19             classes
    1024x2048       pixels; b2 before it: two images
    seg4            class logits at stride 4 (seg1: on the pixel grid; without a word: seg1)
    cm8             each confusion-matrix field at stride 8; cm1: at every pixel; cmimage: one matrix an image; cmglobal: one
    bf16            storage of all logits: fp32 (without a word), bf16, fp16, fp64
    positive+trusted   kinds of drawings, a layer each, with a number behind them more ("positive3"):
                    positive, negative   with a field of their own; negative ones with the uniform transition
                    labels, trusted      without: positive ones, which is cross-entropy, and negative ones
    fb              forward and backward (without a word); f: forward that keeps what backward needs; b: backward alone; nograd;
                    posterior; map: the label map
    blobs           the data: `DATA` below; without a word: blobs
    t2 fresh        conditions: threads (without a word: 1); what malloc does with large blocks: reused (without a word), fresh,
                    or thp, which is fresh with PyTorch told to ask for huge pages

It names everything that decides a time but the machine. Tables, tests and the command line take the same lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coarse_kernels import Drawings, uniform_transition

TRACE_WEIGHT = 0.01
IGNORE = 255
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fb", "f", "b", "nograd", "posterior", "map")
# blobs   as in training: the network is confident but near outlines, fields are smooth and mostly diagonal, drawings are
#         polygons of 32 pixels, a third of each layer undrawn
# same    the same, further layers undrawn where the first is
# noise   white noise of scale 2 for all logits, drawings in squares of 16 pixels, a tenth undrawn
# random  white noise, and every pixel labelled on its own: the worst case for gathers
# extreme white noise of scale 40, at which probabilities underflow
DATA = ("blobs", "same", "noise", "random", "extreme")
BUFFERS = ("reused", "fresh", "thp")
_WITH_FIELD, _TRUSTED = ("positive", "negative"), ("labels", "trusted")


class Kind(NamedTuple):
    """Drawings of one kind, in some layers."""

    name: str
    layers: int = 1

    @property
    def has_field(self) -> bool:
        return self.name in _WITH_FIELD

    @property
    def is_negative(self) -> bool:
        return self.name in ("negative", "trusted")

    def __str__(self) -> str:
        return self.name + (str(self.layers) if self.layers > 1 else "")


@dataclass(frozen=True)
class Problem:
    """See the module's docstring; ``str`` of one is its line, with every word in its place."""

    classes: int
    height: int
    width: int
    kinds: tuple[Kind, ...] = (Kind("positive"),)
    images: int = 1
    seg_stride: int = 1
    field: str = "1"  # a stride, "image", "global"; "" where no kind has one
    dtype: str = "fp32"
    mode: str = "fb"
    data: str = "blobs"
    threads: int = 1
    buffers: str = "reused"

    def __str__(self) -> str:
        words = [
            f"c{self.classes}",
            *([f"b{self.images}"] if self.images > 1 else []),
            f"{self.height}x{self.width}",
            f"seg{self.seg_stride}",
            *([f"cm{self.field}"] if self.field else []),
            self.dtype,
            *(["+".join(map(str, self.kinds))] if self.mode != "map" else []),
            self.mode,
            self.data,
            *([f"t{self.threads}"] if self.threads > 1 else []),
            *([self.buffers] if self.buffers != "reused" else []),
        ]
        return " ".join(words)

    # ---- sizes -----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixels(self) -> int:
        return self.images * self.height * self.width

    @property
    def storage(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def seg_grid(self) -> tuple[int, int]:
        return -(-self.height // self.seg_stride), -(-self.width // self.seg_stride)

    @property
    def field_grid(self) -> tuple[int, int]:
        if not self.field.isdigit():
            return 1, 1
        stride = int(self.field)
        return -(-self.height // stride), -(-self.width // stride)

    @property
    def field_images(self) -> int:
        return 1 if self.field == "global" else self.images

    @property
    def fields(self) -> int:
        return sum(kind.has_field for kind in self.kinds)

    @property
    def layers(self) -> int:
        return sum(kind.layers for kind in self.kinds) if self.mode != "map" else 0

    @property
    def seg_values(self) -> int:
        return self.images * self.classes * math.prod(self.seg_grid)

    @property
    def field_values(self) -> int:
        """Of all fields together."""
        return self.fields * self.field_images * self.classes**2 * math.prod(self.field_grid)

    @property
    def wants_gradient(self) -> bool:
        return self.mode in ("fb", "f", "b")

    def scaled_down(self, height: int, width: int) -> Problem:
        """The same on a smaller image."""
        return replace(self, height=min(height, self.height), width=min(width, self.width))


def parse(line: str) -> Problem:
    """The problem of a line; ValueError naming the word that is not understood, or what does not go together."""
    found: dict[str, Any] = {}

    def take(name: str, value: Any, word: str) -> None:
        if name in found:
            raise ValueError(f"problem {line!r}: {word!r} says once more what {name} is, {found[name]!r}")
        found[name] = value

    for word in line.split():
        if match := re.fullmatch(r"c(\d+)", word):
            take("classes", int(match[1]), word)
        elif match := re.fullmatch(r"b(\d+)", word):
            take("images", int(match[1]), word)
        elif match := re.fullmatch(r"t(\d+)", word):
            take("threads", int(match[1]), word)
        elif match := re.fullmatch(r"(\d+)x(\d+)", word):
            take("height", int(match[1]), word)
            take("width", int(match[2]), word)
        elif match := re.fullmatch(r"seg(\d+)", word):
            take("seg_stride", int(match[1]), word)
        elif match := re.fullmatch(r"cm(\d+|image|global)", word):
            take("field", match[1], word)
        elif word in DTYPES:
            take("dtype", word, word)
        elif word in MODES:
            take("mode", word, word)
        elif word in DATA:
            take("data", word, word)
        elif word in BUFFERS:
            take("buffers", word, word)
        elif all(re.fullmatch(rf"({'|'.join((*_WITH_FIELD, *_TRUSTED))})\d*", part) for part in word.split("+")):
            take("kinds", tuple(_kind(part) for part in word.split("+")), word)
        else:
            raise ValueError(f"problem {line!r}: expected words as in {str(_EXAMPLE)!r}, got {word!r}")
    for name, example in (("classes", "c19"), ("height", "1024x2048")):
        if name not in found:
            raise ValueError(f"problem {line!r}: expected its {name} ({example}), got none")
    return _checked(line, found)


def _kind(word: str) -> Kind:
    name = word.rstrip("0123456789")
    return Kind(name, int(word[len(name) :] or 1))


def _checked(line: str, found: dict[str, Any]) -> Problem:
    if found.get("mode") == "map":
        if "kinds" in found or "field" in found:
            raise ValueError(f"problem {line!r}: a label map needs no drawings and no field")
        found |= {"kinds": (), "field": ""}
    kinds = found.setdefault("kinds", (Kind("positive"),))
    with_field = any(kind.has_field for kind in kinds)
    if "field" in found and found["field"] and not with_field:
        raise ValueError(f"problem {line!r}: expected no cm{found['field']}, since no kind of drawings has a field")
    found.setdefault("field", "1" if with_field else "")
    least = {"classes": 2, "images": 1, "height": 1, "width": 1, "seg_stride": 1, "threads": 1}
    for name, value in least.items():
        if found.get(name, value) < value:
            raise ValueError(f"problem {line!r}: expected {name} >= {value}, got {found[name]}")
    if found["classes"] > 255 or found["field"] == "0" or any(kind.layers < 1 for kind in kinds):
        raise ValueError(f"problem {line!r}: expected at most 255 classes, and strides and layers >= 1")
    return Problem(**found)


_EXAMPLE = Problem(19, 1024, 2048, (Kind("positive"), Kind("trusted")), seg_stride=4, field="8", dtype="bf16")


# ---- what it costs at the least --------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """pixels: with a label of some layer of a kind; labels: of all its layers."""

    pixels: float
    labels: float


class Cost(NamedTuple):
    """Counted from the algorithm, for one call: what no way to compute it does without.

    bytes: each logit read once, each gradient written once, each label (a byte) read once.
    exponentials: of the class logits at each pixel; of a field's at each pixel that has a label of its kind, or once for each
        matrix that all pixels of an image share.
    multiply_adds: of one lane. Of class logits: their sum and their gradient, and on a grid as many again for each axis less
        one. Of a field, at each pixel that has a label of its kind, C x C for the sums of the columns, with a gradient C x C
        more, and as many again on a grid of its own; at each label C for the row that is named, or C x C with a transition.
        Of a matrix that all pixels share, C for p q and C for the gradient at each label.

    All three are unknown, NaN, for a forward or a backward alone: which of them does the work is for a schedule to say.
    """

    bytes: float
    exponentials: float
    multiply_adds: float


def cost(problem: Problem, drawn: Sequence[Drawn]) -> Cost:
    """``drawn``: of each kind of drawings, as `Inputs.drawn` says."""
    if problem.mode in ("f", "b"):
        return Cost(math.nan, math.nan, math.nan)
    values = problem.seg_values + problem.field_values
    passes = 2 if problem.mode == "fb" else 1
    moved = passes * values * problem.storage.itemsize + problem.layers * problem.pixels
    if problem.mode == "posterior":
        moved += problem.pixels * problem.classes * problem.storage.itemsize
    classes, square, on_grid = problem.classes, problem.classes**2, problem.seg_stride > 1
    if problem.mode == "map":
        return Cost(moved + problem.pixels, 0.0, float(classes * problem.pixels * on_grid))
    exponentials = float(classes * problem.pixels)
    operations = float(passes * classes * problem.pixels * (1 + on_grid))
    for kind, (pixels, labels) in zip(problem.kinds, drawn, strict=True):
        shared = problem.field_grid == (1, 1) != problem.size
        if not kind.has_field or shared:
            exponentials += square * problem.field_images if kind.has_field else 0
            operations += passes * classes * labels
            continue
        exponentials += square * pixels
        operations += passes * square * pixels * (1 if problem.field_grid == problem.size else 2)
        operations += labels * (square if kind.is_negative else classes)
    return Cost(moved, exponentials, operations)


# ---- its inputs ------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """seg_logits (B, C, *s); kinds: drawings whose fields are ``fields``, (B or 1, C, C, *G) each, in their order."""

    seg_logits: Tensor
    kinds: tuple[Drawings, ...]
    size: tuple[int, int]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What may want a gradient, by the name that its error has."""
        found = {"class logits": self.seg_logits}
        fields = [kind.cm_logits for kind in self.kinds if kind.cm_logits is not None]
        return found | {f"field {k}" if len(fields) > 1 else "field": field for k, field in enumerate(fields)}

    def drawn(self) -> tuple[Drawn, ...]:
        """Of each kind the pixels that have a label in some layer, and the labels of all layers."""
        known = [_layered(kind.labels).ne(IGNORE) for kind in self.kinds]
        return tuple(Drawn(float(each.any(1).sum()), float(each.sum())) for each in known)


def _layered(labels: Tensor) -> Tensor:
    return labels if labels.ndim == 4 else labels[:, None]


def make_inputs(problem: Problem, device: str = "cpu", seed: int = 0) -> Inputs:
    """The data of a problem: the same for the same line and seed on one kind of device."""
    make = _Maker(problem, device, seed)
    truth = make.truth() if problem.data in ("blobs", "same") else None
    seg = make.class_logits(truth)
    first: Tensor | None = None
    kinds = []
    for kind in problem.kinds:
        cm = make.field() if kind.has_field else None
        labels = make.labels(kind, truth, first if problem.data == "same" else None)
        first = labels[:, 0] if first is None else first
        kinds.append(
            Drawings(
                labels if kind.layers > 1 else labels[:, 0],
                cm,
                uniform_transition(problem.classes, device=device) if kind.is_negative else None,
                trace_weight=TRACE_WEIGHT if kind.has_field else 0.0,
            )
        )
    return Inputs(seg, tuple(kinds), problem.size)


class _Maker:
    def __init__(self, problem: Problem, device: str, seed: int):
        self.problem, self.device = problem, device
        self.where: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, **self.where)

    def leaf(self, values: Tensor) -> Tensor:
        return values.to(self.problem.storage).requires_grad_(self.problem.wants_gradient)

    def smooth(self, *shape: int) -> Tensor:
        """Noise (..., h, w) of about unit scale that changes over some eight points of the grid."""
        *before, height, width = shape
        rough = self.normal(math.prod(before), 1, -(-height // 8) + 1, -(-width // 8) + 1)
        return F.interpolate(rough, (height, width), mode="bilinear", align_corners=True).view(shape)

    def truth(self) -> Tensor:
        """(B, H, W) true classes: polygons of 96 pixels."""
        return torch.stack([self._polygons(96) % self.problem.classes for _ in range(self.problem.images)])

    def class_logits(self, truth: Tensor | None) -> Tensor:
        problem = self.problem
        shape = (problem.images, problem.classes, *problem.seg_grid)
        if truth is None:
            return self.leaf(self.normal(*shape).mul_(40.0 if problem.data == "extreme" else 2.0))
        logits = self.smooth(*shape)
        at = F.interpolate(truth[:, None].float(), problem.seg_grid, mode="nearest").long()
        # near an outline, where noise decides as well, the network is unsure; elsewhere its class has most of p
        sure = F.avg_pool2d((at == at.roll(1, -1)).float() * (at == at.roll(1, -2)).float(), 3, 1, 1)
        lead = 2 + (3 + math.log(problem.classes - 1)) * sure
        return self.leaf(logits.scatter_add_(1, at, lead).add_(self.normal(*shape), alpha=0.3))

    def field(self) -> Tensor:
        problem = self.problem
        shape = (problem.field_images, problem.classes, problem.classes, *problem.field_grid)
        diagonal = torch.eye(problem.classes, device=self.device)[:, :, None, None]
        if problem.data in ("blobs", "same"):
            # 0.6 to 0.9 of a column on its diagonal, as a recipe's start has it
            return self.leaf(self.smooth(*shape).mul_(0.5).add_(diagonal, alpha=math.log(4.0 * (problem.classes - 1))))
        scale = 40.0 if problem.data == "extreme" else 2.0
        return self.leaf(self.normal(*shape).mul_(scale).add_(diagonal, alpha=2.0))

    def labels(self, kind: Kind, truth: Tensor | None, undrawn_as: Tensor | None) -> Tensor:
        """(B, K, H, W) uint8."""
        layers: list[Tensor] = []
        for _ in range(kind.layers):
            if truth is None:
                layer = self._squares()
            else:
                layer = torch.stack([self._drawn(kind, image) for image in truth])
                if undrawn_as is None:
                    layer = self._with_holes(layer)
                    undrawn_as = layer if self.problem.data == "same" else None
                else:
                    layer.masked_fill_(undrawn_as == IGNORE, IGNORE)
            layers.append(layer)
        return torch.stack(layers, 1)

    def _drawn(self, kind: Kind, truth: Tensor) -> Tensor:
        """(H, W): a name a polygon, for positive drawings mostly that of the truth there, for negative ones another."""
        place = self._polygons(32)
        count = int(place.max()) + 1
        anywhere = torch.zeros(count, dtype=torch.int64, device=self.device)
        # a polygon has few classes, mostly one; which of its pixels comes last is no one's to say
        anywhere.scatter_reduce_(0, place.flatten(), truth.flatten(), "amax", include_self=False)
        other = torch.randint(1, self.problem.classes, (count,), **self.where)
        wrong = torch.rand(count, **self.where) < (1.0 if kind.is_negative else 0.2)
        names = torch.where(wrong, (anywhere + other) % self.problem.classes, anywhere)
        return names[place].byte()

    def _with_holes(self, labels: Tensor) -> Tensor:
        """(B, H, W), a third of it undrawn, in polygons."""
        for image in labels:
            place = self._polygons(32)
            count = int(place.max()) + 1
            gone = torch.randperm(count, **self.where) < count // 3
            first = image[0, 0].clone()
            image.masked_fill_(gone[place], IGNORE)
            image.view(-1)[1:2], image[0, 0] = IGNORE, first  # something of both, however small the problem
        return labels

    def _squares(self) -> Tensor:
        """(B, H, W) uint8 in squares of 16 pixels, a tenth undrawn; each pixel on its own for "random"."""
        problem = self.problem
        edge = 1 if problem.data == "random" else 16
        shape = (problem.images, -(-problem.height // edge), -(-problem.width // edge))
        labels = torch.randint(0, problem.classes, shape, dtype=torch.uint8, **self.where)
        if problem.data != "random":
            labels[torch.rand(shape, **self.where) < 0.1] = IGNORE
        labels = labels.repeat_interleave(edge, 1).repeat_interleave(edge, 2)
        labels = labels[:, : problem.height, : problem.width].contiguous()
        if problem.width > 1 and problem.data != "random":  # both kinds, however small the problem
            labels[:, 0, :2] = torch.tensor([0, IGNORE], dtype=torch.uint8, device=self.device)
        return labels

    def _polygons(self, edge: int) -> Tensor:
        """(H, W) int64 number of the polygon that a pixel is in, about ``edge`` pixels across: that of the nearest of some
        points on a rough grid. Outlines lie at no multiple of anything, as in drawings."""
        height, width = self.problem.size
        rows, columns = -(-height // edge) + 2, -(-width // edge) + 2  # with a margin of one
        jitter = torch.rand(2, rows * columns, **self.where)
        shuffled = torch.randperm(rows * columns, **self.where)
        y = ((torch.arange(height, device=self.device) + 0.5) / edge + 1)[:, None]  # in cells
        x = ((torch.arange(width, device=self.device) + 0.5) / edge + 1)[None]
        nearest = torch.full((height, width), math.inf, device=self.device)
        found = torch.zeros(height, width, dtype=torch.int64, device=self.device)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                row, column = y.long() + down, x.long() + right
                cell = row * columns + column
                distance = (row + jitter[0][cell] - y).square_() + (column + jitter[1][cell] - x).square_()
                closer = distance < nearest
                nearest = torch.where(closer, distance, nearest)
                found = torch.where(closer, cell, found)
        return shuffled[found]
