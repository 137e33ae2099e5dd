"""What BFT_BUILD builds and refuses, in a copy of the tree, where torch cannot be imported."""

import os
import shutil
import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tree in which BFT_BUILD=cpu has run once, with PREPROCESSOR."""
    folder = make_tree(tmp_path_factory.mktemp("built"))
    make_tool(folder / "c++", PREPROCESSOR)
    done = build(folder, BFT_BUILD="cpu", CXX=str(folder / "c++"))
    assert done.returncode == 0, done.stderr
    return folder


def run(tree, *arguments, without=("torch",), **environment):
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
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
    )


BUILD = ("setup.py", "build_ext", "--inplace")


def build(tree, **environment):
    return run(tree, *BUILD, **environment)


def modules(tree):
    return sorted(path.name.split(".")[0] for path in tree.glob("bft_kernels/*.so"))


def test_none_builds_a_pure_wheel_with_no_tool(tree):
    done = run(
        tree,
        *["setup.py", "bdist_wheel"],
        without=("torch", "ninja", "pybind11"),
        BFT_BUILD="none",
        PATH="",
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.glob("dist/*.whl")
    assert wheel.name == "bft_kernels-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        assert not [name for name in files.namelist() if "csrc" in name or "emulation" in name]
    assert modules(tree) == []


def test_source_archive_holds_what_a_build_needs(tree):
    done = run(tree, "setup.py", "sdist", BFT_BUILD="none")
    assert done.returncode == 0, done.stderr
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
    done = run(tree, *BUILD, without=without, BFT_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert ("torch/include" in done.stdout) == ("torch" not in without)
    assert modules(tree) == ["_cpu"]
    done = run(
        tree,
        "-c",
        "from bft_kernels import _cpu\n"
        "ranks = []\n"
        "_cpu.run_team(ranks.append, 1)\n"
        "print(ranks, _cpu.instruction_set() in _cpu.instruction_sets())\n",
    )
    assert done.stdout == "[0] True\n", done.stderr


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
    assert done.returncode == 0, done.stderr
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
        ("cuda", (), {"PATH": "", "CXX": None}, f"_cuda: {NO_CXX.format('c++')}"),
        ("cuda", (), {"CXX": "no-such"}, f"_cuda: {NO_CXX.format('no-such')}"),
        ("cuda", (), {"PATH": "", "CXX": CXX}, "_cuda: no nvcc on PATH, and CUDA_HOME is not set"),
        # It does not look beyond a wrong one.
        ("cuda", (), {"CUDA_HOME": "x"}, "_cuda: no nvcc in CUDA_HOME=x: install the CUDA toolkit"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_reason(tree, mode, without, environment, says):
    done = run(tree, *BUILD, without=("torch", *without), BFT_BUILD=mode, **environment)
    assert done.returncode != 0
    failed = f"BFT_BUILD={mode} cannot build bft_kernels." if says.startswith("_") else ""
    assert f"{failed}{says}" in done.stderr
    assert modules(tree) == []


@needs_compiler
def test_auto_leaves_out_cuda_without_nvcc_and_says_so(built):
    (built / "csrc/bindings/cuda.cpp").touch()
    toolkit = {"CUDA_HOME": str(built / "toolkit"), "CXX": str(built / "c++")}
    done = build(built, BFT_BUILD="auto", **toolkit)
    assert done.returncode == 0, done.stderr
    assert modules(built) == ["_cpu"]
    assert "BFT_BUILD=auto leaves out bft_kernels._cuda: no nvcc in CUDA_HOME=" in done.stderr


@needs_compiler
def test_code_that_does_not_compile_fails_cpu_and_is_left_out_by_auto(tree):
    (tree / "csrc/cpu/backward.cpp").write_text("#error made to fail\n")
    stale = tree / "bft_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    tools = {"CXX": make_tool(tree / "c++", PREPROCESSOR), "CUDA_HOME": str(tree / "toolkit")}

    forced = build(tree, BFT_BUILD="cpu", **tools)
    assert forced.returncode != 0
    assert "made to fail" in forced.stdout + forced.stderr
    assert "BFT_BUILD=cpu cannot build bft_kernels._cpu: the compiler failed" in forced.stderr

    automatic = build(tree, BFT_BUILD="auto", **tools)
    assert automatic.returncode == 0, automatic.stderr
    assert "BFT_BUILD=auto leaves out bft_kernels._cpu: the compiler failed" in automatic.stderr
    assert modules(tree) == []


KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.fixture
def architectures(monkeypatch):
    """The -gencode targets for a TORCH_CUDA_ARCH_LIST: sm_90 for code, 90 for PTX."""

    def targets(listed, known=KNOWN):
        if listed is None:
            monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        else:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        flags = ninja_build._architecture_flags("nvcc", known).split(" ")
        assert flags[::2] == ["-gencode"] * (len(flags) // 2)
        found = []
        for flag in flags[1::2]:
            arch, code = flag.removeprefix("arch=compute_").split(",code=")
            assert code in (f"sm_{arch}", f"compute_{arch}")
            found.append(code.removeprefix("compute_"))
        return " ".join(found)

    return targets


@pytest.mark.parametrize(
    ("listed", "targets"),
    [
        (None, "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 120"),
        ("", "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 120"),
        ("9.0", "sm_90"),
        ("8.0;9.0+PTX 10.0", "sm_80 sm_90 sm_100 90"),
        ("9.0 8.0; 9.0+PTX;", "sm_90 sm_80 90"),
        ("8.7+PTX", "sm_87 87"),
        ("9.0a;10.0f+PTX", "sm_90a sm_100f 100f"),
        ("Ampere Hopper", "sm_80 sm_86 sm_90 86 90"),
        ("Ampere+Tegra;Blackwell", "sm_87 sm_100 sm_103 sm_120 sm_121 121"),
        ("Turing 7.0+PTX 8.0", "sm_80"),
    ],
)
def test_architectures_are_those_of_torch_cuda_arch_list(architectures, listed, targets):
    assert architectures(listed) == targets


def test_what_is_too_old_for_the_kernels_is_left_out_and_named(architectures, capsys):
    assert architectures("7.5 9.0") == "sm_90"
    assert capsys.readouterr().out == "TORCH_CUDA_ARCH_LIST: 7.5 is left out: kernels need 8.0\n"
    with pytest.raises(CompileError, match=r"^TORCH_CUDA_ARCH_LIST=7\.5 has nothing from"):
        architectures("7.5")


def test_without_a_list_architectures_are_those_that_nvcc_knows(architectures):
    assert architectures(None, (75, 80, 86, 90)) == "sm_80 sm_86 sm_90 90"
    with pytest.raises(CompileError, match="nvcc knows none of the architectures"):
        architectures(None, (75,))


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


def build_with_tool(tree, without=("torch",), **environment):
    """Build both modules with TOOL; what it wrote, a line each."""
    tool = make_tool(tree / "toolkit/bin/nvcc", TOOL)
    environment = {"BFT_BUILD": "cuda", "CUDA_HOME": str(tree / "toolkit"), **environment}
    done = run(tree, *BUILD, without=without, CXX=tool, **environment)
    log = tree / "log"
    return done, log.read_text().splitlines() if log.exists() else []


def most_at_once(log):
    running = most = 0
    for line in log:
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("without", [("torch",), ("torch", "ninja")], ids=["ninja", "no ninja"])
@pytest.mark.parametrize(("jobs", "most", "pause"), [("1", 1, "0.03"), ("3", 3, "0.2")])
def test_max_jobs_is_how_many_compilers_run(tree, jobs, most, pause, without):
    limit = {"MAX_JOBS": jobs, "PAUSE": pause, "TORCH_CUDA_ARCH_LIST": "9.0"}
    done, log = build_with_tool(tree, without, **limit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert modules(tree) == ["_cpu", "_cuda"]
    assert most_at_once(log) == most
    assert not any("--threads" in line for line in log)
    compiled = [line for line in log if "csrc/cuda/forward.cu " in line]
    assert len(compiled) == 1
    assert "-gencode arch=compute_90,code=sm_90 " in compiled[0]
    assert "sm_80" not in compiled[0]


def test_without_pybind11_the_headers_are_those_of_torch(tree):
    done, log = build_with_tool(tree, without=("ninja", "pybind11"), BFT_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all("torch/include" in line for line in log if " -c " in line)


@pytest.mark.parametrize("jobs", [None, ""])
def test_without_max_jobs_architectures_are_compiled_side_by_side(tree, jobs):
    done, log = build_with_tool(tree, MAX_JOBS=jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kinds of GPU" in done.stderr
    assert "BFT_BUILD=cpu leaves it out" in done.stderr
    compiled = [line for line in log if ".cu " in line]
    assert len(compiled) == len(list(tree.glob("csrc/cuda/*.cu")))
    assert all("sm_80 " in line and " --threads 0 " in line for line in compiled)


@pytest.mark.parametrize(
    ("mode", "jobs"), [("cpu", "0"), ("cuda", "two"), ("auto", "-2"), ("auto", "1.5")]
)
def test_max_jobs_that_is_no_positive_integer_is_refused(tree, mode, jobs):
    done, log = build_with_tool(tree, MAX_JOBS=jobs, BFT_BUILD=mode)
    assert done.returncode != 0
    assert f"MAX_JOBS: got {jobs!r}, expected a positive integer" in done.stderr
    assert log == []


@pytest.mark.parametrize("mode", ["cuda", "auto"])
def test_a_wrong_list_of_architectures_is_an_error_in_every_mode(tree, mode):
    done, log = build_with_tool(tree, TORCH_CUDA_ARCH_LIST="9.0 Amper", BFT_BUILD=mode)
    assert done.returncode != 0
    assert "error: TORCH_CUDA_ARCH_LIST: got 'Amper' in '9.0 Amper'" in done.stderr
    assert not any(".cu " in line for line in log)


# `make test-slow` compiles for every architecture, too, where there is nvcc.
@pytest.mark.parametrize(
    "listed",
    [pytest.param("9.0", marks=pytest.mark.slow), pytest.param("", marks=pytest.mark.soak)],
)
@pytest.mark.skipif(CXX is None or shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_builds_both_modules_for_every_architecture(tree, listed):
    done = build(tree, BFT_BUILD="cuda", TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode == 0, done.stderr
    assert modules(tree) == ["_cpu", "_cuda"]
    compilers = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    for arch in ninja_build.CUDA_ARCHITECTURES:
        known = f"compute_{arch}" in compilers.split() and (not listed or arch == 90)
        assert (f"code=sm_{arch} " in done.stdout) == known
    done = run(tree, "-c", "from bft_kernels import _cuda; print(_cuda.sort_entries.__name__)")
    assert done.stdout == "sort_entries\n", done.stderr
