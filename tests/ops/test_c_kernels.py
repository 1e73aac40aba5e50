"""Tests that the C kernels compute what plain torch does for every shape, and that a missing library says why."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_awq_linear
from torch import Tensor

from hf_awq_offload import ConfigError, ops
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.ops import c_backend, c_library, dispatch, torch_backend

KERNELS = c_library.library()
pytestmark = pytest.mark.skipif(isinstance(KERNELS, str), reason=str(KERNELS))

BACKEND, TORCH = c_backend.BACKEND, torch_backend.BACKEND
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_packed(groups: int, group_size: int, width: int, scale_dtype=torch.float16, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scales = (torch.rand(groups, 8 * width, generator=generator) / 10).to(scale_dtype)
    return PackedWeight(words(groups * group_size, width), words(groups, width), scales)


def assert_product_is_right(packed: PackedWeight, rows: int) -> None:
    """Asserts that the product equals, up to fp32 rounding, the fp64 product with plain torch's dequantized weight."""
    x = torch.randn(rows, packed.qweight.shape[0], generator=torch.Generator().manual_seed(1))
    weight = TORCH.dequantize(packed, torch.float64)
    bound = (
        x.double().abs() @ weight.abs().t() + x.double().abs().sum(1, keepdim=True) * 15 * packed.scales.double().max()
    )
    error = (c_backend.product(x, packed) - x.double() @ weight.t()).abs()
    assert float((error / bound).max()) < 8 * torch.finfo(torch.float32).eps


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 8, 16, 20, 24, 32, 48, 64, 96, 128, 160]),
    width=st.integers(1, 40),
    rows=st.integers(1, 20),
    threads=st.integers(1, 3),
    cache_bytes=st.sampled_from([1, 2**12, 2**17]),
)
def test_products_of_every_shape_however_they_are_divided(groups, group_size, width, rows, threads, cache_bytes):
    packed = random_packed(groups, group_size, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_backend, "_threads", lambda work, work_per_thread: threads)
        patch.setattr(c_backend, "CACHE_BYTES", cache_bytes)
        assert_product_is_right(packed, rows)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_scales_of_every_dtype_that_checkpoints_have(scale_dtype, rows):
    assert_product_is_right(random_packed(2, 64, 12, scale_dtype), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "group_size", "width"), [(3, 32, 5), (1, 160, 16), (2, 96, 70), (2, 20, 3), (5, 1, 2), (1, 300, 17)]
)
def test_dequantized_to_the_bit_as_by_plain_torch(groups, group_size, width, scale_dtype, dtype):
    packed = random_packed(groups, group_size, width, scale_dtype)
    weight = BACKEND.dequantize(packed, dtype)
    expected = TORCH.dequantize(packed, dtype)
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_that_are_no_ordinary_numbers(dtype):
    bits = torch.tensor(
        [0x0001, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7E00, 0x7FFF, 0x8000, 0x8001, 0xFC00], dtype=torch.int32
    )
    scales = bits.to(torch.int16).view(torch.float16).repeat(8).view(1, 80)
    packed = random_packed(1, 32, 10)._replace(scales=scales)
    expected = TORCH.dequantize(packed, dtype)
    torch.testing.assert_close(BACKEND.dequantize(packed, dtype), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_are_rounded_to_nearest_at_every_size(dtype):
    """Covers values that round to 0, subnormal numbers, infinity, and values halfway between two numbers."""
    exponents = torch.arange(-40, 24).repeat_interleave(16)
    digits = 1 + torch.arange(16).repeat(64) / 2**11
    packed = random_packed(1, 64, 128, torch.float32)._replace(scales=torch.ldexp(digits, exponents)[None])
    assert torch.equal(BACKEND.dequantize(packed, dtype), TORCH.dequantize(packed, dtype))


@pytest.mark.parametrize("rows", [1, 5])
def test_tensors_at_any_address(rows):
    """In a mapped checkpoint a tensor begins wherever the previous one ends."""
    packed = random_packed(2, 64, 9)

    def moved(tensor: Tensor) -> Tensor:
        memory = bytearray(tensor.nbytes + 2)
        memory[2:] = tensor.numpy().tobytes()
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=2).view(tensor.shape)

    odd = PackedWeight(*map(moved, packed))
    assert odd.qweight.data_ptr() % 4 == 2
    x = torch.randn(rows, 128)
    assert torch.equal(c_backend.product(x, odd), c_backend.product(x, packed))
    assert torch.equal(BACKEND.dequantize(odd, torch.float32), BACKEND.dequantize(packed, torch.float32))


