"""The hash in C++, CUDA and Triton against integers of any length: every bit must agree."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from csrc import ninja_build
from tests.support.draws import CXX, Program

ROOT = Path(__file__).parents[2]
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def module_or_none(name):
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK32
    return x ^ (x >> 16)


def expected_bits(seed, row, column):
    key = mix64(mix64((seed + GAMMA) & MASK64) + GAMMA * row & MASK64)
    return mix32((key >> 32 | 1) * column + (key & MASK32) & MASK32)


def expected_u(bits):
    """(k + 1/2) / 2^24 rounded to 24 significant bits, ties to even, in exact arithmetic."""
    k = bits >> 8
    if k < 2**23:
        return Fraction(2 * k + 1, 2**25)
    return Fraction(k + k % 2, 2**24)


def expected_block(seed, row0, rows, col0, cols):
    bits = [[expected_bits(seed, row0 + i, col0 + j) for j in range(cols)] for i in range(rows)]
    return np.array(bits, dtype=np.uint32).reshape(rows, cols)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """``csrc/sampling.h`` as the host's compiler makes it."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    return Program(tmp_path_factory.mktemp("draws"), CXX)


def test_the_definition_stays():
    """A change here would change every sampled run."""
    assert mix64(GAMMA) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0
    assert [expected_bits(0, 0, v) for v in range(3)] == [0xC49540DB, 0x0473F553, 0x81431338]
    assert expected_bits(-1, 2**32, 49151) == 0xF6A4BD19


def test_cpp_equals_integer_arithmetic(native):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    seeds = st.integers(-(2**63), 2**63 - 1)
    rows_and_start = st.integers(0, 4).flatmap(
        lambda rows: st.tuples(st.integers(0, 2**63 - 1 - rows), st.just(rows))
    )
    cols_and_start = st.integers(0, 20).flatmap(
        lambda cols: st.tuples(st.integers(0, 2**32 - cols), st.just(cols))
    )

    @hypothesis.given(seeds, rows_and_start, cols_and_start)
    @hypothesis.example(0, (0, 4), (0, 20))
    @hypothesis.example(-1, (2**32 - 2, 4), (2**31 - 10, 20))
    @hypothesis.example(-(2**63), (2**63 - 5, 4), (2**32 - 20, 20))
    @hypothesis.example(2**63 - 1, (2**40, 1), (2**32 - 1, 1))
    def check(seed, row_range, col_range):
        region = (seed, *row_range, *col_range)
        bits = expected_block(*region)
        got, uniforms = native(*region)
        np.testing.assert_array_equal(got, bits)
        expected = [expected_u(int(x)) for x in bits.flat]
        assert [Fraction(float(u)) for u in uniforms.flat] == expected

    check()


@pytest.mark.parametrize(
    ("row", "column", "top_bits", "u"),
    [
        (364, 16896, 0, 2**-25),
        (23, 1479, 2**23 - 1, 0.5 - 2**-25),
        (1812, 10772, 2**23, 0.5),  # from here on the half is a tie
        (429, 2730, 2**23 + 1, 0.5 + 2**-23),
        (185, 10078, 2**24 - 1, 1.0),
    ],
)
def test_u_at_the_ends_and_where_rounding_starts(native, row, column, top_bits, u):
    bits, uniforms = native(3, row, 1, column, 1)
    assert bits[0, 0] >> 8 == top_bits
    assert uniforms[0, 0] == u


@needs_gpu
@pytest.mark.parametrize("region", [(-5, 2**40, 3, 2**32 - 9, 9), (7, 0, 70000, 10, 5)])
def test_cuda_equals_integer_arithmetic(region, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    bits, uniforms = Program(tmp_path, "nvcc", "-arch=native", "-x", "cu")(*region)
    expected = expected_block(*region)
    np.testing.assert_array_equal(bits, expected)
    fractions = [Fraction(float(u)) for u in uniforms.flat]
    assert fractions == [expected_u(int(x)) for x in expected.flat]


@pytest.mark.parametrize("arch", ninja_build.CUDA_ARCHITECTURES)
def test_cuda_kernels_do_not_spill(arch, assemble):
    # One kernel for the bits, one for u.
    assert assemble("tests/support/draws.cpp", f"sm_{arch}").kernels == 2


@pytest.mark.skipif(module_or_none("triton") is None, reason="needs triton")
@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=needs_gpu)])
@pytest.mark.parametrize(
    "region", [(-5, 2**40, 5, 2**32 - 21, 21), (2**63 - 1, 3, 9, 2**31 - 8, 17), (0, 0, 4, 0, 16)]
)
def test_triton_equals_integer_arithmetic(region, interpret, tmp_path):
    out = tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, str(ROOT / "tests/support/triton_draws.py"), *map(str, region), out],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        check=True,
    )
    got = np.load(out)
    expected = expected_block(*region)
    np.testing.assert_array_equal(got["bits"], expected)
    assert [Fraction(float(u)) for u in got["u"].flat] == [
        expected_u(int(x)) for x in expected.flat
    ]
