"""The folder of one run of ``python -m benchmarks gpu``: every result is written when it exists."""

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

from benchmarks.providers.candidates import CANDIDATES
from benchmarks.results.schema import append, environment, version

# Seconds for what each backend tries.
_LOOK = 60
COLUMNS = (
    "provider",
    "family",
    "status",  # ok, wrong, failed, out of memory, cut, unavailable
    "reason",
    "tokens",
    "width",
    "vocabulary",
    "scaled_down_from",
    "dtype",
    "seconds",
    "fastest_seconds",
    "slowest_seconds",
    "turns",
    "bare_seconds",
    "times_g",
    "tokens_per_second",
    "extra_bytes",
    "first_seconds",
    "eps",
    "entries_per_token",  # expected, from the probabilities
    "listed_per_token",  # by the forward, before the backward thins them
    "error_loss",
    "error_hidden",
    "error_weight",
)
_QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu,memory.total,compute_mode"
)


@dataclass
class Record:
    """Where results go, and what went wrong so far.

    Rows, outcomes and failures are added to files when they are known; what is written anew
    replaces its file when it is whole. So a run that is killed leaves what it had found.
    """

    folder: Path
    device: str  # cuda or cpu
    started: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)  # no time was left for it
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # that every row names
    noted: dict[str, Any] = field(default_factory=dict)  # what environment.json has
    reasons: dict[str, str] = field(default_factory=dict)  # why our backends cannot run
    summarize: Callable[[Record], None] = lambda record: None

    def open(self) -> None:
        """Makes the folder; one that holds results stays as it is, and the next is named ``-2``."""
        asked, number = self.folder, 1
        while self.folder.exists() and any(self.folder.iterdir()):
            number += 1
            self.folder = asked.with_name(f"{asked.name}-{number}")
        (self.folder / "logs").mkdir(parents=True)

    def log(self, name: str) -> Path:
        """What a process prints."""
        return self.folder / "logs" / f"{name}.txt"

    @property
    def tests(self) -> Path:
        """How each test ended, see :mod:`benchmarks.measure.suite_plugin`."""
        return self.folder / "tests.jsonl"

    def write(self, name: str, text: str) -> None:
        """A file of the folder, which is never there in part."""
        part = self.folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.folder / name)

    def say(self, text: str) -> None:
        """Prints progress."""
        print(f"{time.monotonic() - self.started:4.0f} s  {text}", flush=True)

    def failure(self, title: str, detail: str) -> None:
        """Writes down what failed and why."""
        self.failed.append(title)
        with (self.folder / "failures.txt").open("a", encoding="utf-8") as file:
            file.write(f"{title}\n{detail.rstrip()}\n\n")
        self.say(f"FAILED {title}")

    def row(self, row: dict[str, Any]) -> None:
        """Adds a row to loss.csv."""
        full = dict.fromkeys(COLUMNS, "") | row
        self.rows.append(full)
        append(self.folder / "loss.csv", [full | self.facts])
        self.summarize(self)

    def environment(self) -> None:
        """Writes environment.json, and keeps what every row names of it."""
        cuda = torch.version.cuda or torch.version.hip or ""
        self.facts = environment(self.device) | {"triton": version("triton"), "cuda": cuda}
        peers = [c.distribution for c in CANDIDATES if c.distribution is not None]
        self.note(
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.facts,
            peers={name: version(name) for name in peers},
            nvidia_smi=nvidia_smi(),
        )
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.note(
                memory_bytes=properties.total_memory,
                multiprocessors=properties.multi_processor_count,
                capability=torch.cuda.get_device_capability(0),
            )

    def look(self, env: dict[str, str]) -> None:
        """Notes ``bft_kernels.info()``, which tries each backend, from a process: it may hang."""
        code = "import json; from bft_kernels import info; print(json.dumps(info()))"
        found: dict[str, Any] = {}
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parents[2],
                env=env,
                capture_output=True,
                text=True,
                timeout=_LOOK,
                check=True,
            )
            found = json.loads(done.stdout)
        except subprocess.CalledProcessError as error:
            self.failure("info", f"its process ended with {error.returncode}\n{error.stderr}")
        except subprocess.TimeoutExpired:
            self.failure("info", f"its process was not done after {_LOOK} s")
        self.note(bft_kernels=found)
        self.reasons = {
            name: "; ".join(devices.get(f"{self.device}:0", ()))
            for name, devices in found.get("backends", {}).items()
        }

    def note(self, **values: Any) -> None:
        """Adds to environment.json."""
        self.noted |= values
        self.write("environment.json", json.dumps(self.noted, indent=1, default=str) + "\n")


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature of torch's first GPU, where the tool is there."""
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
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            missing += f"{error}; "
            continue
        values = done.stdout.strip().split(", ")
        return dict(zip(_QUERY.split(","), values, strict=False))
    return {"missing": missing}


def slug(name: str) -> str:
    """A name for a folder: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
