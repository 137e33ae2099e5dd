"""Compiles the extension while other parts run."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import time

import torch

from benchmarks.measure.processes import ROOT, kill_group, start, tail
from benchmarks.results.folder import Folder


class Build:
    """Compiles the extension while everything else runs.

    On a GPU that is ``bft_kernels._cuda`` for this GPU alone; it replaces an older one when it is
    whole. A rehearsal compiles ``_cpu``, and leaves it in its build folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.started = folder, time.monotonic()
        self.built = ROOT / "build" / f"gpu-{folder.device}"
        settings = {"BFT_BUILD": folder.device}
        if folder.device == "cuda":  # images set the variable for every GPU
            settings["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(0))
        else:
            settings["CXXFLAGS"] = "-O0"
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(self.built)]
        command += ["--build-lib", str(self.built / "lib")]
        self.log = folder.log("build")
        self.process = start(command, folder.env | settings, self.log)

    def finish(self, until: float) -> None:
        """Waits for the build, and notes the reason if it made no module."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
            status, reason = ("ok", "") if code == 0 else ("failed", tail(self.log))
        except subprocess.TimeoutExpired:
            limit = time.monotonic() - self.started
            status, reason = "cut", f"the build was not done after {limit:.0f} s"
        finally:
            kill_group(self.process)
        if "no nvcc" in reason:
            status = "unavailable"
        seconds = round(time.monotonic() - self.started, 1)
        device = self.folder.device
        told = {"module": device, "status": status, "seconds": seconds, "reason": reason}
        self.folder.note(build=told)
        self.folder.say(f"build of _{device}: {status}")
        if status == "failed":
            self.folder.failure("build", reason)
        elif status == "cut":
            self.folder.cut.append(f"build: {reason}")
        # _cuda is built before _cpu, which may be the one that failed.
        installs = status in ("ok", "failed") and device == "cuda"
        for built in self.built.glob("lib/bft_kernels/_cuda*.so") if installs else ():
            target = ROOT / "bft_kernels" / built.name
            shutil.copy2(built, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)
        importlib.invalidate_caches()
