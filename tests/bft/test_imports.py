"""`bft` stands on what `bft_kernels` documents, so that the inside of that can change."""

import ast
import importlib
from pathlib import Path

import bft_kernels.reference

ROOT = Path(__file__).parents[2]
DOCUMENTED = {
    "bft_kernels": {*bft_kernels.__all__, "__version__", "reference"},
    "bft_kernels.weighting": {
        "token_weights",
        "shift_labels",
        "cu_seqlens_from_position_ids",
        "cu_seqlens_from_attention_mask",
    },
}


def undocumented(source):
    """What of `bft_kernels` a file imports, by a name that no document tells."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bft_kernels"):
            known = DOCUMENTED.get(node.module, set())
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name not in known)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("bft_kernels."))


def test_nothing_undocumented_is_imported():
    source = (
        "from bft_kernels import linear_nll, dispatch\n"
        "from bft_kernels.checks import check_int\n"
        "def f():\n    import bft_kernels.call\n"
    )
    wrong = {"bft_kernels.dispatch", "bft_kernels.checks.check_int", "bft_kernels.call"}
    assert set(undocumented(source)) == wrong
    files = sorted((ROOT / "bft").rglob("*.py"))
    assert len(files) > 20
    found = {file.name: list(undocumented(file.read_text(encoding="utf-8"))) for file in files}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    for module, names in DOCUMENTED.items():
        assert names <= set(dir(importlib.import_module(module)))
