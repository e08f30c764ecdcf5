"""What every fused backend shares: the operator `annotation_objective` with its fake kernel and autograd, and its uses.

An operator lives in a namespace of `torch.ops`: ``coarse_kernels`` (compiled, CPU and CUDA), ``coarse_kernels_triton``. The
schemas are here, once; namespaces differ in who implements them.

`annotation_objective` takes the parts of the kinds of drawings as lists, one element for each kind (`Arguments`); one that is
absent has the shape (0,). It returns `Outputs`, the gradients being those of ``loss``; one that is not in ``wanted`` has no
elements. The same operator serves all uses:

    forward without gradient      wanted = 0
    one_pass                      forward: wanted = what autograd will ask for; backward hands it out
    recompute                     forward: wanted = 0; backward: the operator again, grad_output folded into scale
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native, schedule, wrapped
from ..problem import Drawings, Problem, compute_dtype
from .reference import Terms, label_weights

_SECOND_DERIVATIVE = (
    "coarse_kernels: the fused operator has no second derivatives; "
    'use backend="reference", which computes them with plain PyTorch'
)
_ONLY_REFERENCE = 'the fused operators do not know {}; use backend="reference", which is plain PyTorch'


class Arguments(NamedTuple):
    """Of `annotation_objective`. Lists have an element for each kind of drawings, of shape (0,) where it is absent (`present`):
    autograd knows lists of tensors, and none of tensors or None.

    scale: what the kind's sums are multiplied with, one number on the device. weight: of the kind in ``loss``.
    per_pixel: ``losses``, ``nll`` and ``trace`` are maps shaped like the labels, scale and weight are 1, ``loss`` is absent.
    anchor: makes gradients part of the graph of what is differentiated (`_anchor`); not read.
    """

    seg_logits: Tensor  # (B, C, *s)
    labels: list[Tensor]  # (B, K, *S)
    cm_logits: list[Tensor]  # (B or 1, C, C, *G); absent: A = I
    transition: list[Tensor]  # (C, C); absent: T = I
    class_weight: list[Tensor]  # (C,)
    pixel_weight: list[Tensor]  # (B, K, *S)
    scale: list[Tensor]  # (); absent: 1
    weight: list[float]
    trace_weight: list[float]
    ignore_index: int
    per_pixel: bool
    wanted: int
    anchor: Tensor | None = None


class Outputs(NamedTuple):
    loss: Tensor  # sum over kinds of weight * losses
    losses: list[Tensor]  # scale * sum w (nll + trace_weight tr A)
    nll: list[Tensor]  # scale * sum w nll
    trace: list[Tensor]  # scale * sum w tr A
    grad_seg: Tensor
    grad_cm: list[Tensor]
    grad_transition: list[Tensor]


def present(t: Tensor) -> bool:
    """Not so an element of `Arguments` of shape (0,), which nothing else has: a field of no images has its other axes."""
    return t.dim() != 1 or t.numel() > 0


# Bits of ``wanted``.
SEG = 1


def cm_bit(kind: int) -> int:
    return 2 << 2 * kind


def transition_bit(kind: int) -> int:
    return 4 << 2 * kind


# Kinds of drawings in one call: the bits of ``wanted`` fit in an int64.
MAX_KINDS = 30

SCHEMAS = (
    "annotation_objective(Tensor seg_logits, Tensor[] labels, Tensor[] cm_logits, Tensor[] transition, "
    "Tensor[] class_weight, Tensor[] pixel_weight, Tensor[] scale, float[] weight, float[] trace_weight, "
    "int ignore_index, bool per_pixel, int wanted, Tensor? anchor=None) -> (Tensor loss, Tensor[] losses, Tensor[] nll, "
    "Tensor[] trace, Tensor grad_seg, Tensor[] grad_cm, Tensor[] grad_transition)",
    "objective_posterior(Tensor seg_logits, Tensor[] labels, Tensor[] cm_logits, Tensor[] transition, int ignore_index) "
    "-> Tensor",
    "labelled_weight(Tensor labels, Tensor? class_weight, Tensor? pixel_weight, int num_classes, int ignore_index) "
    "-> Tensor",
    "label_map(Tensor seg_logits, int[] size) -> Tensor",
)
# Of the devices whose kernels take one kind of drawings, with a matrix, at a time (`one_by_one`):
SINGLE_SCHEMAS = (
    "annotation_nll(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, Tensor? class_weight, "
    "Tensor? pixel_weight, Tensor? scale, float loss_scale, float trace_weight, int ignore_index, bool per_pixel, "
    "int wanted) -> (Tensor loss, Tensor nll, Tensor trace, Tensor grad_seg, Tensor grad_cm, Tensor grad_transition)",
    "annotation_posterior(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, int ignore_index) "
    "-> Tensor",
    # All kinds without a matrix: bits of ``wanted`` count these alone.
    "trusted(Tensor seg_logits, Tensor[] labels, Tensor[] transition, Tensor[] class_weight, Tensor[] pixel_weight, "
    "Tensor[] scale, float[] weight, int ignore_index, bool per_pixel, int wanted) "
    "-> (Tensor loss, Tensor[] nll, Tensor grad_seg, Tensor[] grad_transition)",
)
# And where gradients of 3 GB are formed on a device that the host must not wait for (`_handed_out`):
SCALE = "scale_(Tensor(a!) gradient, Tensor factor) -> ()"


class FusedBackend:
    """A `Backend` whose work is done by the operators of ``torch.ops.<namespace>``."""

    def __init__(self, name: str, device_types: tuple[str, ...], namespace: str):
        self.name, self.device_types, self.namespace = name, device_types, namespace

    def unavailable(self) -> str | None:
        return native.operators_reason()

    def unsupported(self, problem: Problem) -> str | None:
        if len(problem.drawings) > MAX_KINDS:
            return f"it serves up to {MAX_KINDS} kinds of drawings, got {len(problem.drawings)}"
        fields = (t for d in problem.drawings for t in (d.cm_logits, d.transition))
        return _untransformed((problem.seg_logits, *fields))

    def unsupported_tensor(self, tensor: Tensor) -> str | None:
        return _untransformed((tensor,))

    def nll_sums(self, problem: Problem, scales: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Terms, ...]]:
        out = self._run(problem, scales, per_pixel=False)
        return out.loss, tuple(_terms(out))

    def nll_maps(self, problem: Problem) -> tuple[Terms, ...]:
        return tuple(_terms(self._run(problem, [None] * len(problem.drawings), per_pixel=True)))

    def posterior(self, problem: Problem) -> Tensor:
        call = _arguments(problem, [None] * len(problem.drawings))
        posterior = self._operators().objective_posterior(*call[:4], problem.ignore_index)
        return posterior.to(problem.seg_logits.dtype)

    def labelled_weight(self, problem: Problem, drawings: Drawings) -> Tensor:
        if problem.reduction == "none":
            return label_weights(problem, drawings)
        dtype = problem.compute_dtype
        weights = (
            None if w is None else w.detach().to(dtype) for w in (drawings.class_weight, drawings.pixel_weight)
        )
        weight = self._operators().labelled_weight(
            drawings.labels, *weights, problem.num_classes, problem.ignore_index
        )
        return weight.to(dtype)

    def label_map(self, seg_logits: Tensor, size: tuple[int, ...]) -> Tensor:
        return self._operators().label_map(seg_logits, size)

    def _operators(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def _run(self, problem: Problem, scales: Sequence[Tensor | None], *, per_pixel: bool) -> Outputs:
        call = _arguments(problem, scales)._replace(per_pixel=per_pixel)
        needed = _needed(call)
        if needed and not torch.compiler.is_compiling():  # second derivatives of compiled code are AOTAutograd's to refuse
            half = any(t.dtype == torch.float16 and t.requires_grad for _, t in _differentiable(call))
            one_pass = schedule.current() == "one_pass" and not per_pixel and not half
            call = call._replace(wanted=needed if one_pass else 0, anchor=_anchor(call))
        return Outputs(*self._operators().annotation_objective(*call))


def _untransformed(tensors: Sequence[Tensor | None]) -> str | None:
    transform = wrapped.transformed(tensors)
    return None if transform is None else _ONLY_REFERENCE.format(transform)


def _terms(out: Outputs) -> Iterator[Terms]:
    for loss, nll, trace in zip(out.losses, out.nll, out.trace, strict=True):
        yield loss, nll.detach(), trace.detach()


def _arguments(problem: Problem, scales: Sequence[Tensor | None]) -> Arguments:
    """Of the operator, with constants in the compute dtype and nothing wanted."""
    dtype, drawings = problem.compute_dtype, problem.drawings
    absent = problem.seg_logits.new_empty(0, dtype=dtype)

    def each(tensors: Sequence[Tensor | None], *, constant: bool = False) -> list[Tensor]:
        return [absent if t is None else (t.detach() if constant else t).to(dtype) for t in tensors]

    def logits(t: Tensor) -> Tensor:  # only float64 with float64: nobody needs the mixtures to be fast
        return t.to(dtype) if dtype == torch.float64 else t

    return Arguments(
        seg_logits=logits(problem.seg_logits),
        labels=[d.labels for d in drawings],
        cm_logits=[absent if d.cm_logits is None else logits(d.cm_logits) for d in drawings],
        transition=each([d.transition for d in drawings]),
        class_weight=each([d.class_weight for d in drawings], constant=True),
        pixel_weight=each([d.pixel_weight for d in drawings], constant=True),
        scale=each(scales),
        weight=[d.weight for d in drawings],
        trace_weight=[d.trace_weight for d in drawings],
        ignore_index=problem.ignore_index,
        per_pixel=False,
        wanted=0,
    )


def _differentiable(call: Arguments) -> Iterator[tuple[int, Tensor]]:
    """Bits of ``wanted`` and their tensors."""
    yield SEG, call.seg_logits
    for kind, (cm, transition) in enumerate(zip(call.cm_logits, call.transition, strict=True)):
        if present(cm):
            yield cm_bit(kind), cm
        if present(transition):
            yield transition_bit(kind), transition


def _needed(call: Arguments) -> int:
    if not torch.is_grad_enabled():
        return 0
    return sum(bit for bit, tensor in _differentiable(call) if tensor.requires_grad)


# --- fake kernels: shapes and dtypes without computing ------------------------------------------------------------------


def _objective_fake(*args: Any) -> Outputs:
    call = Arguments(*args)
    wide = any(t.dtype == torch.float64 for t in (call.seg_logits, *call.cm_logits))
    dtype = torch.float64 if wide else torch.float32

    def absent() -> Tensor:
        return call.seg_logits.new_empty((0,), dtype=dtype)

    def gradient(of: Tensor, bit: int) -> Tensor:
        return of.new_empty(of.shape) if call.wanted & bit else absent()

    def terms() -> list[Tensor]:
        return [labels.new_empty(labels.shape if call.per_pixel else (), dtype=dtype) for labels in call.labels]

    return Outputs(
        loss=absent() if call.per_pixel else call.seg_logits.new_empty((), dtype=dtype),
        losses=terms(),
        nll=terms(),
        trace=terms(),
        grad_seg=gradient(call.seg_logits, SEG),
        grad_cm=[gradient(cm, cm_bit(k)) if present(cm) else absent() for k, cm in enumerate(call.cm_logits)],
        grad_transition=[
            gradient(t, transition_bit(k)) if present(t) else absent() for k, t in enumerate(call.transition)
        ],
    )


def _posterior_fake(
    seg_logits: Tensor, labels: list[Tensor], cm_logits: list[Tensor], transition: list[Tensor], ignore_index: int
) -> Tensor:
    return seg_logits.new_empty((*seg_logits.shape[:2], *labels[0].shape[2:]))


def _labelled_weight_fake(
    labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None, num_classes: int, ignore_index: int
) -> Tensor:
    return labels.new_empty((), dtype=torch.float64)


def _label_map_fake(seg_logits: Tensor, size: Sequence[int]) -> Tensor:
    dtype = torch.uint8 if seg_logits.shape[1] <= 256 else torch.int64
    return seg_logits.new_empty((seg_logits.shape[0], *size), dtype=dtype)


def _nll_fake(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    scale: Tensor | None,
    loss_scale: float,
    trace_weight: float,
    ignore_index: int,
    per_pixel: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if cm_logits.dtype == torch.float64 else torch.float32
    shape = labels.shape if per_pixel else ()

    def gradient(of: Tensor | None, bit: int) -> Tensor:
        if of is None or not wanted & bit:
            return seg_logits.new_empty((0,), dtype=dtype)
        return of.new_empty(of.shape)

    return (
        *(labels.new_empty(shape, dtype=dtype) for _ in range(3)),
        gradient(seg_logits, SEG),
        gradient(cm_logits, cm_bit(0)),
        gradient(transition, transition_bit(0)),
    )


def _trusted_fake(
    seg_logits: Tensor,
    labels: list[Tensor],
    transition: list[Tensor],
    class_weight: list[Tensor],
    pixel_weight: list[Tensor],
    scale: list[Tensor],
    weight: Sequence[float],
    ignore_index: int,
    per_pixel: bool,
    wanted: int,
) -> tuple[Any, ...]:
    dtype = compute_dtype(seg_logits.dtype)

    def gradient(of: Tensor, bit: int) -> Tensor:
        if not wanted & bit or not present(of):
            return seg_logits.new_empty((0,), dtype=dtype)
        return of.new_empty(of.shape)

    return (
        seg_logits.new_empty((0,) if per_pixel else (), dtype=dtype),
        [y.new_empty(y.shape if per_pixel else (), dtype=dtype) for y in labels],
        gradient(seg_logits, SEG),
        [gradient(t, transition_bit(k)) for k, t in enumerate(transition)],
    )


def _single_posterior_fake(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, ignore_index: int
) -> Tensor:
    return seg_logits.new_empty(seg_logits.shape)


# --- autograd -----------------------------------------------------------------------------------------------------------


class _Anchor(torch.autograd.Function):
    """No elements, but the graph of every input."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.count


