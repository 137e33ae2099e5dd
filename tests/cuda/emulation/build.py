"""Compiles device code with the host's C++ compiler and the emulation. Test equipment."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[3]
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
# Kernels say `#pragma unroll`, which is nvcc's.
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DBFT_EMULATION", f"-I{ROOT}/tests/cuda/emulation/include", f"-I{ROOT}"]


def build(target, sources, *flags):
    """Compile the sources and the emulation beside target, and link them into it.

    What did not change since the last build in that folder is not compiled again. Flags are used
    for both steps.
    """
    import ninja

    folder = Path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.ninja", "w") as file:
        plan = ninja.Writer(file, width=10_000)
        plan.variable("builddir", str(folder))
        compile_cpp = shlex.join([CXX, *FLAGS, *flags]) + " -x c++ -MD -MF $out.d -c $in -o $out"
        plan.rule("compile", compile_cpp, depfile="$out.d", deps="gcc")
        plan.rule("link", shlex.join([CXX, *flags]) + " $in -o $out")
        objects = []
        for source in [*sorted(ROOT.glob("tests/cuda/emulation/*.cpp")), *sources]:
            objects.append(str(folder / f"{Path(source).name}.o"))
            plan.build(objects[-1], "compile", str(source))
        plan.build(str(target), "link", objects)
    done = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-f", file.name], capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{target}: the compiler failed\n{done.stdout.decode()}")


def build_module(folder):
    """Build the binding of csrc/cuda on emulated kernels in folder, and import it.

    It has bft_kernels._cuda's functions, which take addresses of host memory, and `memory`, the
    context that lists it. A stream is ignored. Processes may call this at the same time.
    """
    import filelock
    import pybind11

    target = Path(folder, "_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    sources = [ROOT / "csrc/bindings/cuda.cpp", *sorted(ROOT.glob("csrc/cuda/*.cu"))]
    flags = ["-shared", "-fPIC", "-fvisibility=hidden"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(Path(folder, "lock")):
        build(target, sources, *flags, *(f"-isystem{path}" for path in includes))
    spec = importlib.util.spec_from_file_location("_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
