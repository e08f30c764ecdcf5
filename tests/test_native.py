"""The compiled code seen from NumPy: exp and log in ULP, interpolation, one pixel; and every instruction set."""

from __future__ import annotations

import importlib
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import coarse_kernels
from coarse_kernels import native
from tests.helpers import run_python

pytestmark = pytest.mark.skipif(native.TOOLS is None, reason=f"not built: {native.TOOLS_ERROR}")
tools: Any = native.TOOLS


def ulp_error(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units in the last place of the float32 nearest to the exact value."""
    assert ours.dtype == np.float32
    return np.abs(ours.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


# --- exp and log ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-87.3365, 88.0), (-1.0, 1.0), (-1e-3, 1e-3), (-40.0, -20.0)])
def test_exp_is_within_its_stated_error(low: float, high: float) -> None:
    x = np.linspace(low, high, 1_000_003, dtype=np.float32)
    x = x[x >= np.float32(tools.EXP_FLUSH)]
    error = ulp_error(tools.exp(x), np.exp(x.astype(np.float64)))
    assert error.max() <= tools.EXP_ULP, x[error.argmax()]


def test_exp_of_every_float_near_a_half_multiple_of_log_2() -> None:
    """Where the reduction changes its integer, the rounding of it could go either way."""
    centres = (np.arange(-250, 253) + 0.5) / 2 * np.log(2)
    x = np.concatenate([np.float32(c) + np.arange(-50, 51) * np.spacing(np.float32(abs(c))) for c in centres])
    x = x.astype(np.float32)
    x = x[(x >= np.float32(tools.EXP_FLUSH)) & (x <= 88)]
    assert ulp_error(tools.exp(x), np.exp(x.astype(np.float64))).max() <= tools.EXP_ULP


def test_exp_flushes_to_zero_below_its_limit() -> None:
    flush = np.float32(tools.EXP_FLUSH)
    below = np.concatenate([[np.nextafter(flush, np.float32(-np.inf))], -np.geomspace(87.34, 3e38, 1000), [-np.inf]])
    result = tools.exp(below.astype(np.float32))
    assert (result == 0).all()
    assert not np.signbit(result).any()
    (limit,) = tools.exp(np.array([flush]))
    assert limit >= np.finfo(np.float32).tiny * 0.999


def test_exp_keeps_nan_and_the_exact_values() -> None:
    result = tools.exp(np.array([np.nan, 0.0, -0.0, 1e-30, -1e-45], dtype=np.float32))
    assert np.isnan(result[0])
    assert (result[1:] == 1).all()


@pytest.mark.parametrize(("low", "high"), [(1.2e-38, 3.4e38), (0.5, 2.0), (0.999, 1.001), (1e-30, 1.0)])
def test_log_is_within_its_stated_error(low: float, high: float) -> None:
    x = np.geomspace(low, high, 1_000_003).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    error = np.where(exact == 0, np.abs(tools.log(x)), ulp_error(tools.log(x), exact))
    assert error.max() <= tools.LOG_ULP, x[error.argmax()]


def test_log_of_every_float_near_one() -> None:
    one = np.float32(1).view(np.int32)
    x = np.arange(one - 20000, one + 20001, dtype=np.int32).view(np.float32)
    exact = np.log(x.astype(np.float64))
    error = np.where(exact == 0, np.abs(tools.log(x)), ulp_error(tools.log(x), exact))
    assert error.max() <= tools.LOG_ULP


def test_log_at_the_edges() -> None:
    result = tools.log(np.array([0.0, -0.0, 1.0, np.inf, np.nan], dtype=np.float32))
    assert (result[:4] == [-np.inf, -np.inf, 0.0, np.inf]).all()
    assert np.isnan(result[4])


@pytest.mark.parametrize("size", [0, 1, 3, 15, 16, 17, 33, 100])
def test_arrays_of_any_length_and_shape(size: int) -> None:
    x = np.linspace(-3, 3, size, dtype=np.float32)
    np.testing.assert_allclose(tools.exp(x), np.exp(x), rtol=1e-6)
    assert tools.exp(x[::-1].reshape(1, -1)).shape == (1, size)
    np.testing.assert_array_equal(tools.exp(x[::-1]), tools.exp(x)[::-1])


# --- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("grid", "pixels"),
    [(1, 1), (1, 7), (2, 2), (2, 3), (3, 100), (4, 16), (5, 33), (7, 8), (99, 100), (100, 1001), (255, 2048), (31, 31)],
)
def test_linear_taps_are_those_of_f_interpolate(grid: int, pixels: int, wide: bool) -> None:
    """Each unit vector of the grid, interpolated by PyTorch, is the column of weights of that point."""
    i0, i1, weight = tools.linear_taps(grid, pixels, wide)
    assert ((i0 >= 0) & (i0 <= i1) & (i1 < grid) & (i1 - i0 <= 1) & (weight >= 0) & (weight <= 1)).all()
    matrix = np.zeros((pixels, grid))
    np.add.at(matrix, (np.arange(pixels), i0), 1 - weight)
    np.add.at(matrix, (np.arange(pixels), i1), weight)
    units = torch.eye(grid, dtype=torch.float64 if wide else torch.float32)[None]
    expected = F.interpolate(units, size=pixels, mode="linear", align_corners=False)[0].T.double().numpy()
    # float: PyTorch's coordinate and ours are rounded at the size of the coordinate
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-12 if wide else 2e-7 * grid)
    ramp = torch.arange(grid, dtype=torch.float64)[None, None]
    exact = F.interpolate(ramp, size=pixels, mode="linear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(i0 + weight * (i1 - i0), exact, rtol=1e-12 if wide else 3e-7, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("grid", "pixels"), [(1, 1), (1, 7), (2, 3), (7, 8), (31, 31), (99, 100), (255, 2048), (5000, 9001), (29999, 30000)]
)
def test_exact_taps_are_fractions_rounded_once(grid: int, pixels: int, wide: bool) -> None:
    """Wherever on the axis: the fraction of a float32 coordinate is 1e-3 off at the end of the last one."""
    i0, i1, weight = tools.linear_taps(grid, pixels, wide, exact=True)
    # of a quotient in double, rounded again where it is not wanted so exactly
    roundoff = float(np.finfo(np.float64 if wide else np.float32).eps) / 2 * (1 + 1e-8)
    for k in {*range(0, pixels, max(1, pixels // 500)), *range(max(0, pixels - 20), pixels)}:
        position = max(Fraction(0), Fraction((2 * k + 1) * grid, 2 * pixels) - Fraction(1, 2))
        assert i0[k] == position // 1
        assert i1[k] == (i0[k] if grid == pixels else min(i0[k] + 1, grid - 1))
        assert abs(Fraction(float(weight[k])) - position % 1) <= position % 1 * Fraction(roundoff)


@pytest.mark.parametrize(("grid", "pixels"), [(0, 3), (4, 3), (-1, 3)])
def test_linear_taps_of_no_grid(grid: int, pixels: int) -> None:
    with pytest.raises(ValueError, match="grid"):
        tools.linear_taps(grid, pixels)


# --- one pixel --------------------------------------------------------------------------------------------------------


def pixel(seg: np.ndarray, cm: np.ndarray, reported: np.ndarray, trace_weight: float) -> dict[str, Any]:
    """The equations in NumPy float64, in log space."""
    seg, cm, reported = (x.astype(np.float64) for x in (seg, cm, reported))
    with np.errstate(divide="ignore"):
        log_t = np.log(reported)
    log_p = seg - np.logaddexp.reduce(seg)
    log_a = cm - np.logaddexp.reduce(cm, axis=0)
    joint = log_a + log_t[:, None]
    log_q = np.logaddexp.reduce(joint, axis=0)
    log_d = np.logaddexp.reduce(log_p + log_q)
    p, a, r = np.exp(log_p), np.exp(log_a), np.exp(log_p + log_q - log_d)
    diagonal = np.diag(a)
    return {
        "nll": -log_d,
        "trace": diagonal.sum(),
        "p": p,
        "posterior": r,
        "cm_gradient": r * (a - np.exp(joint - log_q)) + trace_weight * diagonal * (np.eye(len(p)) - a),
        "transition_gradient": -np.exp(np.logaddexp.reduce(log_a + log_p, axis=1) - log_d),
    }


@pytest.mark.parametrize("name", ["pixel_f32", "pixel_f64"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 19])
def test_one_pixel(classes: int, scale: float, name: str) -> None:
    """Floors: of the dtype, times the logit scale, at which a logit is known to that much."""
    rng = np.random.default_rng(classes)
    dtype = np.float32 if name == "pixel_f32" else np.float64
    tolerance = 30 * float(np.finfo(dtype).eps) * max(1.0, scale)
    for turn in range(20):
        seg, cm = scale * rng.standard_normal(classes), scale * rng.standard_normal((classes, classes))
        seg, cm = seg.astype(dtype), cm.astype(dtype)
        reported = rng.random(classes).astype(dtype) if turn % 2 else np.eye(classes, dtype=dtype)[turn % classes]
        before = seg.copy(), cm.copy()
        ours = getattr(tools, name)(seg, cm, reported, 0.1)
        assert (seg == before[0]).all()
        assert (cm == before[1]).all(), "the caller's logits are written to"
        expected = pixel(seg, cm, reported, float(dtype(0.1)))
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            difference = np.abs(np.asarray(ours[key], np.float64) - value).max()
            assert difference <= tolerance * max(1.0, float(np.abs(value).max())), key


@pytest.mark.parametrize("name", ["pixel_f32", "pixel_f64"])
def test_one_pixel_at_the_edges(name: str) -> None:
    run = getattr(tools, name)
    seg, cm = np.zeros(3), np.zeros((3, 3))
    impossible = run(seg, cm, np.zeros(3), 0.1)
    assert impossible["nll"] == np.inf
    np.testing.assert_allclose(impossible["posterior"], np.full(3, 1 / 3), rtol=1e-6)
    assert (impossible["cm_gradient"] == 0).all()
    assert (impossible["transition_gradient"] == 0).all()
    assert np.isnan(run(np.array([np.nan, 0, 0]), cm, np.ones(3), 0.0)["nll"])
    cm[1, 2] = np.nan
    assert np.isnan(run(seg, cm, np.ones(3), 0.0)["nll"])
    masked = run(np.array([0.0, -np.inf, 0.0]), np.zeros((3, 3)), np.array([1.0, 0, 0]), 0.0)
    assert masked["nll"] == pytest.approx(np.log(3))
    assert masked["p"].tolist() == pytest.approx([0.5, 0, 0.5])
    assert np.isfinite(masked["cm_gradient"]).all()


def test_one_pixel_of_the_wrong_shape() -> None:
    for arguments in (
        (np.zeros(3), np.zeros((3, 2)), np.zeros(3)),
        (np.zeros((3, 1)), np.zeros((3, 3)), np.zeros(3)),
        (np.zeros(3), np.zeros((3, 3)), np.zeros(2)),
    ):
        with pytest.raises(ValueError, match="seg_logits"):
            tools.pixel_f32(*arguments)


# --- facts and ceilings -----------------------------------------------------------------------------------------------

ISAS = {"baseline": 16, "avx2": 32, "avx512": 64}


def test_cpu_and_build_info() -> None:
    info = tools.cpu_info()
    assert info["isa"] in info["supported"]
    assert info["supported"][0] == "baseline"
    assert set(info["supported"]) <= set(ISAS)
    assert info["simd_bytes"] == ISAS[info["isa"]]
    build = tools.build_info()
    assert build["compiler"].split()[0] in ("gcc", "clang")
    assert build["cxx_standard"] >= 202002
    assert build["architecture"] in ("x86_64", "aarch64", "other")


@pytest.mark.slow
def test_the_first_call_in_a_fresh_process() -> None:
    """It fetches the kernels from the other module, which may not be imported yet: with the lock released it crashed."""
    calls = ("copy_bandwidth(8, 3)", "read_bandwidth(8, 3)", "exp_throughput(3)", "fma_throughput(3)", "exp([0.0])")
    script = f"""
        import os
        import torch  # once for all; of coarse_kernels each child knows nothing
        for call in {(*calls, "cpu_info()")}:
            if (child := os.fork()) == 0:
                import coarse_kernels._native as m
                print(call, eval("m." + call), flush=True)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, call
    """
    done = run_python(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    assert all(f"{call} " in done.stdout for call in calls)


def test_ceilings_are_plausible() -> None:
    assert 1e8 < tools.copy_bandwidth(16, 3) < 1e13
    assert 1e6 < tools.exp_throughput(3) < 1e12
    for call in (
        lambda: tools.copy_bandwidth(0, 3),
        lambda: tools.copy_bandwidth(1, 0),
        lambda: tools.exp_throughput(0),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


# --- every instruction set --------------------------------------------------------------------------------------------

DIFFERENTIAL = """
import torch
from coarse_kernels import native
from tests.helpers import check, make_problem
from tests import test_native
isa = {isa!r}
info = native.TOOLS.cpu_info()
assert info["isa"] == isa, info
assert info["simd_bytes"] == test_native.ISAS[isa], info
torch.use_deterministic_algorithms(True)
turn = 0
for classes, size, grid, cm_batch in (
    (2, (9, 31), None, 2), (3, (16, 24), None, 2), (5, (3, 33), None, 1), (19, (4, 32), None, 2), (3, (1, 1), None, 2),
    (4, (23, 37), (4, 6), 2), (3, (20, 18), (5, 18), 1), (3, (140, 6), (2, 3), 2), (2, (3, 5, 19), (2, 3, 7), 2),
    (3, (16, 28), (1, 1), 1), (3, (10, 22), (5, 11), 2),
):
    for stream in ("positive", "random"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for scale in (3.0, 30.0):
                turn += 1
                problem = make_problem(classes, size, grid, cm_batch=cm_batch, stream=stream, scale=scale, seed=turn,
                                       trace_weight=0.1, learn_transition=scale < 30)
                floor = 3e-6 if dtype == torch.float32 and scale > 10 else None
                check(problem.to(dtype), "cpu", ("one_pass", "recompute")[turn % 2],
                      1024.0 if dtype == torch.float16 else None, gradient_floor=floor)
test_native.test_exp_is_within_its_stated_error(-87.3365, 88.0)
test_native.test_log_is_within_its_stated_error(1.2e-38, 3.4e38)
test_native.test_exp_flushes_to_zero_below_its_limit()
test_native.test_exp_keeps_nan_and_the_exact_values()
test_native.test_log_at_the_edges()
print("checked", turn)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_that_this_machine_runs(isa: str) -> None:
    if isa not in tools.cpu_info()["supported"]:
        pytest.skip(f"this machine has no {isa}")
    done = run_python(DIFFERENTIAL.format(isa=isa), COARSE_KERNELS_ISA=isa, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("checked")


# --- the binary -------------------------------------------------------------------------------------------------------


def operators_path() -> Path:
    assert native.OPERATORS is not None
    assert native.OPERATORS.__file__ is not None
    return Path(native.OPERATORS.__file__)


def test_the_operators_use_only_the_stable_abi() -> None:
    audit = pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed (extra `test`)")
    report = audit.inspect_extension(operators_path())
    assert report.error is None
    assert report.torch.uses_torch
    assert report.torch.stable, report
    minimum = tuple(int(part) for part in report.torch.min_torch_version.split(".")[:2])
    assert minimum <= (2, 11), "setup.py and pyproject.toml promise torch 2.11"


def test_the_operators_fit_many_pythons() -> None:
    """py_limited_api: the file name says abi3, and the symbols agree."""
    assert operators_path().name.endswith((".abi3.so", ".pyd"))
    audit = pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed (extra `test`)")
    package = audit.inspect_package(str(operators_path()))
    assert package.torch_verdict == "torch-stable"
    assert not package.has_error


def test_the_tools_have_no_torch_in_them() -> None:
    """_native imports without torch, and where torch cannot be imported at all it still knows its own functions."""
    assert tools.__file__ is not None
    audit = pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed (extra `test`)")
    assert not audit.inspect_extension(Path(tools.__file__)).torch.uses_torch


def test_loading_twice_is_the_same_module() -> None:
    assert importlib.import_module("coarse_kernels._C") is sys.modules["coarse_kernels._C"]
    assert coarse_kernels.native.operators_reason() is None
