"""Ctrl-C and SIGTERM: the run finishes its step and saves a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from bft.ranks import largest


class Stopped(RuntimeError):
    """The run was asked to stop; the message says where it goes on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.exit_status = 128 + number  # as shells say it


class StopRequest:
    """Within it the first SIGINT or SIGTERM is remembered; a second one does what it did before.

    It does nothing outside of the main thread, in which alone Python calls handlers.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self, accelerator: Any) -> int:
        """The number of a signal that any rank was sent, on every rank; 0 if none was."""
        return largest(accelerator, self.number)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        # Not through sys.stderr: the handler may run in the middle of another write to it.
        text = "stopping as soon as nothing is lost; once more to stop at once"
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
