"""The folder of a run that may be killed at any time: every result is written at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results.environment import environment
from benchmarks.results.schema import append, full

# Seconds for the small calls that try each backend.
_LOOK = 60
_QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu,memory.total,compute_mode"
)


@dataclass
class Folder:
    """The folder for results, and what failed so far.

    Rows, outcomes and failures are added to files when they are known. Every other file is written
    whole before it replaces the old one. So a run that is killed leaves what it had found.
    """

    path: Path
    device: str  # cuda or cpu
    started: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)  # what there was no time for
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # the values that every row has
    noted: dict[str, Any] = field(default_factory=dict)  # the content of environment.json
    reasons: dict[str, str] = field(default_factory=dict)  # why our backends cannot run
    summarize: Callable[[Folder], None] = lambda folder: None

    def __post_init__(self) -> None:
        """Makes the folder; if it has results already, another one that is named ``-2``."""
        asked, number = self.path, 1
        while self.path.exists() and any(self.path.iterdir()):
            number += 1
            self.path = asked.with_name(f"{asked.name}-{number}")
        (self.path / "logs").mkdir(parents=True)

    def log(self, name: str) -> Path:
        """The file for the output of a process."""
        return self.path / "logs" / f"{name}.txt"

    @property
    def env(self) -> dict[str, str]:
        """The environment of processes: only a rehearsal on a CPU has Triton's interpreter."""
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if self.device == "cpu":
            env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return env

    @property
    def tests(self) -> Path:
        """The file of the tests' outcomes; see :mod:`benchmarks.measure.suite_plugin`."""
        return self.path / "tests.jsonl"

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder, which is never there in part."""
        part = self.path / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path / name)

    def say(self, text: str) -> None:
        """Prints progress."""
        print(f"{time.monotonic() - self.started:4.0f} s  {text}", flush=True)

    def failure(self, title: str, detail: str) -> None:
        """Writes down what failed and why."""
        self.failed.append(title)
        with (self.path / "failures.txt").open("a", encoding="utf-8") as file:
            file.write(f"{title}\n{detail.rstrip()}\n\n")
        self.say(f"FAILED {title}")

    def row(self, row: dict[str, Any]) -> None:
        """Adds a row to loss.csv."""
        self.rows.append(full(row | self.facts))
        append(self.path / "loss.csv", self.rows[-1:])
        self.summarize(self)

    def note(self, **values: Any) -> None:
        """Adds to environment.json."""
        self.noted |= values
        self.write("environment.json", json.dumps(self.noted, indent=1, default=str) + "\n")

    def environment(self) -> None:
        """Writes environment.json, and keeps the values that every row has."""
        self.facts = environment(self.device) | {"load": os.getloadavg()[0]}
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.note(started=now, **self.facts, nvidia_smi=nvidia_smi())
        if self.device == "cuda":
            of = torch.cuda.get_device_properties(0)
            self.note(memory_bytes=of.total_memory, multiprocessors=of.multi_processor_count)
            self.note(capability=(of.major, of.minor))

    def look(self) -> None:
        """Notes ``bft_kernels.info()`` from a process: it tries each backend and may hang."""
        code = "import json; from bft_kernels import info; print(json.dumps(info()))"
        command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
        found: dict[str, Any] = {}
        try:
            how = {"capture_output": True, "text": True, "timeout": _LOOK, "check": True}
            found = json.loads(subprocess.run(command, cwd=root, env=self.env, **how).stdout)
        except subprocess.SubprocessError as error:  # it failed, or took too long
            self.failure("info", f"{error}\n{error.stderr}")
        self.note(bft_kernels=found)
        device = "cuda:0" if self.device == "cuda" else "cpu"
        # The small call has two tensors of one kind, so their faults are said once.
        self.reasons = {
            name: "; ".join(r for r in devices.get(device, ()) if not r.startswith("weight "))
            for name, devices in found.get("backends", {}).items()
        }


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature of torch's first GPU, if the tool is installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"missing": "no nvidia-smi on PATH"}
    # The tool counts all GPUs of a machine, torch the visible ones.
    identifiers = ["0"]
    if torch.cuda.is_available():
        identifiers.insert(0, f"GPU-{getattr(torch.cuda.get_device_properties(0), 'uuid', '')}")
    missing = ""
    for identifier in identifiers:
        command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader", f"--id={identifier}"]
        try:
            told = subprocess.check_output(command, text=True, timeout=20).strip()
        except (OSError, subprocess.SubprocessError) as error:
            missing += f"{error}; "
        else:
            return dict(zip(_QUERY.split(","), told.split(", "), strict=False))
    return {"missing": missing}


def slug(name: str) -> str:
    """The name of a folder: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
