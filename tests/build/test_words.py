"""Words for which the field has another are refused by ``make lint``."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("words", ROOT / ".ci/words.py")
words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(words)


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("docs/a.md", "beside the bare product", "'bare product', expected GEMM"),
        ("bft_kernels/a.py", "def sweep_rows():", "'sweep_', expected online softmax"),
        ("csrc/cuda/a.cu", "const float* floor;", "'floor', expected lse_bound or delta"),
        ("csrc/cuda/a.cu", "x = floor(y);", None),
        ("bft_kernels/weighting.py", "floor: float = DELTA,", None),
        ("bft_kernels/a.py", "share = 1 / count", "'share =', expected token_scale or normalizer"),
        ("bft_kernels/a.py", "# rows that backends share", None),
        ("tests/a.py", "wide = x.double()", None),
    ],
)
def test_a_word_has_a_better_one(name, line, found):
    expected = [] if found is None else [f"{name}:2: {found}"]
    assert words.wrong_words(name, f"first line\n{line}\n") == expected
