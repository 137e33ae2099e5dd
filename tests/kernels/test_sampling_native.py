"""The hash in C++, CUDA and Triton against integers of any length: every bit must agree."""

import hashlib
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def module_or_none(name):
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


cpu = module_or_none("bft_kernels._cpu")
cuda = module_or_none("bft_kernels._cuda")
needs_cpu = pytest.mark.skipif(cpu is None, reason="bft_kernels._cpu is not built")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_cuda = pytest.mark.skipif(cuda is None, reason="bft_kernels._cuda is not built")


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


def native_block(dtype, *region):
    """The region [rows, cols] from C++; fails if a neighbour of the output was written."""
    rows, cols = region[2], region[4]
    memory = np.full(rows * cols + 2, 77, dtype=dtype)
    fill = cpu.sampling_bits if dtype is np.uint32 else cpu.sampling_uniforms
    fill(*region, memory.ctypes.data + memory.itemsize)
    assert memory[0] == 77
    assert memory[-1] == 77
    return memory[1:-1].reshape(rows, cols)


def test_the_definition_stays():
    """A change here would change every sampled run."""
    assert mix64(GAMMA) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0
    assert [expected_bits(0, 0, v) for v in range(3)] == [0xC49540DB, 0x0473F553, 0x81431338]
    assert expected_bits(-1, 2**32, 49151) == 0xF6A4BD19


@needs_cpu
def test_cpp_equals_integer_arithmetic():
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
        np.testing.assert_array_equal(native_block(np.uint32, *region), bits)
        uniforms = native_block(np.float32, *region)
        expected = [expected_u(int(x)) for x in bits.flat]
        assert [Fraction(float(u)) for u in uniforms.flat] == expected

    check()


@needs_cpu
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
def test_u_at_the_ends_and_where_rounding_starts(row, column, top_bits, u):
    assert native_block(np.uint32, 3, row, 1, column, 1)[0, 0] >> 8 == top_bits
    assert native_block(np.float32, 3, row, 1, column, 1)[0, 0] == u


@needs_cpu
def test_a_block_does_not_depend_on_its_tiling():
    seed, row0, rows, col0, cols = 11, 2**33, 64, 1000, 1500
    whole = native_block(np.uint32, seed, row0, rows, col0, cols)
    for i in range(0, rows, 7):
        for j in range(0, cols, 129):
            n, m = min(7, rows - i), min(129, cols - j)
            tile = native_block(np.uint32, seed, row0 + i, n, col0 + j, m)
            np.testing.assert_array_equal(tile, whole[i : i + n, j : j + m])


DIGEST = """
import hashlib, importlib.util, sys
import numpy
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
out = numpy.empty((64, 1500), numpy.uint32)
module.sampling_bits(11, 5, 64, 1000, 1500, out.ctypes.data)
print(hashlib.sha256(out.tobytes()).hexdigest())
"""


@needs_cpu
@pytest.mark.parametrize("threads", ["1", "3"])
def test_bits_do_not_depend_on_threads(threads):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, cpu.__file__],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=True,
        capture_output=True,
        text=True,
    )
    block = native_block(np.uint32, 11, 5, 64, 1000, 1500)
    assert done.stdout.strip() == hashlib.sha256(block.tobytes()).hexdigest()


GOOD = {"seed": 0, "row0": 0, "rows": 2, "col0": 0, "cols": 3, "out_ptr": 64}
BAD = [
    ({"row0": -1}, "row0: got -1, expected a number from 0 to 9223372036854775805"),
    ({"row0": 2**63 - 2}, "row0: got 9223372036854775806"),
    ({"rows": -2}, "rows: got -2, expected a number from 0 to"),
    ({"rows": 2**62}, "rows: got 4611686018427387904"),
    ({"col0": -3}, "col0: got -3, expected a number from 0 to 4294967296"),
    ({"col0": 2**32 - 2}, "cols: got 3, expected a number from 0 to 2"),
    ({"cols": -4}, "cols: got -4"),
    ({"cols": 2**40}, "cols: got 1099511627776"),
    ({"out_ptr": 0}, "out_ptr: got address 0, expected a multiple of 4 other than 0"),
    ({"out_ptr": 66}, "out_ptr: got address 66, expected a multiple of 4"),
]


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        pytest.param(cpu, {}, marks=needs_cpu, id="cpu"),
        pytest.param(cuda, {"stream": 0}, marks=needs_cuda, id="cuda"),
    ],
)
@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("name", ["sampling_bits", "sampling_uniforms"])
def test_bad_arguments_are_named(module, extra, change, message, name):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(module, name)(**(GOOD | extra | change))


@needs_cpu
@pytest.mark.parametrize("size", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_block_needs_no_address(size):
    cpu.sampling_bits(0, 0, size[0], 0, size[1], 0)


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch works where there is a GPU")
def test_cuda_without_a_gpu_imports_and_says_why_a_launch_fails():
    with pytest.raises(RuntimeError, match="fill_draws: the CUDA launch failed: cudaError"):
        cuda.sampling_bits(**GOOD, stream=0)


@needs_cuda
@needs_gpu
@pytest.mark.parametrize("region", [(-5, 2**40, 3, 2**32 - 9, 9), (7, 0, 70000, 10, 5)])
def test_cuda_equals_integer_arithmetic(region):
    rows, cols = region[2], region[4]
    bits = torch.zeros(rows, cols, dtype=torch.int32, device="cuda")
    uniforms = torch.zeros(rows, cols, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    cuda.sampling_bits(*region, bits.data_ptr(), stream)
    cuda.sampling_uniforms(*region, uniforms.data_ptr(), stream)
    expected = expected_block(*region)
    np.testing.assert_array_equal(bits.cpu().numpy().view(np.uint32), expected)
    fractions = [Fraction(float(u)) for u in uniforms.cpu().numpy().flat]
    assert fractions == [expected_u(int(x)) for x in expected.flat]


@pytest.mark.parametrize(
    "arch", runpy.run_path(str(ROOT / "csrc" / "ninja_build.py"))["CUDA_ARCHITECTURES"]
)
def test_cuda_kernels_do_not_spill(arch, assemble):
    # One kernel for the bits, one for u.
    assert assemble("csrc/cuda/sampling.cu", f"sm_{arch}").kernels == 2


@pytest.mark.skipif(module_or_none("triton") is None, reason="needs triton")
@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=needs_gpu)])
@pytest.mark.parametrize(
    "region", [(-5, 2**40, 5, 2**32 - 21, 21), (2**63 - 1, 3, 9, 2**31 - 8, 17), (0, 0, 4, 0, 16)]
)
def test_triton_equals_integer_arithmetic(region, interpret, tmp_path):
    out = tmp_path / "out.npz"
    subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("sampling_triton.py")),
            *map(str, region),
            out,
        ],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        check=True,
    )
    got = np.load(out)
    expected = expected_block(*region)
    np.testing.assert_array_equal(got["bits"], expected)
    assert [Fraction(float(u)) for u in got["u"].flat] == [
        expected_u(int(x)) for x in expected.flat
    ]
