"""Refuses files that make a clone slow: ``file_sizes.py FILE...``, by default all tracked ones."""

import subprocess
import sys
from pathlib import Path

# KiB, by the folder of a file; the first folder that fits counts.
LIMITS = {"bft/tasks/files/": 400, "": 300}


def too_large(names: list[str]) -> list[str]:
    """A line for each file over its limit."""
    wrong = []
    for name in names:
        limit = next(kib for folder, kib in LIMITS.items() if name.startswith(folder))
        path = Path(name)
        size = path.stat().st_size if path.is_file() else 0  # a removed file has none
        if size > limit * 1024:
            wrong.append(f"{name}: {size / 1024:,.0f} KiB, expected at most {limit}")
    return wrong


if __name__ == "__main__":
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True)
    # An unpacked archive has no list of tracked files.
    sys.exit("\n".join(too_large(sys.argv[1:] or listing.stdout.split("\0")[:-1])) or 0)
