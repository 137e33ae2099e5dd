"""The hash in C++ against its definition: every bit must agree. On a GPU: ``tests/gpu``."""

import numpy as np
import pytest

from csrc import ninja_build
from tests.cuda.emulation.build import CXX
from tests.support.draws import Program, region_bits, uniform


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """``csrc/sampling.h`` as the host's compiler makes it."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    return Program(tmp_path_factory.mktemp("draws"), CXX)


def test_cpp_equals_the_definition(native):
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
        bits = region_bits(*region)
        got, uniforms = native(*region)
        np.testing.assert_array_equal(got, bits)
        np.testing.assert_array_equal(uniforms, uniform(bits))

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


@pytest.mark.parametrize("arch", ninja_build.CUDA_ARCHITECTURES)
def test_cuda_kernels_do_not_spill(arch, assemble):
    # One kernel for the bits, one for u.
    assert assemble("tests/support/draws.cpp", f"sm_{arch}").kernels == 2
