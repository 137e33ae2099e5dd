"""A setuptools build_ext that compiles C++ and CUDA: what changed with ninja, all without it.

CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are honoured; nvcc reads NVCC_APPEND_FLAGS by itself. As in
torch's extensions, TORCH_CUDA_ARCH_LIST says which GPUs are compiled for, and MAX_JOBS how many
compilers run at once.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

# The user's own flags come later on the command line, and win.
COMMON_FLAGS = "-std=c++17 -O3 -I."
# One for each generation of GPUs, and none below the first: kernels need its instructions.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# What torch's names in TORCH_CUDA_ARCH_LIST stand for.
CUDA_NAMES = {
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
_FAILED = "the compiler failed, its messages are above"
# Flags of files that are compiled for one instruction set, by the end of the file's name.
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
        includes = [_pybind11(), sysconfig.get_path("include")]
        compile_cpp, link = _host_commands(includes)
        compile_with = {"cpp": compile_cpp}
        if any(source.endswith(".cu") for source in ext.sources):
            compile_with["cu"], link = _cuda_commands()
        folder, target = Path(self.build_temp, ext.name), self.get_ext_fullpath(ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        commands = {
            source: f"{compile_with[source.rpartition('.')[2]]} {_extra(source)}"
            for source in ext.sources
        }
        try:
            import ninja  # not at the top: a pure Python build needs none
        except ImportError:
            _compile_all(folder, commands, link, target)
        else:
            _compile_changed(ninja, folder, commands, link, target)


def _compile_changed(ninja, folder, commands, link, target):
    """Have ninja run the commands, one a source, whose inputs have changed."""
    objects = [str(folder / f"{source}.o") for source in commands]
    with open(folder / "build.ninja", "w") as file:
        plan = ninja.Writer(file, width=10_000)
        plan.variable("builddir", str(folder))
        plan.rule("compile", "$do -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        plan.rule("link", f"{link} $in -o $out")
        for made, (source, command) in zip(objects, commands.items(), strict=True):
            plan.build(made, "compile", source, variables={"do": command})
        plan.build(target, "link", objects)
    jobs = _jobs()
    command = [Path(ninja.BIN_DIR, "ninja"), "-f", file.name, *(["-j", str(jobs)] if jobs else [])]
    if subprocess.run(command).returncode:
        raise CompileError(_FAILED)


def _compile_all(folder, commands, link, target):
    """Run every command, as many at once as there are processors."""

    def make(path, command):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        command += f" -o {shlex.quote(str(path))}"
        print(command, flush=True)
        if subprocess.run(command, shell=True).returncode:
            raise CompileError(_FAILED)

    objects = [str(folder / f"{source}.o") for source in commands]
    compiling = [f"{command} -c {shlex.quote(source)}" for source, command in commands.items()]
    # A container may have fewer processors than the machine.
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    with ThreadPoolExecutor(_jobs() or len(mine)) as pool:
        try:
            list(pool.map(make, objects, compiling))
        except CompileError:
            pool.shutdown(cancel_futures=True)
            raise
    make(target, f"{link} {shlex.join(objects)}")


def _pybind11():
    """Return the folder of pybind11's headers: of the package, or of the copy in torch."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")  # does not import it
        for folder in (torch and torch.submodule_search_locations) or ():
            if Path(folder, "include", "pybind11").is_dir():
                return str(Path(folder, "include"))
        raise CompileError(
            "no pybind11: install it, or a torch that has its headers in torch/include"
        ) from None
    return pybind11.get_include()


def _extra(source):
    """Return the flags of one file's instruction set."""
    stem = Path(source).stem
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [flags for end, flags in INSTRUCTION_SETS.items() if on_x86 and stem.endswith(end)]
    return flags[0] if flags else ""


