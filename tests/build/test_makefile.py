"""What ``make`` compiles: CUDA takes minutes, and only a GPU and the slow tests need it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("target", "gpu", "given", "compiled"),
    [
        ("venv", False, None, "cpu"),
        ("test", False, None, "cpu"),
        ("test", True, None, "auto"),
        ("venv", True, None, "auto"),
        ("test-slow", False, None, "auto"),
        ("demo", True, None, "cpu"),
        ("test", False, "auto", "auto"),
        ("test-slow", True, "none", "none"),
    ],
)
def test_cuda_is_compiled_where_it_is_of_use(target, gpu, given, compiled, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{'echo GPU 0' if gpu else 'exit 9'}\n")
    tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env.pop("BFT_BUILD", None)
    command = ["make", "--dry-run", "--always-make", target]
    command += [f"BFT_BUILD={given}"] if given else []
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert re.findall(r"BFT_BUILD=(\w+) \S+python setup.py", done.stdout) == [compiled]
    left_out = target == "venv" and not gpu
    assert ("CUDA is left out" in done.stdout) == left_out
    assert ("activate" in done.stdout) == (target in ("venv", "demo"))
