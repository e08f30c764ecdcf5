"""Fused losses for segmentation from coarse positive and negative drawings. Start at `coarse_label_loss`."""

from .backends import available_backends, use_backend
from .functional import (
    AnnotationLoss,
    CoarseLabelLoss,
    annotation_nll,
    annotation_posterior,
    coarse_label_loss,
)
from .modules import AnnotationNLL, CoarseLabelCriterion, TransitionMatrix
from .schedule import use_schedule
from .transition import estimate_transition, uniform_transition
from .version import __version__

__all__ = [
    "AnnotationLoss",
    "AnnotationNLL",
    "CoarseLabelCriterion",
    "CoarseLabelLoss",
    "TransitionMatrix",
    "__version__",
    "annotation_nll",
    "annotation_posterior",
    "available_backends",
    "coarse_label_loss",
    "estimate_transition",
    "uniform_transition",
    "use_backend",
    "use_schedule",
]
