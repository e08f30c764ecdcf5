"""Tensors that are more than their values: subclasses, traces, and those of PyTorch's function transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

_functorch = torch._C._functorch


def plain(tensor: Tensor) -> Tensor:
    """A subclass that only adds to a tensor (torchvision's ``Mask``, MONAI's ``MetaTensor``) without what it adds: the same
    values, differentiable. One with operators of its own (``__torch_dispatch__``: fake, distributed, ...) as it is.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or _has_own_operators(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():  # or the result would be made a subclass again
        return tensor.as_subclass(Tensor)


def _has_own_operators(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_distributed(tensor: Tensor) -> bool:
    """A `torch.distributed.tensor.DTensor`, whose module is imported only by those who have one."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) and any(
        k.__name__ == "DTensor" for k in type(tensor).__mro__
    )


def readable(tensor: Tensor) -> bool:
    """Whether it has values that can be looked at now: it belongs to no trace and to no transform."""
    return not (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or _has_own_operators(tensor)
        or of_transform(tensor)
        or torch._is_functional_tensor(tensor)
    )


def of_transform(tensor: Tensor) -> bool:
    """Of torch.func, or of the older vmap that autograd's ``is_grads_batched`` uses."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def mode_active() -> bool:
    """Whether a mode (of a trace, say) sees operators: a value that is looked at then is in no trace."""
    return torch._C._len_torch_dispatch_stack() > 0


def underneath(tensor: Tensor) -> Tensor:
    """Without the wrappers of torch.func's derivatives (grad, jvp), which have the same values; vmap's stays."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def unseen() -> contextlib.AbstractContextManager[object]:
    """Where values are looked at, or constants prepared, of tensors that belong to no transform: no mode (of a trace, say,
    which would make them symbols) and no transform (which would make even theirs its own) sees it."""
    return _unseen() if mode_active() or inside_a_transform() else contextlib.nullcontext()


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


def inside_a_transform() -> bool:
    return _functorch.get_dynamic_layer_stack_depth() > 0


# torch 2.11 cannot trace it; tensors of a transform are guarded on as such. What torch.compiler.assume_constant_result does,
# without its import of the compiler, which takes seconds.
inside_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed(tensors: Iterable[Tensor | None]) -> str | None:
    """The transform that a fused operator would not be seen by, or None."""
    if inside_a_transform():
        return "torch.func (vmap, grad, jvp, ...)"
    if has_tangent(tensors):
        return "forward-mode derivatives"
    return None


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(  # a trace does not show which
        forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
        if isinstance(t, Tensor) and t.is_floating_point()
    )