def test_views_of_larger_tensors_are_read_as_what_they_show():
    whole = random_packed(2, 32, 12)
    part = PackedWeight(whole.qweight[:, 2:8], whole.qzeros[:, 2:8], whole.scales[:, 16:64])
    x = torch.randn(3, 64)
    torch.testing.assert_close(BACKEND.linear(x, part), BACKEND.linear(x, whole)[:, 16:64])


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_many_rows_agree_with_few(threads, monkeypatch):
    """More threads get larger blocks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    packed = random_packed(2, 64, 80)
    x = torch.randn(c_backend.FEW_ROWS[torch.float32] + 1, 128)
    torch.testing.assert_close(BACKEND.linear(x, packed), c_backend.product(x, packed), rtol=1e-5, atol=1e-4)


def test_without_a_product_layout_nothing_is_rearranged():
    linear = random_awq_linear(256, 128, group_size=64)
    before = linear.qweight
    linear(torch.randn(2, 256))
    assert linear.native_words is None
    assert linear.qweight is before


# -- compiled for other CPUs -----------------------------------------------------------------------------------------


def compile_for(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Compiles the sources to objects in `folder`."""
    sources = [Path(c_library.__file__).parent / c_library.FOLDER / name for name in c_library.SOURCES]
    own = [flag for flag in c_library.FLAGS if not flag.startswith("-march")]
    command = [*c_library.find_compiler(), *own, "-Wall", "-Wextra", "-Werror", *flags, "-c"]
    command += [source for source in sources if source.suffix == ".c"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif("x86" not in os.uname().machine, reason="the flags name x86 CPUs")
@pytest.mark.parametrize("cpu", ["x86-64", "haswell", "skylake-avx512", "icelake-server", "znver3"])
def test_it_compiles_without_warnings_for_other_cpus(cpu, tmp_path):
    result = compile_for(tmp_path, f"-march={cpu}", "-Wno-psabi")  # such functions are inlined
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif("x86" not in os.uname().machine, reason="the flags name x86 CPUs")
@pytest.mark.parametrize("flags", [["-march=x86-64"], ["-march=native", "-DWIDE_LANES=16"]], ids=["SSE2", "16 lanes"])
def test_vectors_of_another_width_give_the_same(flags, tmp_path, monkeypatch):
    """The code for AVX-512 multiplies 16 numbers at a time; on other CPUs it compiles to two instructions instead."""
    assert compile_for(tmp_path, *flags, "-Wno-psabi").returncode == 0
    command = [*c_library.find_compiler(), "-shared", *tmp_path.glob("*.o"), "-o", "other.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    other = c_library._open(tmp_path / "other.so")
    monkeypatch.setattr(c_backend, "library", lambda: other)
    for rows in (1, 2, 6, 7, 13):
        assert_product_is_right(random_packed(3, 32, 21), rows)
    packed = random_packed(2, 64, 30)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(BACKEND.dequantize(packed, dtype), TORCH.dequantize(packed, dtype))


# -- the library -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Makes an empty folder the cache of compiled kernels."""
    monkeypatch.setattr(c_library, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "hf_awq_offload"


def test_compiled_once_then_no_compiler_is_needed(cache, monkeypatch):
    assert isinstance(c_library.load(), ctypes.CDLL)
    (compiled,) = cache.iterdir()
    modified = compiled.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")
    assert isinstance(c_library.load(), ctypes.CDLL)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [modified]


def test_the_compiler_may_have_arguments(cache, monkeypatch):
    monkeypatch.setenv("CC", "env LC_ALL=C gcc")
    assert isinstance(c_library.load(), ctypes.CDLL)


def test_another_cpu_has_another_library(cache, monkeypatch):
    c_library.load()
    monkeypatch.setattr(c_library, "cpu", lambda: "another")
    c_library.load()
    assert len(list(cache.iterdir())) == 2


def test_no_compiler_is_a_reason(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(c_library.KernelsUnavailable, match=r"no C compiler found .*install gcc"):
        c_library.load()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("exit 3", "fails: exit status 3"),
        ("echo 'x.c:1: error: no vectors' >&2; exit 1", "no vectors"),
        ("true", "could not be loaded"),
    ],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(cache, monkeypatch, tmp_path, compiler, reason):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{compiler}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(c_library.KernelsUnavailable, match=reason):
        c_library.load()
    assert not list(cache.iterdir())


def test_that_there_are_none_is_said_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    fresh = functools.cache(c_library.library.__wrapped__)
    monkeypatch.setattr(c_backend, "library", fresh)
    dispatch._choose.cache_clear()
    for _ in range(2):
        assert random_awq_linear(64, 128)(torch.randn(1, 64)).shape == (1, 128)
    dispatch._choose.cache_clear()
    (record,) = caplog.records
    assert "others are slower: no C compiler found" in record.getMessage()


def test_asking_for_it_in_vain_says_why(monkeypatch):
    monkeypatch.setattr(c_backend, "library", lambda: "no C compiler found (gcc or cc); install gcc, or set CC")
    dispatch._choose.cache_clear()
    linear = random_awq_linear()
    linear.backend = "c"
    with pytest.raises(ConfigError, match=r"backend='c' can't serve .*no C compiler found"):
        linear(torch.randn(1, 64))
    linear.backend = "auto"
    assert linear(torch.randn(1, 64)).shape == (1, 24)
    dispatch._choose.cache_clear()


def test_a_folder_that_cannot_be_written_is_done_without(cache):
    cache.write_text("a file where the folder should be")
    assert isinstance(c_library.load(), ctypes.CDLL)


@pytest.mark.parametrize("open_to_others", ["folder", "library"])
def test_what_others_could_have_changed_is_not_loaded(cache, open_to_others):
    c_library.load()
    (compiled,) = cache.iterdir()
    (cache if open_to_others == "folder" else compiled).chmod(0o777)
    with pytest.raises(PermissionError, match="changed by other users"):
        c_library.built(cache)
    assert isinstance(c_library.load(), ctypes.CDLL)  # compiled again, in another folder


def test_a_link_in_the_place_of_the_library_is_not_followed(cache, tmp_path):
    compiled = c_library.built(cache)
    compiled.rename(tmp_path / "elsewhere.so")
    compiled.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(OSError, match="symbolic link"):
        c_library._open_own(compiled)
    assert isinstance(c_library.load(), ctypes.CDLL)  # compiled again, in another folder
    assert compiled.is_symlink()


@pytest.mark.parametrize("kept", [0, 1000, -1], ids=str)
def test_a_library_cut_off_in_the_middle_is_made_again(cache, kept):
    compiled = c_library.built(cache)
    content = compiled.read_bytes()
    compiled.chmod(0o700)
    compiled.write_bytes(content[:kept])
    assert c_library.built(cache).read_bytes() == content
    assert isinstance(c_library.load(), ctypes.CDLL)


def test_processes_that_compile_side_by_side(cache, tmp_path):
    program = "from hf_awq_offload.ops import c_library; c_library.load(); print('loaded')"
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=300)[0] for process in processes] == ["loaded\n"] * 3
    assert len(list(cache.iterdir())) == 1


def test_there_is_one_pool_of_threads():
    """A second OpenMP runtime would compete with torch's for the cores."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    packed = random_packed(4, 128, 512)
    c_backend.product(torch.randn(4, 512), packed)
    after = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert loaded == after
    assert sum("libgomp" in path or "libiomp" in path for path in after) <= 1
    assert ops.BACKENDS.index("c")
