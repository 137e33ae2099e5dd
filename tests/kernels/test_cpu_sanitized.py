"""The C++ of the cpu backend under the address and undefined-behaviour sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.emulation.build import CXX

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = ["tests/kernels/test_cpu.py", "tests/kernels/test_fused.py"]


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_sanitizers_find_nothing(tmp_path):
    def run(*command, **variables):
        environment = os.environ | {"CXX": CXX, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    build = ["setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/temp"]
    run(sys.executable, *build, BFT_BUILD="cpu", CXXFLAGS=FLAGS, LDFLAGS=FLAGS)
    (module,) = tmp_path.glob("bft_kernels/_cpu*")
    runtimes = [run(CXX, f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so")]
    preloaded = {
        "LD_PRELOAD": " ".join(path.strip() for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "BFT_SANITIZED": str(module),
    }
    # Not captured by it: what a sanitizer says ends the process.
    cases = "not triton and not cuda and not (no_less_accurate and plain)"
    which = ["-k", cases, "-m", "not slow and not soak", "-n", "0", "-s"]
    pytest_ = [sys.executable, "-m", "pytest", "-p", "tests.support.sanitized", *which, *TESTS]
    assert " passed" in run(*pytest_, PYTHONPATH=str(ROOT), **preloaded)
