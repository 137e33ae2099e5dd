"""Who imports whom: backends stand side by side on ``common``, and nothing leans on a backend."""

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import pytest

import bft_kernels
from bft_kernels.dispatch import BACKENDS

PACKAGE = Path(bft_kernels.__file__).parent
DOTTED = r"'\.*\w+(\.\w+)+'"  # a string of names alone


def imported(text, package):
    """Names of modules that a file imports, anywhere, or that are strings, as for ``importlib``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(DOTTED, f"{node.value!r}"):
            yield resolve_name(node.value, package)


def test_relative_imports_and_imports_by_name_are_found():
    text = "from ..cpu import plan\nfind('bft_kernels.backends.cuda')\nfind('..torch.rows', it)"
    found = {*imported(text, "bft_kernels.backends.triton")}
    assert found >= {f"bft_kernels.backends.{name}" for name in ("cpu.plan", "cuda", "torch.rows")}


def edges(folder):
    """Of the files of a folder: each, and the backends that it imports."""
    for path in (PACKAGE / folder).rglob("*.py"):
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        for name in imported(path.read_text(), package):
            parts = name.split(".")
            if parts[:2] == ["bft_kernels", "backends"] and len(parts) > 2:
                yield path.relative_to(PACKAGE), parts[2]


@pytest.mark.parametrize("backend", [*BACKENDS, "common"])
def test_no_backend_imports_another(backend):
    found = set(edges(f"backends/{backend}"))
    assert {to for _, to in found} <= {backend, "common"}, found
    assert found, f"{backend} imports nothing: the test looks in the wrong place"


def test_nothing_else_imports_a_backend():
    found = [(path, to) for path, to in edges(".") if path.parts[0] != "backends"]
    assert not found, found
