"""Memory of the CPU backend's large results: it comes back, it is bounded, and nobody who holds a result notices."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import native, pool
from tests.helpers import run_python

pytestmark = pytest.mark.skipif(native.OPERATORS is None, reason="the compiled extension is missing")

MB = 1 << 20
SIZE = (64, 64)  # C = 19: a field of 5.6 MB


@pytest.fixture(autouse=True)
def an_empty_pool() -> Iterator[None]:
    before = pool.pool_limit()
    ck.empty_pool()
    yield
    ck.set_pool_limit(before / MB)
    ck.empty_pool()


def inputs(size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seg, cm = (torch.randn(1, *c, *size, generator=generator).requires_grad_() for c in ((19,), (19, 19)))
    return seg, cm, torch.randint(0, 19, (1, *size), dtype=torch.uint8, generator=generator)


def gradient(size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    seg, cm, labels = inputs(size, seed)
    (found,) = torch.autograd.grad(ck.annotation_nll(seg, cm, labels, backend="cpu").loss, (cm,))
    return found


def test_a_gradient_is_made_where_the_last_one_died() -> None:
    first = gradient()
    place, values = first.data_ptr(), first.clone()
    assert ck.pool_bytes() == 0
    del first
    assert ck.pool_bytes() == 6 * MB  # in pages of 2 MB
    again = gradient()
    assert (again.data_ptr(), ck.pool_bytes()) == (place, 0)
    assert torch.equal(again, values)
    other = gradient(seed=1)
    assert other.data_ptr() != place
    assert torch.equal(again, values)


def test_whoever_holds_a_part_of_it_holds_all_of_it() -> None:
    first = gradient()
    part, detached, value = first[0, 3, 4], first.detach(), first[0, 3, 4].clone()
    del first
    assert ck.pool_bytes() == 0
    del detached
    gradient(seed=1)
    assert torch.equal(part, value)
    waiting = ck.pool_bytes()
    del part
    assert ck.pool_bytes() == waiting + 6 * MB


def test_small_results_are_none_of_its_business() -> None:
    del_me = gradient((16, 16))
    del del_me
    assert ck.pool_bytes() == 0


def test_what_waits_is_bounded_and_the_oldest_goes_first() -> None:
    ck.set_pool_limit(15)
    a, b, c = gradient((64, 64)), gradient((64, 72)), gradient((64, 64), seed=1)
    places = [t.data_ptr() for t in (a, b, c)]
    del a
    del b
    assert ck.pool_bytes() == 14 * MB
    del c
    assert ck.pool_bytes() == 14 * MB
    assert gradient((64, 64)).data_ptr() == places[2]
    ck.set_pool_limit(7)
    assert ck.pool_bytes() <= 7 * MB
    ck.empty_pool()
    assert (ck.pool_bytes(), pool.pool_limit()) == (0, 7 * MB)
    ck.set_pool_limit(5)
    gradient()
    assert ck.pool_bytes() == 0


def test_it_can_be_switched_off() -> None:
    ck.set_pool_limit(0)
    gradient()
    assert ck.pool_bytes() == 0
    assert "pool of large CPU results: 0 of at most 0 bytes" in _report()


def _report() -> str:
    from coarse_kernels.env_report import report

    return report()


@pytest.mark.parametrize("value", [-1, "12", True, float("nan")])
def test_a_limit_that_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="megabytes: expected a number >= 0"):
        ck.set_pool_limit(value)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_environment_sets_the_limit() -> None:
    code = "import coarse_kernels as ck; from coarse_kernels import pool; print(pool.pool_limit())"
    assert run_python(code, COARSE_KERNELS_POOL_MB="3").stdout.strip() == str(3 * MB)
    assert run_python(code, COARSE_KERNELS_POOL_MB="0").stdout.strip() == "0"
    assert "COARSE_KERNELS_POOL_MB: expected" in run_python(code, COARSE_KERNELS_POOL_MB="much").stderr


def test_a_gradient_is_a_tensor_like_any_other() -> None:
    found = gradient()
    assert found.is_contiguous()
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    values = found.clone()
    assert torch.equal(copy.deepcopy(found), values)
    assert torch.equal(found.share_memory_(), values)
    assert torch.equal(torch.from_numpy(found.numpy()), values)
    found.mul_(2)
    assert torch.equal(found, 2 * values)
    seg, cm, labels = inputs()
    for _ in range(2):  # accumulated in .grad
        ck.annotation_nll(seg, cm, labels, backend="cpu").loss.backward()
    assert cm.grad is not None
    assert torch.equal(cm.grad, 2 * values)
    with torch.inference_mode():
        posterior = ck.annotation_posterior(*(t.repeat(1, *[1] * (t.ndim - 3), 4, 8) for t in inputs()), backend="cpu")
    assert posterior.is_inference()
    assert posterior.sum(1).allclose(torch.ones(()))


@pytest.mark.slow
def test_half_storage_and_coarse_grids() -> None:
    seg, _, labels = inputs((256, 256))
    cm = torch.randn(1, 19, 19, 64, 64).bfloat16().requires_grad_()
    for _ in range(2):
        loss = ck.annotation_nll(seg, cm, labels, backend="cpu").loss
        truth = ck.annotation_nll(seg, cm, labels, backend="reference").loss
        found = torch.autograd.grad(loss, (seg, cm))
        for own, true in zip(found, torch.autograd.grad(truth, (seg, cm)), strict=True):
            assert (own.float() - true.float()).norm() < 4e-3 * true.float().norm()


def test_threads_do_not_get_the_same_memory() -> None:
    truth = [gradient(seed=seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(8):
            if not torch.equal(gradient(seed=seed), truth[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_its_own() -> None:
    code = """
