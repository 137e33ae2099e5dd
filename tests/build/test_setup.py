"""What BFT_BUILD builds and refuses, in a copy of the tree, where torch cannot be imported."""

import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools.errors import CompileError, OptionError

from csrc import ninja_build

ROOT = Path(__file__).parents[2]
COPIED = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "csrc"]
CXX = next(filter(None, map(shutil.which, ["c++", "g++", "clang++"])), None)
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


def make_tree(folder):
    """A copy of what setup.py reads, with packages of one line, and modules that refuse."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    for package in ("bft_kernels", "bft"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text('__version__ = "9.8.7"\n')
    for name in ("torch", "ninja", "pybind11"):
        blocked = folder / f"without_{name}" / f"{name}.py"
        blocked.parent.mkdir()
        blocked.write_text("raise ImportError('not to be imported')\n")
    return folder


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


# Stands for a C++ compiler: knows errors and included files, and makes nothing that runs.
PREPROCESSOR = f"""#!/bin/sh
case "$*" in *" -c "*) exec {CXX} -E "$@" ;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


def make_tool(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def run(tree, *arguments, without=("torch",), fails=False, **environment):
    """Run Python in the tree; an environment variable of None is unset."""
    environment = {
        **os.environ,
        "CUDA_HOME": None,
        "TORCH_CUDA_ARCH_LIST": None,
        "MAX_JOBS": None,
        "CXXFLAGS": "-O0",  # compiles three times faster
        "PYTHONPATH": os.pathsep.join(str(tree / f"without_{name}") for name in without),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def build(tree, **options):
    return run(tree, "setup.py", "build_ext", "--inplace", **options)


def modules(tree):
    return sorted(path.name.split(".")[0] for path in tree.glob("bft_kernels/*.so"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tree in which BFT_BUILD=cpu has run once, with PREPROCESSOR."""
    folder = make_tree(tmp_path_factory.mktemp("built"))
    build(folder, BFT_BUILD="cpu", CXX=make_tool(folder / "c++", PREPROCESSOR))
    return folder


def test_none_builds_a_pure_wheel_with_no_tool(tree):
    without = ("torch", "ninja", "pybind11")
    run(tree, "setup.py", "bdist_wheel", without=without, BFT_BUILD="none", PATH="")
    (wheel,) = tree.glob("dist/*.whl")
    assert wheel.name == "bft_kernels-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        assert not [name for name in files.namelist() if "csrc" in name or "emulation" in name]
    assert modules(tree) == []


def test_source_archive_holds_what_a_build_needs(tree):
    run(tree, "setup.py", "sdist", BFT_BUILD="none")
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(tree)) for path in tree.glob("csrc/**/*.*")}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE"} <= packed


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("without", [("torch",), ("ninja", "pybind11")])
def test_cpu_builds_one_module_that_works(tree, without):
    """With the headers of torch, too, which is then needed, and not imported."""
    done = build(tree, without=without, BFT_BUILD="cpu")
    assert ("torch/include" in done.stdout) == ("torch" not in without)
    assert modules(tree) == ["_cpu"]
    code = """
from bft_kernels import _cpu
ranks = []
_cpu.run_team(ranks.append, 1)
print(ranks, _cpu.instruction_set() in _cpu.instruction_sets())
"""
    assert run(tree, "-c", code).stdout == "[0] True\n"


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "rebuilt"),
    [
        (None, set()),
        ("csrc/cpu/backward.cpp", {"csrc/cpu/backward.cpp"}),
        ("csrc/bindings/checks.h", {"csrc/bindings/cpu.cpp"}),
        ("csrc/cpu/candidates.h", {"csrc/bindings/cpu.cpp", "csrc/cpu/online_softmax.cpp"}),
    ],
)
def test_a_second_build_compiles_only_what_changed(built, changed, rebuilt):
    if changed:
        (built / changed).touch()
    done = build(built, BFT_BUILD="cpu", CXX=str(built / "c++"))
    commands = [line for line in done.stdout.splitlines() if " -c " in line]
    assert {line.partition(" -c ")[2].split()[0] for line in commands} == rebuilt
    assert ("ninja: no work to do." in done.stdout) == (not rebuilt)


NO_CXX = "no C++ compiler {!r}: install one, or set CXX"


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "without", "environment", "says"),
    [
        ("gpu", (), {}, "BFT_BUILD: got 'gpu', expected one of auto, cpu, cuda, none"),
        ("cpu", ("ninja", "pybind11"), {}, "_cpu: no pybind11: install it, or a torch that has"),
        ("cpu", ("ninja",), {"CXX": "false"}, "_cpu: the compiler failed"),
        ("cpu", (), {"PATH": "", "CXX": None}, f"_cpu: {NO_CXX.format('c++')}"),
        ("cpu", (), {"CXX": "no-such"}, f"_cpu: {NO_CXX.format('no-such')}"),
        ("cuda", (), {"CXX": "no-such"}, f"_cuda: {NO_CXX.format('no-such')}"),
        ("cuda", (), {"PATH": "", "CXX": CXX}, "_cuda: no nvcc on PATH, and CUDA_HOME is not set"),
        # It does not look beyond a wrong one.
        ("cuda", (), {"CUDA_HOME": "x"}, "_cuda: no nvcc in CUDA_HOME=x: install the CUDA toolkit"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_reason(tree, mode, without, environment, says):
    without = ("torch", *without)
    done = build(tree, without=without, fails=True, BFT_BUILD=mode, **environment)
    failed = f"BFT_BUILD={mode} cannot build bft_kernels." if says.startswith("_") else ""
    assert f"{failed}{says}" in done.stderr
    assert modules(tree) == []


@needs_compiler
def test_what_auto_leaves_out_and_cpu_does_not(tree):
    tools = {"CXX": make_tool(tree / "c++", PREPROCESSOR), "CUDA_HOME": str(tree / "toolkit")}
    automatic = build(tree, BFT_BUILD="auto", **tools)
    assert modules(tree) == ["_cpu"]
    assert "BFT_BUILD=auto leaves out bft_kernels._cuda: no nvcc in CUDA_HOME=" in automatic.stderr

    (tree / "csrc/cpu/backward.cpp").write_text("#error made to fail\n")
    forced = build(tree, fails=True, BFT_BUILD="cpu", **tools)
    assert "made to fail" in forced.stdout + forced.stderr
    assert "BFT_BUILD=cpu cannot build bft_kernels._cpu: the compiler failed" in forced.stderr
    assert modules(tree) == ["_cpu"]  # of before

    automatic = build(tree, BFT_BUILD="auto", **tools)
    assert "BFT_BUILD=auto leaves out bft_kernels._cpu: the compiler failed" in automatic.stderr
    assert modules(tree) == []


KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.fixture
def architectures(monkeypatch):
    """The flags for a TORCH_CUDA_ARCH_LIST."""

    def flags(listed, known=KNOWN):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if listed is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        return ninja_build._architecture_flags("nvcc", known)

    return flags


@pytest.mark.parametrize(
    ("listed", "known", "targets"),  # sm_90 for code, compute_90 for PTX
    [
        (None, KNOWN, "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
        (None, (75, 80, 86, 90), "sm_80 sm_86 sm_90 compute_90"),
        ("", KNOWN, "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
        ("9.0", KNOWN, "sm_90"),
        ("8.0;9.0+PTX 10.0", KNOWN, "sm_80 sm_90 sm_100 compute_90"),
        ("9.0 8.0; 9.0+PTX;", KNOWN, "sm_90 sm_80 compute_90"),
        ("8.7+PTX", KNOWN, "sm_87 compute_87"),
        ("9.0a;10.0f+PTX", KNOWN, "sm_90a sm_100f compute_100f"),
        ("Ampere Hopper", KNOWN, "sm_80 sm_86 sm_90 compute_86 compute_90"),
        ("Ampere+Tegra;Blackwell", KNOWN, "sm_87 sm_100 sm_103 sm_120 sm_121 compute_121"),
        ("Turing 7.0+PTX 8.0", KNOWN, "sm_80"),
        ("7.5 9.0", KNOWN, "sm_90"),
    ],
)
def test_architectures_are_those_of_torch_cuda_arch_list(
    architectures, capsys, listed, known, targets
):
    codes = [(target.partition("_")[2], target) for target in targets.split()]
    expected = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)
    assert architectures(listed, known) == expected
    too_old = "TORCH_CUDA_ARCH_LIST: 7.5 is left out: kernels need 8.0\n"
    assert (too_old in capsys.readouterr().out) == (listed == "7.5 9.0")


@pytest.mark.parametrize(
    ("listed", "known", "says"),
    [
        ("7.5", KNOWN, r"^TORCH_CUDA_ARCH_LIST=7\.5 has nothing from"),
        (None, (75,), "nvcc knows none of the architectures"),
    ],
)
def test_no_architecture_is_left(architectures, listed, known, says):
    with pytest.raises(CompileError, match=says):
        architectures(listed, known)


@pytest.mark.parametrize(
    "entry", ["Amper", "hopper", "9", "90", "sm_90", "9.0b", "8.0a", "9.0f", "9.0+ptx", "13.0"]
)
def test_an_unknown_architecture_is_refused(architectures, entry):
    with pytest.raises(OptionError) as error:
        architectures(f"8.0 {entry}")
    message = str(error.value)
    assert message.startswith(f"TORCH_CUDA_ARCH_LIST: got {entry!r} in '8.0 {entry}', expected ")
    for name in ("native", "Hopper", "8.0", "12.1"):
        assert f" {name}," in message


# Stands for the compilers: writes what it is asked for, empty, and when it starts and ends; in
# between it waits for PAUSE seconds, for others to be seen.
TOOL = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit; fi
echo "start $*" >> log
sleep ${PAUSE:-0}
while [ $# -gt 0 ]; do
    case "$1" in -o) : > "$2" ;; -MF) echo "out:" > "$2" ;; esac
    shift
done
echo end >> log
"""


def build_with_tool(tree, **options):
    """Build both modules with TOOL; what it wrote, a line each."""
    tool = make_tool(tree / "toolkit/bin/nvcc", TOOL)
    options = {"BFT_BUILD": "cuda", "CUDA_HOME": str(tree / "toolkit"), "CXX": tool, **options}
    done = build(tree, **options)
    log = tree / "log"
    return done, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("without", [("torch",), ("torch", "ninja")], ids=["ninja", "no ninja"])
@pytest.mark.parametrize(("jobs", "most", "pause"), [("1", 1, "0.03"), ("3", 3, "0.2")])
def test_max_jobs_is_how_many_compilers_run(tree, jobs, most, pause, without):
    limit = {"MAX_JOBS": jobs, "PAUSE": pause, "TORCH_CUDA_ARCH_LIST": "9.0"}
    _, log = build_with_tool(tree, without=without, **limit)
    assert modules(tree) == ["_cpu", "_cuda"]
    running = itertools.accumulate(1 if line.startswith("start") else -1 for line in log)
    assert max(running) == most
    assert not any("--threads" in line for line in log)
    (compiled,) = [line for line in log if "csrc/cuda/forward.cu " in line]
    assert "-gencode arch=compute_90,code=sm_90 " in compiled
    assert "sm_80" not in compiled


def test_without_pybind11_the_headers_are_those_of_torch(tree):
    _, log = build_with_tool(tree, without=("ninja", "pybind11"), BFT_BUILD="cpu")
    assert all("torch/include" in line for line in log if " -c " in line)


@pytest.mark.parametrize("jobs", [None, ""])
def test_without_max_jobs_architectures_are_compiled_side_by_side(tree, jobs):
    done, log = build_with_tool(tree, MAX_JOBS=jobs)
    assert "6 kinds of GPU" in done.stderr
    assert "BFT_BUILD=cpu leaves it out" in done.stderr
    compiled = [line for line in log if ".cu " in line]
    assert len(compiled) == len(list(tree.glob("csrc/cuda/*.cu")))
    assert all("sm_80 " in line and " --threads 0 " in line for line in compiled)


@pytest.mark.parametrize(
    ("mode", "name", "value", "says"),
    [
        ("cpu", "MAX_JOBS", "0", "got '0', expected a positive integer"),
        ("cuda", "MAX_JOBS", "two", "got 'two', expected a positive integer"),
        ("auto", "MAX_JOBS", "-2", "got '-2', expected a positive integer"),
        ("auto", "MAX_JOBS", "1.5", "got '1.5', expected a positive integer"),
        ("cuda", "TORCH_CUDA_ARCH_LIST", "9.0 Amper", "got 'Amper' in '9.0 Amper'"),
        ("auto", "TORCH_CUDA_ARCH_LIST", "9.0 Amper", "got 'Amper' in '9.0 Amper'"),
    ],
)
def test_a_wrong_variable_is_an_error_in_every_mode(tree, mode, name, value, says):
    done, log = build_with_tool(tree, fails=True, BFT_BUILD=mode, **{name: value})
    assert f"error: {name}: {says}" in done.stderr
    assert not any(".cu " in line or name == "MAX_JOBS" for line in log)


# `make test-slow` compiles for every architecture, too, where there is nvcc.
@pytest.mark.parametrize(
    "listed",
    [pytest.param("9.0", marks=pytest.mark.slow), pytest.param("", marks=pytest.mark.soak)],
)
@pytest.mark.skipif(CXX is None or shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_builds_both_modules_for_every_architecture(tree, listed):
    done = build(tree, BFT_BUILD="cuda", TORCH_CUDA_ARCH_LIST=listed)
    assert modules(tree) == ["_cpu", "_cuda"]
    compilers = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    for arch in ninja_build.CUDA_ARCHITECTURES:
        known = f"compute_{arch}" in compilers.split() and (not listed or arch == 90)
        assert (f"code=sm_{arch} " in done.stdout) == known
    code = "from bft_kernels import _cuda; print(_cuda.sort_entries.__name__)"
    assert run(tree, "-c", code).stdout == "sort_entries\n"
