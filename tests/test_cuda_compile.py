"""The CUDA kernels through nvcc, without a GPU: `make check-cuda` as a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import check_cuda
from tests.check_cuda import ARCHITECTURES, Kernel

# Two kernels as ptxas -v (CUDA 13.0) reports them, the second with a spill.
LOG = """
ptxas info    : Compiling entry function '_ZN6coarse45_GLOBAL__N__2a15e9d5_12_pixel_f32_cu_1b58f40f10pixel_fastILi17ELi19ELNS_7StorageE2ELi1EEEvNS' for 'sm_90'
ptxas info    : Function properties for _ZN6coarse
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN6coarse43_GLOBAL__N__206ccc29_10_strided_cu_b823111312strided_fastILi13ELi16EEEvNS_5LayerIfEENS0_6TilingE' for 'sm_90'
ptxas info    : Function properties for _ZN6coarse
    24 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem
"""  # noqa: E501


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN6coarse45_GLOBAL__N__b1cd6d06_8_field_cu_9ce8a747_247513gather_kernelIdEEvNS_5LayerIT_EEl", "gather_kernel<d>"),
        ("_ZN6coarse45_GLOBAL__N__1field22_8_field_cu_12name34_247513gather_kernelIfEEvNS_5LayerIT_EEl", "gather_kernel<f>"),
        ("_ZN6coarse43_GLOBAL__N__206ccc29_10_strided_cu_b823111317strided_log_spaceENS_5LayerIfEE", "strided_log_space"),
        ("_Z5plainv", "_Z5plainv"),
    ],
)  # fmt: skip
def test_a_kernel_has_its_own_name_whatever_the_path_of_the_clone(mangled: str, name: str) -> None:
    """nvcc puts a hash of the file's path into the name: in one clone in a few it reads like an identifier."""
    assert check_cuda.readable(mangled) == name


def test_the_report_of_ptxas_is_read() -> None:
    kernels = check_cuda.parse(LOG, "90")
    assert kernels == [
        Kernel("90", "pixel_fast<17 to 19 classes, bf16, 1 a thread>", 48, 0, 0),
        Kernel("90", "strided_fast<13 to 16 classes>", 96, 64, 1024),
    ]
    assert all(kernel.fast for kernel in kernels)
    text = check_cuda.table(kernels)
    assert "96, 64 B spilt, 1024 B shared" in text


def test_a_report_without_figures_is_no_report() -> None:
    with pytest.raises(RuntimeError, match="ptxas says nothing of"):
        check_cuda.parse(LOG.replace("spill stores", "?"), "90")


@pytest.mark.parametrize(
    ("name", "status"),
    [("strided_fast<13 to 16 classes>", 1), ("strided_fast<20 classes>", 0), ("pixel_general<f>", 0)],
)
def test_a_spill_in_a_fast_path_fails_the_check(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "sources", lambda: [Path("one.cu")])
    monkeypatch.setattr(check_cuda, "compile_kernels", lambda nvcc, source, arch, host: [Kernel(arch, name, 96, 8, 0)])
    monkeypatch.setattr(check_cuda, "compile_glue", lambda: "glue")
    out = tmp_path / "table.txt"
    assert check_cuda.main(["--arch", "90", "--out", str(out)]) == status
    assert "96, 8 B spilt" in out.read_text()
    assert (f"{name} on sm_90 spills 8 bytes" in capsys.readouterr().err) == bool(status)


def test_without_nvcc_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: None)
    assert check_cuda.main([]) == 2
    assert "no nvcc found" in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.skipif(check_cuda.find_nvcc() is None, reason="no nvcc on this machine")
def test_every_kernel_compiles_and_no_fast_path_spills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """About four minutes on two cores: every kernel, three architectures."""
    out = tmp_path / "table.txt"
    status = check_cuda.main(["--out", str(out)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    text = out.read_text()
    assert all(f"sm_{arch}" in text for arch in ARCHITECTURES)
    for name in (
        "pixel_fast<2 to 4 classes, f32, 4 a thread>",
        "pixel_fast<20 to 21 classes, bf16, 1 a thread>",
        "strided_fast<2 to 4 classes>",
        "strided_fast<20 classes>",
        "pixel_general",
        "gather_kernel",
        "trusted_pixels<f32, pixel grid, 1 layers>",
        "trusted_gather<bf16, one layer, 4 classes>",
        "trusted_labels<f16, coarser grid>",
    ):
        assert name in text
    assert "ops_cuda.cpp compiles" in text
