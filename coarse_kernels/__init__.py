"""Fused losses for segmentation from coarse positive and negative drawings.

    annotation_objective(seg_logits, [Drawings(labels, cm_logits), ...])    the objective of an image; start here
    ConfusionHead, uniform_transition                                      what Drawings are given
    annotation_posterior, label_map                                        what is believed afterwards
    explain, available_backends                                            who computes, and why

Equations: `help(coarse_kernels.functional)`. What was built: `python -m coarse_kernels.env_report`.
"""

from .backends import available_backends, use_backend
from .confusion import ConfusionHead, confusion_logits
from .functional import (
    annotation_nll,
    annotation_objective,
    annotation_posterior,
    coarse_label_loss,
    explain,
    label_map,
)
from .modules import AnnotationNLL, AnnotationObjective, CoarseLabelCriterion, TransitionMatrix
from .pool import empty_pool, pool_bytes, set_pool_limit
from .problem import Drawings
from .results import AnnotationLoss, CoarseLabelLoss, Objective
from .schedule import use_schedule
from .transition import estimate_transition, uniform_transition
from .version import __version__

__all__ = [
    "AnnotationLoss",
    "AnnotationNLL",
    "AnnotationObjective",
    "CoarseLabelCriterion",
    "CoarseLabelLoss",
    "ConfusionHead",
    "Drawings",
    "Objective",
    "TransitionMatrix",
    "__version__",
    "annotation_nll",
    "annotation_objective",
    "annotation_posterior",
    "available_backends",
    "coarse_label_loss",
    "confusion_logits",
    "empty_pool",
    "estimate_transition",
    "explain",
    "label_map",
    "pool_bytes",
    "set_pool_limit",
    "uniform_transition",
    "use_backend",
    "use_schedule",
]