import os, torch, coarse_kernels as ck
from tests.test_pool import gradient
torch.set_num_threads(1)
values = gradient().clone()
assert ck.pool_bytes() > 0
child = os.fork()
same = torch.equal(gradient(), values)
if child == 0:
    os._exit(0 if same and ck.pool_bytes() > 0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""
    assert run_python(code).stdout.split() == ["0", "True"]


@pytest.mark.slow
def test_a_gradient_outlives_the_end_of_the_interpreter() -> None:
    code = "from tests.test_pool import gradient; import builtins; builtins.kept = gradient(); print('made')"
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("made", 0)


@pytest.mark.slow
def test_compiled_steps_reuse_it_too() -> None:
    seg, cm, labels = inputs()
    step = torch.compile(lambda s, a: ck.annotation_nll(s, a, labels, backend="cpu").loss * 2.0, backend="aot_eager")
    truth = gradient()
    for _ in range(3):
        (found,) = torch.autograd.grad(step(seg, cm), (cm,))
        torch.testing.assert_close(found, 2 * truth)
        del found
    assert 0 < ck.pool_bytes() <= 24 * MB


def test_a_storage_that_has_to_be_resized_needs_the_pool_switched_off() -> None:
    with pytest.raises(RuntimeError, match="not resizable"):
        gradient().untyped_storage().resize_(0)
    ck.set_pool_limit(0)
    gradient().untyped_storage().resize_(0)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no way to limit memory and to look at it")
def test_out_of_memory_says_how_much_and_gives_back_what_waits() -> None:
    code = """
import resource
import coarse_kernels as ck, torch
from tests.test_pool import gradient, inputs
torch.set_num_threads(1)
seg, cm, labels = inputs((448, 448))
gradient((256, 256)), gradient((192, 192))
assert ck.pool_bytes() > 140 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    ck.annotation_nll(seg, cm, labels, backend="cpu")
except RuntimeError as error:
    print("a result of" in str(error), ck.pool_bytes() < 20 << 20)  # the class gradient's, which came first
"""
    done = run_python(code)
    assert done.stdout.split() == ["True", "True"], done.stderr
