"""Files that come inside Python packages, and where what is made of them is kept."""

import importlib.metadata
import os
from pathlib import Path


class PretrainedError(RuntimeError):
    """A model that cannot be had; the message says what to install or what went wrong."""


def cache_root() -> Path:
    """`$BFT_CACHE`, or `bft` in the XDG cache folder."""
    if own := os.environ.get("BFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bft"


def packaged_file(distribution: str, file: str, *, install: str) -> Path:
    """A data file of an installed package, found without importing it.

    Raises PretrainedError, with the command to run, if the package or the file is missing.
    """
    try:
        package = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        what = f"the package {distribution!r} is not installed"
        raise PretrainedError(f"{what}; run: {install}") from None
    path = Path(str(package.locate_file(file)))
    if not path.is_file():
        raise PretrainedError(f"{distribution} {package.version} holds no {file}; run: {install}")
    return path
