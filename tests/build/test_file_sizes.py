"""Large files are refused where they are committed, and by ``make lint``."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / ".ci/file_sizes.py"


def run(folder, *names):
    command = [sys.executable, str(CHECK), *names]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "kib", "refused"),
    [
        ("docs/a.png", 300, None),
        ("docs/a.png", 301, "docs/a.png: 301 KiB, expected at most 300\n"),
        ("bft/tasks/files/a.gz", 400, None),
        ("bft/tasks/files/a.gz", 401, "bft/tasks/files/a.gz: 401 KiB, expected at most 400\n"),
        (
            "other/bft/tasks/files/a.gz",
            400,
            "other/bft/tasks/files/a.gz: 400 KiB, expected at most 300\n",
        ),
    ],
)
def test_a_file_over_its_limit_is_refused(tmp_path, name, kib, refused):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(kib * 1024))
    (tmp_path / "small").touch()
    got = run(tmp_path, "small", "removed", name)
    assert (got.returncode, got.stderr) == ((0, "") if refused is None else (1, refused))


def test_without_names_all_tracked_files_are_checked(tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "it is large").write_bytes(bytes(310_000))
    assert run(tmp_path).returncode == 0  # it is not tracked
    git("add", ".")
    assert run(tmp_path).stderr == "it is large: 303 KiB, expected at most 300\n"


def test_no_file_of_this_repository_is_too_large():
    got = run(ROOT)
    assert (got.returncode, got.stderr) == (0, "")
