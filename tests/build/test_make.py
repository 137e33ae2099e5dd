"""``make lint`` refuses files that are too large, and words for which the field has another."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


too_large, wrong_words = script("file_sizes").too_large, script("words").wrong_words


@pytest.mark.parametrize(
    ("name", "kib", "expected"),
    [
        ("docs/a.png", 300, None),
        ("docs/a.png", 301, "301 KiB, expected at most 300"),
        ("bft/tasks/files/a.gz", 400, None),
        ("bft/tasks/files/a.gz", 401, "401 KiB, expected at most 400"),
        ("other/bft/tasks/files/a.gz", 400, "400 KiB, expected at most 300"),
    ],
)
def test_a_file_over_its_limit_is_refused(tmp_path, monkeypatch, name, kib, expected):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(kib * 1024))
    (tmp_path / "small").touch()
    assert too_large(["small", "removed", name]) == ([f"{name}: {expected}"] if expected else [])


def test_without_names_all_tracked_files_are_checked(tmp_path):
    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr

    check = (sys.executable, str(ROOT / ".ci/file_sizes.py"))
    assert run("git", "init")[0] == 0
    (tmp_path / "it is large").write_bytes(bytes(310_000))
    assert run(*check) == (0, "")  # it is not tracked
    assert run("git", "add", ".") == (0, "")
    assert run(*check) == (1, "it is large: 303 KiB, expected at most 300\n")


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
    assert wrong_words(name, f"first line\n{line}\n") == expected
