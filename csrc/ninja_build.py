"""A setuptools build_ext that compiles C++ and CUDA with ninja.

Ninja compiles in parallel, and compiles again only what a changed source, header or flag touches.
CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are honoured; nvcc reads NVCC_APPEND_FLAGS by itself.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# What the user's own flags say comes later on the command line, and wins.
COMMON_FLAGS = "-std=c++17 -O3 -I."
CUDA_ARCHITECTURES = (80, 90, 100)
# Added where a C++ file's name ends in the key: files that are compiled once an instruction set.
INSTRUCTION_SETS = {
    "_avx2": "-mavx2 -mfma",
    # GCC 12 takes its own _mm512_undefined_ps for a mistake.
    "_avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512 "
    "-Wno-maybe-uninitialized",
}


class NinjaBuildExt(build_ext):
    """Compiles each extension by a build.ninja of its own below build_temp."""

    def build_extension(self, ext):
        """Compile and link one module, or raise CompileError with the reason."""
        import ninja  # not at the top: a pure Python build needs neither
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        compile_cpp, link = _host_commands(includes)
        compile_with = {"cpp": compile_cpp}
        if any(source.endswith(".cu") for source in ext.sources):
            compile_with["cu"], link = _cuda_commands()

        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            plan = ninja.Writer(file, width=10_000)
            plan.variable("builddir", str(folder))
            for suffix, command in compile_with.items():
                command += " $extra -MD -MF $out.d -c $in -o $out"
                plan.rule(suffix, command, depfile="$out.d", deps="gcc")
            plan.rule("link", f"{link} $in -o $out")
            objects = [str(folder / f"{source}.o") for source in ext.sources]
            for source, target in zip(ext.sources, objects, strict=True):
                plan.build(target, source.rpartition(".")[2], source, variables=_extra(source))
            plan.build(self.get_ext_fullpath(ext.name), "link", objects)
        if subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-f", file.name]).returncode:
            raise CompileError("the compiler failed, its messages are above")


def _extra(source):
    """Return the flags of one file's instruction set, as a variable of ninja."""
    stem = Path(source).stem
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [flags for end, flags in INSTRUCTION_SETS.items() if on_x86 and stem.endswith(end)]
    return {"extra": flags[0]} if flags else {}


def _host_commands(includes):
    """Return what compiles and what links C++.

    Nothing is linked for threads: the kernels use the OpenMP runtime that the process has already
    (csrc/cpu/parallel.h).
    """
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++", "clang++"]), "c++")
    if shutil.which(shlex.split(cxx)[0]) is None:
        raise CompileError(f"no C++ compiler {cxx!r}: install one, or set CXX")
    # ISO mode would leave multiplications and additions apart.
    flags = f"{COMMON_FLAGS} -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra"
    flags += "".join(f" -isystem {shlex.quote(path)}" for path in includes)
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    cxxflags, ldflags = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
    return f"{cxx} {flags} {cxxflags}", f"{cxx} {shared} {ldflags}"


def _cuda_commands():
    """Return what compiles and what links CUDA, for those architectures that this nvcc knows."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
        raise CompileError(f"no nvcc {where}: install the CUDA toolkit, or set CUDA_HOME")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    arches = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known.split()]
    if not arches:
        raise CompileError(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in arches]
    targets.append(f"arch=compute_{arches[-1]},code=compute_{arches[-1]}")  # PTX, for later GPUs
    flags = " ".join(f"-gencode {target}" for target in targets)
    nvcc = shlex.quote(nvcc)
    compile_cu = f"{nvcc} {COMMON_FLAGS} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {flags}"
    # nvcc links, because it knows where its runtime is; statically, so that the module can be
    # imported where there is no CUDA runtime, and beside any other version of it.
    return compile_cu, f"{nvcc} -shared -cudart static"