def _host_commands(includes):
    """Return the commands that compile and link C++; no OpenMP: see csrc/cpu/parallel.h."""
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ["c++", "g++", "clang++"]), "c++")
    if shutil.which(shlex.split(cxx)[0]) is None:
        raise CompileError(f"no C++ compiler {cxx!r}: install one, or set CXX")
    # Without it ISO mode makes no fused multiply-add.
    flags = f"{COMMON_FLAGS} -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra"
    flags += "".join(f" -isystem {shlex.quote(path)}" for path in includes)
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    cxxflags, ldflags = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
    return f"{cxx} {flags} {cxxflags}", f"{cxx} {shared} {ldflags}"


def _jobs():
    """Return MAX_JOBS, or None: then the number of processors decides."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        return None
    if not re.fullmatch("0*[1-9][0-9]*", jobs):
        raise OptionError(f"MAX_JOBS: got {jobs!r}, expected a positive integer")
    return int(jobs)


def _cuda_commands():
    """Return the commands that compile and link CUDA for architectures that this nvcc knows."""
    home = os.environ.get("CUDA_HOME")
    if (nvcc := shutil.which("nvcc", path=f"{home}/bin" if home else None)) is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
        raise CompileError(f"no nvcc {where}: install the CUDA toolkit, or set CUDA_HOME")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [int(arch) for arch in re.findall(r"compute_([0-9]+)\b", listed)]
    flags = _architecture_flags(nvcc, known)
    if not _jobs():  # the largest file takes half of the build: its architectures side by side
        flags += " --threads 0"
    nvcc = shlex.quote(nvcc)
    compile_cu = f"{nvcc} {COMMON_FLAGS} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {flags}"
    # nvcc links, because it knows where its runtime is. It links it statically, so that the module
    # can be imported without a CUDA runtime, and beside any other version of it.
    return compile_cu, f"{nvcc} -shared -cudart static"


def _architecture_flags(nvcc, known):
    """Return nvcc's flags for the GPUs that TORCH_CUDA_ARCH_LIST asks for, or else for all.

    ``known`` are the architectures that this nvcc knows, such as 80.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked == "native":  # the GPUs of this machine
        return "-arch=native"
    if asked:
        wanted = _listed_architectures(asked, nvcc, known)
        if not wanted:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST={asked} has nothing from 8.0 on")
    else:
        arches = [arch for arch in CUDA_ARCHITECTURES if arch in known]
        if not arches:
            raise CompileError(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
        wanted = {arch: arch == arches[-1] for arch in arches}  # PTX is for later GPUs
    codes = [(arch, f"sm_{arch}") for arch in wanted]
    codes += [(arch, f"compute_{arch}") for arch, ptx in wanted.items() if ptx]
    return " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)


def _listed_architectures(asked, nvcc, known):
    """Return TORCH_CUDA_ARCH_LIST's architectures, such as 90a, and whether each gets PTX too.

    Those too old for the kernels are left out: images set the variable for all that they build.
    """
    wanted = {}
    for entry in re.split("[; ]+", asked.strip("; ")):
        for version in CUDA_NAMES.get(entry, entry).split(";"):
            match = re.fullmatch(r"([0-9]+)\.([0-9])([af]?)(\+PTX)?", version)
            number = int(match[1] + match[2]) if match else 0
            if match and number < CUDA_ARCHITECTURES[0]:
                print(f"TORCH_CUDA_ARCH_LIST: {version} is left out: kernels need 8.0")
                continue
            # Variants of one architecture (a) exist since 9.0, those of a family (f) since 10.0.
            if number not in known or number < {"": 0, "a": 90, "f": 100}[match[3]]:
                versions = [f"{x // 10}.{x % 10}" for x in sorted(known)]
                raise OptionError(
                    f"TORCH_CUDA_ARCH_LIST: got {entry!r} in {asked!r}, expected native, or some "
                    f"of {', '.join([*CUDA_NAMES, *versions])}, the numbers with +PTX or without; "
                    f"{nvcc} knows no others"
                )
            arch = f"{number}{match[3]}"
            wanted[arch] = wanted.get(arch, False) or bool(match[4])
    return wanted
