"""The fused C++ kernels (csrc/cpu). Instruction set chosen at run time: `coarse_kernels._native.cpu_info()`."""

from __future__ import annotations

from ..problem import Problem
from . import compiled
from .fused import FusedBackend

# `Form` of csrc/cpu/kernel_set.h, in the order in which they are asked.
_FORMS = (
    "trusted: A = I, the class probabilities are all there is to it",
    "one matrix: for all pixels of an image, so that a pixel looks up the column of its label",
    "strided: matrices interpolated from their grid, exponentials along a column of pixels as geometric sequences",
    "pixels, C = 2: every logit read once and every gradient written once, loops over classes unrolled",
    "pixels: every logit read once and every gradient written once",
)


class CpuBackend(FusedBackend):
    def kernels(self, problem: Problem) -> list[str]:
        if problem.seg_logits.shape[0] == 0 or problem.size.numel() == 0:
            return ["none: there is no pixel"] * len(problem.drawings)
        lines = []
        for drawings, (form, per_row, _, tasks) in zip(problem.drawings, self._chosen(problem), strict=True):
            line = f"{_FORMS[form]}; {tasks} tasks"
            if form >= 3 and per_row == 1:
                line += "; not in runs along the image, as beside a field on a coarser grid all go row by row"
            elif form >= 3 and problem.seg_logits.shape[2:] != problem.size:
                line += "; in runs of a row, not of the whole image, as the class logits have a grid of their own"
            if form >= 3 and drawings.labels.shape[1] > 1:
                line += "; gradients are not written along with the next pixels, as there are several layers"
            lines.append(line)
        return lines


BACKEND = CpuBackend("cpu", ("cpu",), compiled.NAMESPACE)
