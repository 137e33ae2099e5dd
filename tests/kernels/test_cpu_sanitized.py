"""The C++ of the cpu backend under the address and undefined-behaviour sanitizers."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csrc import ninja_build
from tests.cuda.emulation.build import CXX

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_sanitizers_find_nothing(tmp_path):
    sources = [*sorted(ROOT.glob("csrc/cpu/*.cpp")), ROOT / "tests/support/cpu_sanitized.cpp"]

    def compile_one(source):
        target = tmp_path / f"{source.stem}.o"
        extra = ninja_build._extra(source).split()
        flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=fast", f"-I{ROOT}", *SANITIZE, *extra]
        subprocess.run([CXX, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = tmp_path / "cpu_sanitized"
    subprocess.run([CXX, *SANITIZE, *objects, "-ldl", "-lpthread", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "cases on" in done.stdout
