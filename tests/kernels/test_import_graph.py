"""Who imports whom: backends stand side by side on ``common``, and nothing leans on a backend."""

import ast
from pathlib import Path

import pytest

import bft_kernels
from bft_kernels.dispatch import BACKENDS

PACKAGE = Path(bft_kernels.__file__).parent


def imported(path):
    """Names of the package's modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bft_kernels"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("bft_kernels"))


def edges(folder):
    """Of the files of a folder: each, and the backends that it imports."""
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[1:2] == ["backends"] and len(parts) > 2:
                yield path.relative_to(PACKAGE), parts[2]


@pytest.mark.parametrize("backend", [*BACKENDS, "common"])
def test_no_backend_imports_another(backend):
    found = set(edges(f"backends/{backend}"))
    assert {to for _, to in found} <= {backend, "common"}, found
    assert found, f"{backend} imports nothing: the test looks in the wrong place"


def test_nothing_else_imports_a_backend():
    found = [(path, to) for path, to in edges(".") if path.parts[0] != "backends"]
    assert not found, found
