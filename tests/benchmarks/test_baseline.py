"""A ratio that grew is seen, one that did not is not, and ``make test`` leaves the suite alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import baseline

ROOT = Path(__file__).resolve().parents[2]
NAMES = {shape: f"test_loss[bft torch exact, bft, both-{shape}]" for shape in ("tiny", "small")}
SELECTED = [f"benchmarks/test_losses.py::{name}" for name in NAMES.values()]


def saved(path, **ratios):
    rows = [{"name": NAMES[key], "extra_info": {"times_g": r}} for key, r in ratios.items()]
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


def pytest_run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)


def test_only_a_ratio_far_above_the_saved_one_is_complained_of():
    assert baseline.complaint(1.34, 1.0) == ""
    assert baseline.complaint(0.1, 1.0) == ""
    assert baseline.complaint(99.0, None) == ""
    assert "took 1.36 G, expected up to 1.35 x 1.00 G" in baseline.complaint(1.36, 1.0)


@pytest.mark.slow
def test_the_suite_fails_on_a_ratio_that_grew(tmp_path):
    path = saved(tmp_path / "cpu.json", tiny=1e-6, small=1e6)
    done = pytest_run(*SELECTED, "--baseline", path, "--max-spread", 1e9)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert f"{NAMES['tiny']} took" in done.stdout
    assert "saved 1000000.00" in done.stdout
    done = pytest_run(*SELECTED, "--baseline", path, "--max-spread", -1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too noisy to compare" in done.stdout
    assert "multiples of the bare GEMM" in done.stdout


@pytest.mark.slow
def test_a_baseline_that_was_just_saved_is_read(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    done = pytest_run(*SELECTED, "--baseline", path, "--rebase")
    assert done.returncode == 0, done.stdout + done.stderr
    assert baseline.load(path).keys() == set(NAMES.values())
    written = json.loads(path.read_text())
    assert "node" not in written["machine_info"]
    assert set(written["benchmarks"][0]["stats"]) == {"min", "median", "iqr", "rounds"}


@pytest.mark.parametrize(
    "path", sorted(baseline.BASELINES.glob("*.json")), ids=lambda path: path.name
)
def test_committed_baselines_are_of_this_suite(path):
    ratios = baseline.load(path)
    assert ratios.keys() >= set(NAMES.values())
    assert all(ratio > 0 for ratio in ratios.values())


def test_make_test_does_not_collect_the_suite():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in text
