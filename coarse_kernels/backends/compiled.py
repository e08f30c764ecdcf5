"""The namespace `torch.ops.coarse_kernels`, which the compiled modules implement for CPU (`_C`) and CUDA (`_cuda`)."""

from __future__ import annotations

import torch

from .. import native
from . import autograd, operator

NAMESPACE = "coarse_kernels"


def _find_bad_label_fake(labels: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    return labels.new_empty((2,), dtype=torch.int64)


# Of every device: int64 (kinds, 4) on the host, which kernel each kind of drawings gets and why not a faster one.
KERNELS_OF = (
    "kernels_of(Tensor seg_logits, Tensor[] labels, Tensor[] cm_logits, Tensor[] transition, int wanted) -> Tensor"
)


def _define() -> torch.library.Library:
    library = operator.declare(NAMESPACE)
    autograd.register(NAMESPACE, library)
    library.define(KERNELS_OF)
    library.define("find_bad_label(Tensor labels, int num_classes, int ignore_index) -> Tensor")
    torch.library.register_fake(f"{NAMESPACE}::find_bad_label", _find_bad_label_fake, lib=library)
    return library


LIBRARY = _define() if native.OPERATORS is not None else None
