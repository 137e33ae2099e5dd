"""The environment of a measurement: commit, device and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ABSENT = "not installed"
# Packages beside torch, Triton and this one.
_OTHERS = ("transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "verl")


def version(distribution: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def environment(device: str) -> dict[str, Any]:
    """Commit, device, thread count and versions, also those of installed peers."""
    others = {name: version(name) for name in _OTHERS}
    return {
        "commit": _commit(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "triton": version("triton"),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "bft-kernels": version("bft-kernels"),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {v}" for name, v in others.items() if v != ABSENT),
    }


def _commit() -> str:
    """The commit of the working tree, marked if that has changed; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    how = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True}
    try:
        return subprocess.check_output(command, **how).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    """The processor's own name, if the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
