"""What is imported is declared or documented, and nothing else is declared; one version."""

import ast
import importlib
import importlib.metadata
import os
import re
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest

import bft_kernels.reference
from bft_kernels import __version__, info
from tests.api.test_public_api import imported_by_docs
from tests.support.runs import run_python

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}

# The files of each extra; of two that hold a file, the first is its.
FILES = {
    "triton": ["bft_kernels/backends/triton"],
    "": ["bft_kernels"],
    "demo": ["bft/demo"],
    "study": ["bft/study", "bft/tasks"],
    "trl": ["bft/integrations/trl.py"],
    "trackers": ["bft/trackers.py"],
    "train": ["bft"],
    "build": ["setup.py", "csrc/ninja_build.py"],
    "dev": ["benchmarks", "csrc", "tests"],
}
# Declared, but needed by another way than an import.
NOT_IMPORTED = {
    "clang-format": "a command",
    "codespell": "a command",
    "gguf": "transformers reads 4-bit weights with it",
    "mypy": "a command",
    "numpy": "torch.Tensor.numpy, where a run's weights are hashed",
    "pre-commit": "a command",
    "pyarrow": "pandas writes Parquet with it",
    "pytest-benchmark": "a fixture of pytest",
    "pytest-xdist": "an option of pytest",
    "ruff": "a command",
    "tensorboard": "accelerate writes its events with it",
}
# What documents tell of the kernels: `bft` stands on it, so that their inside can change.
DOCUMENTED = {("bft_kernels", name) for name in (*bft_kernels.__all__, "__version__", "reference")}
DOCUMENTED |= imported_by_docs()
# Measured against where they are installed, which is the user's choice.
PEERS = {"cut_cross_entropy", "liger_kernel", "quack", "verl"}


def name_of(requirement):
    """A distribution's name as it is compared: lower case, with hyphens."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def declared(extra):
    """Distributions of an extra, of the extras that it names, and of no extra at all."""
    found = {name_of(requirement) for requirement in EXTRAS[""]}
    for requirement in EXTRAS[extra]:
        inner = re.match(r"bft-kernels\[(.*)\]", requirement)
        extras = inner[1].split(",") if inner else []
        found |= {name_of(requirement)}.union(*map(declared, extras))
    return found - {"bft-kernels"}


def imports(source):
    """Every ``(module, name)`` that a file imports; a name of None is the module itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.fixture(scope="module")
def imported():
    """{extra: {distribution: a file that imports it}}; a module of no distribution is one."""
    providers = importlib.metadata.packages_distributions()
    ours = {path.stem for path in ROOT.glob("csrc/**/*.py")}
    ours |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    seen = set()
    found = {extra: {} for extra in FILES}
    for extra, places in FILES.items():
        for place in places:
            path = ROOT / place
            for file in {path} if path.is_file() else set(path.rglob("*.py")) - seen:
                seen.add(file)
                text = file.read_text(encoding="utf-8")
                modules = {module.partition(".")[0] for module, _ in imports(text)}
                for module in modules - sys.stdlib_module_names - ours - PEERS:
                    name = name_of(providers.get(module, [module])[0])
                    found[extra][name] = str(file.relative_to(ROOT))
    return found


@pytest.mark.parametrize("extra", FILES)
def test_what_is_imported_is_declared(imported, extra):
    known = declared(extra)
    assert {name: file for name, file in imported[extra].items() if name not in known} == {}


def undocumented(source):
    """What of `bft_kernels` a file imports by a name that no document tells."""
    for module, name in imports(source):
        known = DOCUMENTED | {("bft_kernels", None)}
        if module.startswith("bft_kernels") and (module, name) not in known:
            yield f"{module}.{name}" if name else module


def test_nothing_undocumented_is_imported():
    source = (
        "from bft_kernels import linear_nll, dispatch\n"
        "from bft_kernels.checks import check_int\n"
        "def f():\n    import bft_kernels.problem, bft_kernels\n"
    )
    wrong = {"bft_kernels.dispatch", "bft_kernels.checks.check_int", "bft_kernels.problem"}
    assert set(undocumented(source)) == wrong
    files = sorted((ROOT / "bft").rglob("*.py"))
    assert len(files) > 20
    found = {file.name: list(undocumented(file.read_text(encoding="utf-8"))) for file in files}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("extra", FILES)
def test_what_is_declared_is_imported(imported, extra):
    own = {name_of(requirement) for requirement in EXTRAS[extra]} - {"bft-kernels"}
    # setup.py and csrc/ninja_build.py are read by the tests, too.
    assert own - set(imported[extra]) <= set(NOT_IMPORTED)


def test_every_direct_dependency_is_pinned_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [name_of(line) for line in lines if line and not line.startswith("#")]
    everything = {name_of(line) for lines in EXTRAS.values() for line in lines} - {"bft-kernels"}
    assert sorted(pins) == sorted(everything)


def test_packages_of_data_are_asked_for_by_the_same_versions():
    lines = (ROOT / "requirements-demo.txt").read_text(encoding="utf-8").splitlines()
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("bft/**/*.py"))
    for line in lines:
        if not line.startswith("#"):
            assert f"pip install --no-deps {line.split()[0]}" in source


def test_the_version_is_written_once_and_needs_no_installation(monkeypatch):
    missing = Mock(side_effect=importlib.metadata.PackageNotFoundError)
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    versions = info()["versions"]
    assert versions["bft-kernels"] == __version__
    assert versions["numpy"] == "not installed"


def test_the_kernels_need_no_numpy(tmp_path):
    """And torch does without it."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('numpy is blocked')\n")
    code = """
import torch
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy

hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
target = torch.randint(40, (6,))
for gradient in ("exact", "sampled"):
    linear_cross_entropy(hidden, weight, target, gradient=gradient).backward()
    balanced_linear_cross_entropy(hidden[None], weight, target[None], gradient=gradient).backward()
try:
    torch.zeros(1).numpy()
except RuntimeError:
    print("without numpy")
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python("-W", "ignore", "-c", code, PYTHONPATH=path)
    assert done.stdout == "without numpy\n"
