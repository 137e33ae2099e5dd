"""A checkpoint's last file: the run that it is of, and the size and checksum of each other file.

It ends with a checksum of itself. All are CRC-32, three times as fast as SHA-256: they tell damage,
not malice.
"""

import json
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """Completes a checkpoint: which run it is of, and how each file of ``folder`` must look."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    facts = {"step": step, "identity": identity, "files": files}
    (folder / MANIFEST).write_bytes(_sealed(facts))


def read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's facts (``step``, ``identity``), and what is damaged, if anything is.

    The facts are empty unless they are as they were written.
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
        if _crc32(path) != look["crc32"]:
            return facts, f"{name} has been changed since it was written"
    return facts, None


def _sealed(facts: dict[str, Any]) -> bytes:
    """The manifest's text: the facts, and a checksum of them."""
    checksum = zlib.crc32(json.dumps(facts, allow_nan=False).encode())
    return json.dumps({**facts, "crc32": checksum}, indent=1).encode()


def _unsealed(written: bytes) -> dict[str, Any] | None:
    """The facts, if sealing them makes the same bytes again; None if anything differs."""
    try:
        facts = json.loads(written)
        del facts["crc32"]
        same = _sealed(facts) == written
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return facts if same else None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
