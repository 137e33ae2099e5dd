"""Device code as nvcc makes it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Assembled:
    """A file of device code, compiled by nvcc without a warning and without a spill."""

    cubin: Path
    kernels: int

    def sass(self):
        """Machine code by kernel."""
        triton = pytest.importorskip("triton")
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not cuobjdump.exists():
            pytest.skip("needs cuobjdump")
        command = [cuobjdump, "-sass", self.cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
