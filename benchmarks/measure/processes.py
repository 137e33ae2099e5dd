"""Processes that measure, which may fail or hang without taking their parent along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def spawn(
    target: Callable[..., None], *arguments: Any, daemon: bool = False
) -> tuple[Any, Connection]:
    """A fresh process that runs ``target(sender, *arguments)``, and the connection's other end.

    A daemon ends with this process, and can have no children of its own.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments), daemon=daemon)
    process.start()
    sender.close()
    return process, receiver


def ask(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> Any:
    """What a process of :func:`spawn` sends.

    Raises:
        RuntimeError: it ended before.
    """
    process, receiver = spawn(target, *arguments, daemon=daemon)
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        process.join()


def start(command: list[str], env: dict[str, str], log: Path, **how: Any) -> Any:
    """A process in a session of its own, whose output goes to the end of a file."""
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
    """Ends a process that leads a session, and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, start: int = 0, characters: int = 6000) -> str:
    """The end of what a log has from a place on."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-characters:]


def first_line(error: object) -> str:
    """Enough of a message for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def explain(error: Exception) -> str:
    """Its kind too."""
    return f"{type(error).__name__}: {first_line(error)}"
