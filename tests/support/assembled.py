"""Device code as nvcc makes it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.measure.compiled import cuobjdump

ROOT = Path(__file__).parents[2]


@dataclass
class Assembled:
    """A file of device code, compiled by nvcc without a warning and without a spill."""

    cubin: Path
    kernels: int

    def sass(self):
        """Machine code by kernel."""
        pytest.importorskip("triton")
        try:
            text = cuobjdump(self.cubin, "-sass")
        except FileNotFoundError:
            pytest.skip("needs cuobjdump")
        return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.S))


def assemble_for(arch, source, folder):
    """Compiles a file for an architecture into a folder; skips the test where nvcc cannot."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    if arch.replace("sm_", "compute_") not in listed.split():
        pytest.skip(f"needs an nvcc that knows {arch}")
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT}", f"-arch={arch}", "-cubin", "-x", "cu"]
    command += ["-Xptxas=-v", "-Werror", "all-warnings", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert set(spills) == {("0", "0")}
    return Assembled(cubin, len(spills))
