"""The last file written into a checkpoint: what it is of, and the size and checksum of each file.

The checksum is CRC-32. It tells damage, not malice, and reads 3 GB a second where SHA-256 reads 1.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Completes a checkpoint: ``facts``, and what every file of ``folder`` must look like."""
    files = {path.relative_to(folder).as_posix(): _looks(path) for path in _files(folder)}
    text = json.dumps({**facts, "files": files}, indent=1, allow_nan=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's facts, and what is wrong with it, if anything is.

    Returns:
        ``(facts, damage)``: ``damage`` names the file; ``facts`` are empty if they cannot be read.
    """
    path = folder / MANIFEST
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        files = facts.pop("files")
        expected = {folder / name: (look["bytes"], look["crc32"]) for name, look in files.items()}
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{MANIFEST} cannot be read"
    for path, (size, checksum) in expected.items():
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            return facts, f"{name} is missing"
        if path.stat().st_size != size:
            return facts, f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _checksum(path) != checksum:
            return facts, f"{name} has been changed since it was written"
    return facts, None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _looks(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