def _anchor(call: Arguments) -> Tensor:
    """What makes a gradient depend on the inputs that it is a function of, without keeping their memory: one_pass saves no
    logits. Autograd then finds the way from a gradient back to them, and on it `_FirstDerivative`, which says that there is
    none; a node on no such way would be left out in silence.
    """
    return _Anchor.apply(*(tensor for _, tensor in _differentiable(call) if tensor.requires_grad))


class _FirstDerivative(torch.autograd.Function):
    """The identity, with a clear error behind it on the way to all that the gradient is a function ``of``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *of: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_SECOND_DERIVATIVE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call, out = Arguments(*inputs), Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*out.nll, *out.trace, out.grad_seg, *out.grad_cm, *out.grad_transition)
    ctx.call = call._replace(seg_logits=None, anchor=None, **dict.fromkeys(_TENSOR_LISTS))
    ctx.kinds = len(call.labels)
    saved = []
    if call.wanted:
        saved += [out.grad_seg, *out.grad_cm, *out.grad_transition]
    # Gradients of the parts' own losses are not to be had from that of their sum. A single kind's is its total's, unless it
    # counts for nothing.
    ctx.has_inputs = not call.wanted or ctx.kinds > 1 or call.weight[0] == 0
    if ctx.has_inputs:
        saved.append(call.seg_logits)
        for name in _TENSOR_LISTS:
            saved += getattr(call, name)
    ctx.has_anchor = call.anchor is not None
    if call.anchor is not None:
        saved.append(call.anchor)
    ctx.save_for_backward(*saved)


_TENSOR_LISTS = ("labels", "cm_logits", "transition", "class_weight", "pixel_weight", "scale")


def _backward(
    operators: Any, ctx: Any, grad_loss: Tensor | None, grad_losses: list[Tensor | None], *others: Any
) -> tuple[Any, ...]:
    kinds = ctx.kinds
    wants = Arguments(*ctx.needs_input_grad)
    needed = SEG * bool(wants.seg_logits)
    for kind in range(kinds):
        needed += cm_bit(kind) * bool(wants.cm_logits[kind]) + transition_bit(kind) * bool(wants.transition[kind])
    if not needed or (grad_loss is None and all(grad is None for grad in grad_losses)):
        return _inputs_like(ctx, None, [None] * kinds, [None] * kinds)
    incoming = (grad_loss, *grad_losses)
    if wrapped.has_tangent(incoming):
        raise RuntimeError(f"coarse_kernels: {_ONLY_REFERENCE.format('forward-mode derivatives of a gradient')}")
    saved = list(ctx.saved_tensors)
    anchor = saved.pop() if ctx.has_anchor else None
    formed = [saved.pop(0) for _ in range(1 + 2 * kinds)] if ctx.call.wanted else []
    own_losses = any(grad is not None for grad in grad_losses)
    if formed and not ctx.has_inputs and own_losses:
        # the one kind: its loss is the total over its weight
        own = grad_losses[0] / ctx.call.weight[0]  # type: ignore[operator]
        grad_loss, own_losses = own if grad_loss is None else grad_loss + own, False
    if formed and not own_losses:
        assert grad_loss is not None
        grads = _handed_out(operators, tuple(formed), grad_loss)
    else:
        grads = _recomputed(operators, ctx, saved, grad_loss, grad_losses, needed)
    if anchor is not None and torch.is_grad_enabled():  # create_graph=True: somebody may want to go on from here
        grads = tuple(_FirstDerivative.apply(grad, anchor, *incoming) for grad in grads)
    seg = grads[0] if needed & SEG else None
    cm = [grads[1 + k] if needed & cm_bit(k) else None for k in range(kinds)]
    transition = [grads[1 + kinds + k] if needed & transition_bit(k) else None for k in range(kinds)]
    return _inputs_like(ctx, seg, cm, transition)


def _inputs_like(
    ctx: Any, seg: Tensor | None, cm: list[Tensor | None], transition: list[Tensor | None]
) -> tuple[Any, ...]:
    """Gradients in the structure of the inputs, `Arguments`: without the anchor where it has been left out, as the graphs of
    torch.compile do with an argument that has its default.
    """
    none: Any = [None] * ctx.kinds
    lists: dict[str, Any] = {name: list(none) for name in _TENSOR_LISTS}
    lists |= {"cm_logits": cm, "transition": transition}
    grads = Arguments(seg_logits=seg, **lists, **dict.fromkeys(Arguments._fields[7:]))  # type: ignore[arg-type]
    return tuple(grads)[: len(ctx.needs_input_grad)]


def _handed_out(operators: Any, saved: tuple[Tensor, ...], grad_loss: Tensor) -> tuple[Tensor, ...]:
    """The gradients saved in forward, times ``grad_loss`` in the compute dtype: in the storage dtype the factor itself may be
    inf. They are given away, or scaled in place, only where nobody can ask for them again: under retain_graph a second
    backward would find them changed (by whoever owns them by then, ``param.grad`` first of all).
    """
    kept = _graph_is_kept()
    if not wrapped.readable(grad_loss):  # symbolic, or one of a batch of factors
        return tuple(_times(grad, grad_loss) for grad in saved)
    if grad_loss.device.type == "cpu":
        factor = grad_loss.item()
        if factor == 1.0 and not kept:
            return saved
        # a Python number is multiplied with in float32 whatever the gradient is stored in
        return tuple(grad * factor for grad in saved)
    if hasattr(operators, "scale_"):
        # The value is not known here without waiting for the device. A kernel looks, and mostly finds 1.
        saved = tuple(grad.clone() for grad in saved) if kept else saved
        for grad in saved:
            operators.scale_(grad, grad_loss.detach().to(compute_dtype(grad.dtype)))
        return saved
    return tuple(_times(grad, grad_loss) for grad in saved)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    dtype = compute_dtype(grad.dtype)
    return (grad.to(dtype) * factor.to(dtype)).to(grad.dtype) if grad.numel() else grad


def _graph_is_kept() -> bool:
    # A private function of autograd, the one that torch.compile uses for the same question. Without it: assume so.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _recomputed(
    operators: Any,
    ctx: Any,
    saved: list[Tensor],
    grad_loss: Tensor | None,
    grad_losses: list[Tensor | None],
    wanted: int,
) -> tuple[Tensor, ...]:
    kinds = ctx.kinds
    if any(wrapped.of_transform(g) for g in (grad_loss, *grad_losses) if g is not None):
        raise RuntimeError(f"coarse_kernels: {_ONLY_REFERENCE.format('batches of gradients')}")
    lists = {name: saved[1 + kinds * n : 1 + kinds * (n + 1)] for n, name in enumerate(_TENSOR_LISTS)}
    call: Arguments = ctx.call._replace(seg_logits=saved[0], **lists, wanted=wanted, per_pixel=False)
    if ctx.call.per_pixel:
        # losses are the maps w (nll + ...): their gradient is that of the sum with weights w * grad
        factors = [
            torch.zeros(labels.shape, dtype=_dtype_of(call), device=labels.device) if grad is None else grad.contiguous()
            for labels, grad in zip(call.labels, grad_losses, strict=True)
        ]
        weights = [
            pixel_weight * factor if present(pixel_weight) else factor
            for pixel_weight, factor in zip(call.pixel_weight, factors, strict=True)
        ]
        call = call._replace(pixel_weight=weights, weight=[1.0] * kinds)
    else:
        weight = list(call.weight)
        scales = []
        for kind, (scale, own) in enumerate(zip(call.scale, grad_losses, strict=True)):
            factor = grad_loss
            if own is not None:
                factor = own if grad_loss is None else grad_loss * weight[kind] + own
                weight[kind] = 1.0
            if factor is None:
                factor = torch.zeros((), dtype=_dtype_of(call), device=call.seg_logits.device)
            scales.append(scale * factor if present(scale) else factor)
        call = call._replace(scale=scales, weight=weight)
    out = Outputs(*operators.annotation_objective(*call))
    return (out.grad_seg, *out.grad_cm, *out.grad_transition)


def _dtype_of(call: Arguments) -> torch.dtype:
    return compute_dtype(call.seg_logits.dtype)


# --- registration -------------------------------------------------------------------------------------------------------


def define(namespace: str, *, single: bool) -> torch.library.Library:
    """The operators of a namespace: schemas, fake kernels, autograd. They live as long as what is returned. ``single``: with
    those that take one kind of drawings at a time."""
    library = torch.library.Library(namespace, "DEF")  # noqa: TOR901
    fakes: dict[str, Any] = {
        "annotation_objective": _objective_fake,
        "objective_posterior": _posterior_fake,
        "labelled_weight": _labelled_weight_fake,
        "label_map": _label_map_fake,
    }
    schemas = SCHEMAS
    if single:
        schemas = (*schemas, *SINGLE_SCHEMAS, SCALE)
        fakes |= {
            "annotation_nll": _nll_fake,
            "annotation_posterior": _single_posterior_fake,
            "trusted": _trusted_fake,
        }
    for schema in schemas:
        library.define(schema)
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    backward = functools.partial(_backward, getattr(torch.ops, namespace))
    torch.library.register_autograd(
        f"{namespace}::annotation_objective", backward, setup_context=_setup_context, lib=library
    )
    return library
