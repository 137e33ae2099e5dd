"""What this installation consists of, and what it can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from bft_kernels import __version__
from bft_kernels.dispatch import BACKENDS, backend_package, why_not
from bft_kernels.problem import Traits

_PACKAGES = ("triton", "transformers", "accelerate", "peft", "numpy")
_EXTENSIONS = {"cpu": "bft_kernels._cpu", "cuda": "bft_kernels._cuda"}


def info() -> dict[str, Any]:
    """Versions, devices, compiled extensions, and each backend's reasons not to run, by device.

    Returns:
        A dictionary of ``versions``, ``devices``, ``extensions`` and ``backends``.
        ``backends[name][device]`` lists reasons, and is empty where the backend runs. On the
        current GPU a small call finds that out. Other GPUs are judged by their properties alone, so
        that no memory is taken on them.
    """
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return {
        "versions": {
            "bft-kernels": __version__,  # of this code, installed or not
            "python": platform.python_version(),
            "torch": torch.__version__,  # says "+cpu" etc., which metadata may leave out
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": devices,
        "extensions": {name: _extension(module) for name, module in _EXTENSIONS.items()},
        "backends": {
            backend: {device: _reasons(backend, device) for device in devices}
            for backend in BACKENDS
        },
    }


def _extension(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not built"
    if module != _EXTENSIONS["cpu"]:
        return "built"
    from bft_kernels import _cpu

    threads = "OpenMP" if _cpu.has_openmp() else "std::thread"
    return f"built, runs {_cpu.instruction_set()} on {threads}"


def _reasons(backend: str, device: str) -> list[str]:
    probe = Traits(torch.device(device), torch.float32)
    if probe.device.type == "cuda" and probe.device.index != torch.cuda.current_device():
        reasons: list[str] = backend_package(backend).why_not(probe, probe)
        return reasons
    try:
        return why_not(backend, probe, probe)
    except RuntimeError as error:  # such as that the GPU's memory is taken
        return [f"not tried: {str(error).splitlines()[0]}"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
