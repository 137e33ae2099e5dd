"""The emulation of CUDA device code: right kernels run, and each planted mistake is caught."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.emulation import build

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "tests/cuda/emulation/programs/program.cpp"]
KINDS = {
    "out of bounds": 2,
    "uninitialised": 2,
    "race": 7,
    "async pending": 2,
    "async unordered": 1,
    "divergent barrier": 2,
    "missing lane": 3,
    "misaligned": 4,
    "read only": 1,
    "global race": 1,
}

needs_compiler = pytest.mark.skipif(build.CXX is None, reason="needs a C++ compiler")


def run_program(folder, *flags):
    program = folder / "program"
    build.build(program, SOURCES, *flags)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "seed 3 is right" in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("emulation"))


@needs_compiler
def test_each_kind_of_mistake_is_caught_and_located(output):
    where = r"kernel \w+, block \(\d, 0, 0\), thread \(\d+, 0, 0\), \S*wrong.cuh:\d+: "
    caught = re.findall(rf"^caught: ([a-z ]+): {where}", output, re.MULTILINE)
    assert {kind: caught.count(kind) for kind in caught} == KINDS


# The figures of the PTX ISA, as a table: for each register of a lane, which 8 x 8 quarter of the
# matrix it comes from (top or bottom, left or right); and for the lanes 0 to 3 and the first of the
# next four, the row and the columns in the quarter.
QUARTERS_A = [(0, 0), (8, 0), (0, 8), (8, 8)]
FIRST_LANES = {0: (0, [0, 1]), 1: (0, [2, 3]), 2: (0, [4, 5]), 3: (0, [6, 7]), 4: (1, [0, 1])}


def quarter(lane):
    """Row and columns of a lane's pair in an 8 x 8 matrix."""
    row, columns = FIRST_LANES[lane % 4]
    return row + lane // 4, columns


@needs_compiler
def test_fragments_are_those_of_the_tables(output):
    assert quarter(4) == FIRST_LANES[4]
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("lane")]
    got = np.array(lines, dtype=float)
    tile = np.arange(256.0).reshape(16, 16)
    assert got.shape == (32, 20)
    for lane in range(32):
        row, columns = quarter(lane)
        plain = [tile[top + row, left + c] for top, left in QUARTERS_A for c in columns]
        turned = [tile[top + c, left + row] for top, left in QUARTERS_A for c in columns]
        # D's registers are its top and bottom halves; column n is column n + 3 of the tile.
        sums = [tile[top + row, 3 + c] for top in (0, 8) for c in columns]
        np.testing.assert_array_equal(got[lane], [*plain, *turned, *sums])


@needs_compiler
def test_conversions_are_numpys(output):
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("convert")]
    wide, x, half, bf16 = np.array(lines, dtype=np.uint32).T
    assert len(wide) == 2**16
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(wide.view(np.float32), halves.astype(np.float32))
    x = np.ascontiguousarray(x).view(np.float32)
    number = ~np.isnan(x)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(half[number], expected[number])
    # The nearest multiple of a bfloat16's last place, in float64, which holds both neighbours.
    inside = number & (np.abs(x) < 2.0**127)
    x, got = x[inside].astype(float), (bf16[inside] << 16).view(np.float32)
    step = 2.0 ** (np.maximum(np.frexp(x)[1], -125) - 8)
    np.testing.assert_array_equal(got, np.round(x / step) * step)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("-fsanitize=undefined", "-fno-sanitize-recover=all"),
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-DBFT_EMULATION_UCONTEXT",),
    ],
    ids=["undefined", "address", "ucontext"],
)
def test_other_builds_agree(tmp_path, output, flags):
    assert run_program(tmp_path, *flags).splitlines()[-1] == output.splitlines()[-1]


def rows(array, writable):
    """What memory() takes for an array."""
    return (array.ctypes.data, array.nbytes, writable, "array")


@pytest.mark.slow
def test_is_loaded_beside_the_compiled_module(emulated):
    compiled = pytest.importorskip("bft_kernels._cuda")
    assert emulated.Problem is not compiled.Problem


def test_the_binding_runs_on_host_memory(emulated):
    keys = np.sort(np.random.default_rng(0).integers(0, 900, 5000)).astype(np.int32)
    starts = np.full(901, -1)
    call = {"E": 5000, "V": 900, "stream": 0, "sorted_keys_ptr": keys.ctypes.data}
    call["starts_ptr"] = starts.ctypes.data
    both = [rows(keys, False), rows(starts, True)]
    with emulated.memory(both, seed=1, unwritten=True):
        emulated.column_starts(**call)
    np.testing.assert_array_equal(starts, np.searchsorted(keys, np.arange(901)))

    fixed = emulated.memory([rows(keys, False), rows(starts, False)])
    with fixed, pytest.raises(RuntimeError, match=r"^read only: "):
        emulated.column_starts(**call)
    short = emulated.memory([both[0], (starts.ctypes.data, starts.nbytes - 8, True, "starts")])
    with short, pytest.raises(RuntimeError, match=r"^out of bounds: .* of starts,"):
        emulated.column_starts(**call)
    with pytest.raises(RuntimeError, match="not registered"):
        emulated.column_starts(**call)


def test_the_same_kernels_assemble_for_a_gpu(assemble):
    assembled = assemble("tests/cuda/emulation/programs/kernels.cu", "sm_80")
    assert assembled.kernels > 5
    sass = "\n".join(assembled.sass().values())
    for instruction in (
        r"HMMA\.16816\.F32 ",
        r"HMMA\.16816\.F32\.BF16 ",
        r"LDSM\.16\.M88\.4 ",
        r"LDSM\.16\.MT88\.4 ",
        r"LDGSTS\.E ",
        r"LDGSTS\.E\.BYPASS\.128 ",
    ):
        assert re.search(instruction, sass), instruction
