"""The networks: segmentation (`networks`), annotation models (`annotation`), and the model that couples them (`coupled`)."""

from .annotation import AnnotationModel, Full, GlobalField, PixelField, build_annotation
from .coupled import CoarseModel, ModelOutput, build_model, confusion_sums, mean_confusion, parameter_groups
from .networks import architecture_of, build_segmentation
from .segformer import SegFormer
from .street import StreetNet
from .unet import UNet

__all__ = [
    "AnnotationModel",
    "CoarseModel",
    "Full",
    "GlobalField",
    "ModelOutput",
    "PixelField",
    "SegFormer",
    "StreetNet",
    "UNet",
    "architecture_of",
    "build_annotation",
    "build_model",
    "build_segmentation",
    "confusion_sums",
    "mean_confusion",
    "parameter_groups",
]
