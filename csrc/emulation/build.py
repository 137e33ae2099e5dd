"""Compiles device code with the host's C++ compiler and the emulation. Test equipment.

Tests reach it with runpy, as they do csrc/ninja_build.py.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
# Kernels say `#pragma unroll`, which is nvcc's.
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{ROOT}/csrc/emulation/include", f"-I{ROOT}"]


def build(target, sources, *flags):
    """Compile the sources and the emulation, one after the other, and link them into target.

    Objects are put beside the target. Flags are used for both steps.
    """
    objects = []
    for source in [*sorted(ROOT.glob("csrc/emulation/*.cpp")), *sources]:
        objects.append(Path(target).parent / f"{Path(source).name}.o")
        command = [CXX, "-x", "c++", *FLAGS, *flags, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run([CXX, *flags, *objects, "-o", target], check=True)


def build_module(folder):
    """Build the binding of csrc/cuda on emulated kernels, and import it.

    It has bft_kernels._cuda's functions, which take addresses of host memory, and `memory`, the
    context that lists it. A stream is ignored.
    """
    import pybind11

    target = Path(folder, "_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    sources = [ROOT / "csrc/bindings/cuda.cpp", *sorted(ROOT.glob("csrc/cuda/*.cu"))]
    flags = ["-DBFT_EMULATION", "-shared", "-fPIC", "-fvisibility=hidden"]
    build(target, sources, *flags, *(f"-isystem{path}" for path in includes))
    spec = importlib.util.spec_from_file_location("_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
