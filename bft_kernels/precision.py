"""Settings of the process that make matrix products less exact do not reach a loss's products.

A process can allow TF32 and bfloat16 inside float32 products, and float16 sums. A loss promises
float32, and its backward must draw the same sample as its forward. So a loss takes its products in
a narrow type only if autocast or the tensors' own type asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Undo = Callable[[], None]

_PLAIN = ("none", "ieee")  # values of `fp32_precision` that leave float32 as it is


def own_settings(x: Tensor) -> AbstractContextManager[object]:
    """A context on the device of ``x``: no autocast, and products as exact as their type."""
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return _exact
    stack = contextlib.ExitStack()
    stack.enter_context(torch.cuda.device_of(x))
    stack.enter_context(torch.autocast(x.device.type, enabled=False))
    stack.enter_context(_exact)
    return stack


class _Exact:
    """Clears the settings when a first thread enters, and restores them when the last one leaves.

    Autograd runs the backward of each device in its own thread. If each thread saved and restored
    the settings, the last to end could restore what another had cleared.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo: list[Undo] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._undo = [*_sum_in_float32(), *_multiply_in_float32()]
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for undo in self._undo:
                    undo()
                self._undo = []


_exact = _Exact()


def _sum_in_float32() -> list[Undo]:
    """For float16 operands: if their sums are in float16, torch refuses a float32 result."""
    matmul = torch.backends.cuda.matmul
    if not matmul.allow_fp16_accumulation:
        return []
    matmul.allow_fp16_accumulation = False
    return [lambda: setattr(matmul, "allow_fp16_accumulation", True)]


def _multiply_in_float32() -> list[Undo]:
    """For float32 operands. Returns the steps that restore the old settings, in their order."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        return _highest()
    backends: Any = torch.backends
    places = ((backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn))
    before = places[0][0].fp32_precision, places[1][0].fp32_precision
    if before[0] in _PLAIN and before[1] in _PLAIN:
        return []
    # A setting made by its old name is cleared by that name too: the profiler reads the old name,
    # and torch raises where the two disagree.
    undo = _highest()
    for (place, above), value in zip(places, before, strict=True):
        # An inherited value is restored as "none", so that it still follows the setting above.
        own = "none" if value == above.fp32_precision else value
        undo.append(functools.partial(_set_precision, place, own))
        place.fp32_precision = "ieee"
    return undo


def _set_precision(place: Any, value: str) -> None:
    place.fp32_precision = value


def _highest() -> list[Undo]:
    """Sets the precision by its old name to highest, unless only its new name was set."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new name was set
        return []
    if before == "highest":
        return []
    torch.set_float32_matmul_precision("highest")
    return [functools.partial(torch.set_float32_matmul_precision, before)]
