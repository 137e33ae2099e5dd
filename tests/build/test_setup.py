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

ROOT = Path(__file__).parents[2]
COPIED = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "csrc"]
CXX = next(filter(None, map(shutil.which, ["c++", "g++", "clang++"])), None)
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


def make_tree(folder):
    """A copy of what setup.py reads, with empty packages, and a folder of modules that refuse."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    for package in ("bft_kernels", "bft"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    for name in ("torch", "ninja", "pybind11"):
        blocked = folder / f"without_{name}" / f"{name}.py"
        blocked.parent.mkdir()
        blocked.write_text("raise ImportError('not to be imported')\n")
    return folder


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tree in which BFT_BUILD=cpu has run once."""
    folder = make_tree(tmp_path_factory.mktemp("built"))
    done = build(folder, BFT_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    return folder


def run(tree, *arguments, without=("torch",), **environment):
    """Run Python in the tree; an environment variable of None is unset."""
    environment = {
        **os.environ,
        "CUDA_HOME": None,
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


def build(tree, **environment):
    return run(tree, "setup.py", "build_ext", "--inplace", **environment)


def modules(tree):
    return sorted(path.name.split(".")[0] for path in tree.glob("bft_kernels/*.so"))


def test_unknown_value_is_refused(tree):
    done = build(tree, BFT_BUILD="gpu")
    assert done.returncode != 0
    assert "BFT_BUILD: got 'gpu', expected one of auto, cpu, cuda, none" in done.stderr


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
    assert wheel.name == "bft_kernels-0.1.0-py3-none-any.whl"
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


@needs_compiler
def test_cpu_builds_one_module_that_works(built):
    assert modules(built) == ["_cpu"]
    done = run(
        built,
        "-c",
        "import numpy\n"
        "from bft_kernels import _cpu\n"
        "out = numpy.zeros(1, numpy.uint32)\n"
        "_cpu.sampling_bits(0, 0, 1, 0, 1, out.ctypes.data)\n"
        "print(hex(out[0]))\n",
    )
    assert done.stdout == "0xc49540db\n", done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "rebuilt"),
    [
        (None, set()),
        ("csrc/cpu/sampling.cpp", {"csrc/cpu/sampling.cpp"}),
        ("csrc/bindings/checks.h", {"csrc/bindings/cpu.cpp"}),
        ("csrc/cpu/candidates.h", {"csrc/bindings/cpu.cpp", "csrc/cpu/sweep.cpp"}),
    ],
)
def test_a_second_build_compiles_only_what_changed(built, changed, rebuilt):
    if changed:
        (built / changed).touch()
    done = build(built, BFT_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if " -c " in line]
    assert {line.partition(" -c ")[2].split()[0] for line in commands} == rebuilt
    assert ("ninja: no work to do." in done.stdout) == (not rebuilt)


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
@pytest.mark.parametrize("cxx", [None, "no-such-compiler"])
def test_without_a_compiler_cpu_and_cuda_fail_and_say_so(tree, mode, cxx):
    done = build(tree, BFT_BUILD=mode, PATH="", CXX=cxx)
    assert done.returncode != 0
    assert f"BFT_BUILD={mode} cannot build bft_kernels._" in done.stderr
    assert f"no C++ compiler {cxx or 'c++'!r}: install one, or set CXX" in done.stderr


@needs_compiler
def test_cuda_without_nvcc_fails_and_names_it(tree):
    done = build(tree, BFT_BUILD="cuda", PATH="", CXX=CXX)
    assert done.returncode != 0
    assert "BFT_BUILD=cuda cannot build bft_kernels._cuda: no nvcc on PATH" in done.stderr
    assert "install the CUDA toolkit, or set CUDA_HOME" in done.stderr


@needs_compiler
def test_cuda_does_not_look_beyond_a_wrong_cuda_home(tree):
    done = build(tree, BFT_BUILD="cuda", CUDA_HOME=str(tree / "toolkit"))
    assert done.returncode != 0
    assert f"no nvcc in CUDA_HOME={tree}/toolkit" in done.stderr


@needs_compiler
def test_auto_leaves_out_cuda_without_nvcc_and_says_so(built):
    (built / "csrc/bindings/cuda.cpp").touch()
    done = build(built, BFT_BUILD="auto", CUDA_HOME=str(built / "toolkit"))
    assert done.returncode == 0, done.stderr
    assert modules(built) == ["_cpu"]
    assert "BFT_BUILD=auto leaves out bft_kernels._cuda: no nvcc in CUDA_HOME=" in done.stderr


@needs_compiler
def test_code_that_does_not_compile_fails_cpu_and_is_left_out_by_auto(tree):
    (tree / "csrc/cpu/sampling.cpp").write_text("#error made to fail\n")
    stale = tree / "bft_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()

    forced = build(tree, BFT_BUILD="cpu")
    assert forced.returncode != 0
    assert "made to fail" in forced.stdout + forced.stderr
    assert "BFT_BUILD=cpu cannot build bft_kernels._cpu: the compiler failed" in forced.stderr

    automatic = build(tree, BFT_BUILD="auto", CUDA_HOME=str(tree / "toolkit"))
    assert automatic.returncode == 0, automatic.stderr
    assert "BFT_BUILD=auto leaves out bft_kernels._cpu: the compiler failed" in automatic.stderr
    assert modules(tree) == []


@pytest.mark.slow
@pytest.mark.skipif(CXX is None or shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_builds_both_modules_for_every_architecture(tree):
    done = build(tree, BFT_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    assert modules(tree) == ["_cpu", "_cuda"]
    for target in ("code=sm_80", "code=sm_90", "code=sm_100", "code=compute_100"):
        assert target in done.stdout
    done = run(tree, "-c", "from bft_kernels import _cuda; print(_cuda.sampling_bits.__name__)")
    assert done.stdout == "sampling_bits\n", done.stderr
