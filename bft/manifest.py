"""The last file written into a checkpoint: what it is of, and the size and checksum of each file.

The manifest itself ends with a checksum of the rest. All are CRC-32: it tells damage, not malice,
and reads 3 GB a second where SHA-256 reads 1.
"""

import json
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_CHECKSUM = "crc32"


def write_manifest(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """Completes a checkpoint: what it is of, and what every file of ``folder`` must look like."""
    files = {path.relative_to(folder).as_posix(): _looks(path) for path in _files(folder)}
    facts = {"step": step, "identity": identity, "files": files}
    (folder / MANIFEST).write_bytes(_sealed(facts))


def read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's facts, and what is wrong with it, if anything is.

    Returns:
        ``(facts, damage)``: ``damage`` names the file; ``facts`` (``step``, ``identity``) are empty
        unless they are as they were written.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except OSError as error:
        return {}, f"{MANIFEST} cannot be read ({error.strerror})"
    facts = _unsealed(written)
    if facts is None:
        return {}, f"{MANIFEST} has been changed since it was written"
    for name, look in facts.pop("files").items():
        path = folder / name
        if not path.is_file():
            return facts, f"{name} is missing"
        if path.stat().st_size != look["bytes"]:
            return facts, f"{name} has {path.stat().st_size} bytes, expected {look['bytes']}"
        if _checksum(path) != look["crc32"]:
            return facts, f"{name} has been changed since it was written"
    return facts, None


def _sealed(facts: dict[str, Any]) -> bytes:
    """The manifest's text: the facts, and a checksum of them."""
    checksum = zlib.crc32(json.dumps(facts, allow_nan=False).encode())
    return json.dumps({**facts, _CHECKSUM: checksum}, indent=1).encode()


def _unsealed(written: bytes) -> dict[str, Any] | None:
    """The facts, if sealing them makes the same bytes again; None if anything differs."""
    try:
        facts = json.loads(written)
        del facts[_CHECKSUM]
        same = _sealed(facts) == written
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return facts if same else None


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
