"""Processes that measure, which may fail or hang without taking their parent along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def in_fresh_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """Returns, or raises, what a function does in a fresh process; RuntimeError if that died."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def start(command: list[str], env: dict[str, str], log: Path, **how: Any) -> Any:
    """Starts a process in a session of its own; its output goes to the end of a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **how,
        )


def kill_group(process: Any) -> None:
    """Ends a process that leads a session, and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, start: int = 0, characters: int = 6000) -> str:
    """The end of a log, at most back to ``start``."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-characters:]


def first_line(error: object) -> str:
    """The first line of a message, for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def explain(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {first_line(error)}"
