"""What ``make`` compiles, what of the project its checks refuse, and how it runs the documents."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme_check import main

ROOT = Path(__file__).parents[2]
too_large = runpy.run_path(str(ROOT / ".ci/file_sizes.py"))["too_large"]
wrong_words = runpy.run_path(str(ROOT / ".ci/words.py"))["wrong_words"]


# --- lint ----------------------------------------------------------------------------------------


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
        ("bft_kernels/weighting.py", "floor = 1", "'floor', expected lse_bound or delta"),
        ("bft_kernels/a.py", "share = 1 / count", "'share =', expected token_scale or normalizer"),
        ("bft_kernels/a.py", "# rows that backends share", None),
        ("tests/a.py", "wide = x.double()", None),
    ],
)
def test_a_word_has_a_better_one(name, line, found):
    expected = [] if found is None else [f"{name}:2: {found}"]
    assert wrong_words(name, f"first line\n{line}\n") == expected


# --- what is compiled ----------------------------------------------------------------------------


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
def test_cuda_takes_minutes_and_is_compiled_where_it_is_of_use(
    target, gpu, given, compiled, tmp_path
):
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


# --- documents -----------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path, capfd):
    """Status and output for a document."""

    def run(text):
        document = tmp_path / "README.md"
        document.write_text(text)
        return main([str(document)]), capfd.readouterr().out

    return run


def test_passes_blocks_in_order_and_in_one_folder(check):
    text = """
```python
open("made_here", "w").write("x")
```
1. In a list:
   ```console
   $ python -c 'print(open("made_here").read())' | \\
     python -c 'print(input())'
   x
   ```
```bash
# a comment
NAME=value make test
```
```text
$ anything
```
"""
    status, out = check(text)
    assert status == 0, out
    assert out.endswith("readme: 3 passed, 0 failed, 0 skipped\n")


def test_skips_a_block_with_a_reason_and_says_it(check):
    out = "README.md:3: skipped: needs two GPUs\nreadme: 0 passed, 0 failed, 1 skipped\n"
    assert check("<!-- no-run: needs two GPUs -->\n\n```bash\ntorchrun x\n```\n") == (0, out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nraise KeyError('gone')\n```", "KeyError: 'gone'"),
        ("```python\nimport sys; sys.exit(3)\n```", "exit status 3"),
        ("```bash\npython -c 'import no_such_module'\npython -V\n```", "no_such_module"),
        ("```bash\npython -c 'exit(1)' | python -V\n```", "exit status 1"),
        ("```bash\nmake no-such-target\n```", "no-such-target"),
        ("```console\n$ rm -rf x\n```", "rm -rf x\nonly accelerate, bft, python and make are run"),
        ("```bash\npython -V && curl x\n```", "only accelerate, bft, python and make are run"),
        ("```bash\npython $(curl x)\n```", "only accelerate, bft, python and make are run"),
        ("```bash\npython -c 'unclosed\n```", "No closing quotation"),
        ("<!-- no-run: -->\n```python\n```", "no-run gives no reason"),
        ("<!-- no-run: why -->\ntext", "expected a block"),
        ("<!-- run-with: -->\n```bash\npython -V\n```", "run-with gives no flags"),
        ("<!-- run-with: -x -->\ntext", "expected a block after run-with"),
        ("```python\nprint()", "not closed"),
    ],
)
def test_fails(check, text, message):
    status, out = check(text)
    assert status == 1, out
    assert message in out
    assert "1 failed" in out


def test_what_a_comment_says_is_of_one_block_and_each_of_its_commands(check):
    text = "<!-- no-run: why -->\n```python\n1 / 0\n```\n```python\n1 / 0\n```\n"
    assert "0 passed, 1 failed, 1 skipped" in check(text)[1]
    echo = 'python -c \'import sys; sys.exit(sys.argv[1:] != ["--steps", "1"])\''
    text = f"<!-- run-with: --steps 1 -->\n```bash\n{echo}\n{echo}\n```\n```bash\n{echo}\n```\n"
    assert "1 passed, 1 failed, 0 skipped" in check(text)[1]
