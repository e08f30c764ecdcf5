"""What the public functions return. Annotations are evaluated here, so that `help()` shows types, not references to them."""

from typing import NamedTuple

from torch import Tensor


class AnnotationLoss(NamedTuple):
    """The loss of one kind of drawings.

    Maps shaped like the labels with ``reduction="none"``, else 0-d tensors; float32, or float64 for float64 logits.

    Attributes:
        loss: ``nll + trace_weight * trace``; the only one that carries gradient.
        nll: weighted negative log-likelihood of the labels, reduced like the loss; detached.
        trace: weighted ``tr(A)``, reduced like the loss; detached. 0 for a trusted kind (``cm_logits=None``).
        count: sum of the weights of the labelled pixels (their number where no weight is given); detached. Divide by its
            global sum under data parallelism or gradient accumulation (``reduction="sum"``, or ``normalizer``).
    """

    loss: Tensor
    nll: Tensor
    trace: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class Objective(NamedTuple):
    """The loss of an image under all its drawings.

    Attributes:
        loss: the sum of ``weight * part.loss`` over all kinds of drawings; a (B, *S) map, summed over layers too, with
            ``reduction="none"``.
        parts: one `AnnotationLoss` for each kind, without its ``weight``, in the order in which they were given.
    """

    loss: Tensor
    parts: tuple[AnnotationLoss, ...]


class CoarseLabelLoss(NamedTuple):
    """The paper's objective.

    Attributes:
        loss: ``positive.loss + negative_weight * negative.loss``; carries gradient.
        positive: the `AnnotationLoss` of the positive drawings; None without any.
        negative: that of the negative drawings, without ``negative_weight``; None without any.
    """

    loss: Tensor
    positive: AnnotationLoss | None
    negative: AnnotationLoss | None
