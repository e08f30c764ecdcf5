"""Memory of the CPU backend's large results (4 MB and more): gradients of fields above all.

glibc gives a large block back to the system as it is freed, so that the gradient of every step would be made of new pages, each
of them cleared by the system as it is first touched, which takes longer than to compute the gradient. So blocks come back here
when their tensor dies, whoever held it, and wait for the next result of that size; new ones are of huge pages where the system
has them. What waits is at most `pool_limit`, 256 MB at first; COARSE_KERNELS_POOL_MB sets another limit, 0 switches it off.
PyTorch's other CPU tensors cannot use what waits: see `empty_pool`. The storage of such a result cannot be resized, as that of
`torch.from_numpy` cannot: whoever frees gradients by `untyped_storage().resize_(0)` switches the pool off.
"""

from __future__ import annotations

import numbers
import os

from . import native

VARIABLE = "COARSE_KERNELS_POOL_MB"
_MB = 1 << 20


def pool_limit() -> int:
    """Bytes that may wait; 0: there is no pool, here or at all."""
    return 0 if native.OPERATORS is None else int(native.OPERATORS.pool_limit())


def set_pool_limit(megabytes: float) -> None:
    """Of large CPU results (4 MB and more) that nobody holds any more at most so much waits for its next use, from now on.

    Without compiled kernels nothing happens. The environment variable COARSE_KERNELS_POOL_MB does the same at the start.

    Args:
        megabytes: of 2^20 bytes; 0 switches the pool off. It is 256 at first.

    Raises:
        ValueError: for what is no number >= 0.
    """
    if isinstance(megabytes, bool) or not isinstance(megabytes, numbers.Real) or not 0 <= megabytes < 1 << 40:
        raise ValueError(f"megabytes: expected a number >= 0, got {megabytes!r}")
    if native.OPERATORS is not None:
        native.OPERATORS.pool_limit(int(megabytes * _MB))


def pool_bytes() -> int:
    """Bytes of large CPU results that nobody holds any more and that wait for the next result of their size."""
    return 0 if native.OPERATORS is None else int(native.OPERATORS.pool_bytes())


def empty_pool() -> None:
    """Give all that waits (`pool_bytes`) back to the system: before something else needs the memory."""
    if native.OPERATORS is not None:
        native.OPERATORS.empty_pool()


def _from_environment() -> None:
    text = os.environ.get(VARIABLE)
    if not text:
        return
    try:
        set_pool_limit(float(text))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: expected a number of megabytes >= 0, got {text!r}") from error


_from_environment()
