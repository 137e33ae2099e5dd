"""Checks of tensors. Each error names the argument, the value that came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bft_kernels.values import check_number

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    *,
    since: str = "",
) -> None:
    """Raises unless ``value`` is a tensor of this shape, dtype and device.

    A name in ``shape`` stands for any size. ``since`` says where the expected sizes come from.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    matches = value.dim() == len(shape)
    if matches:
        for want, have in zip(shape, value.shape, strict=True):
            matches = matches and (isinstance(want, str) or want == have)
    if not matches:
        expected = ", ".join([str(size) for size in shape])
        reason = since and f", since {since}"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({expected}){reason}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {expected}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, expected {device}")


def check_cu_seqlens(cu_seqlens: object, total: int, device: torch.device) -> None:
    """Raises unless ``cu_seqlens [S + 1]`` goes from 0 to ``total`` and never falls.

    Values are checked on a CPU only.
    """
    check_boundaries(cu_seqlens, device)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_boundary_values(cu_seqlens, total)


def check_boundaries(cu_seqlens: object, device: torch.device) -> None:
    """Checks type, shape and device of ``cu_seqlens [S + 1]``.

    The boundaries may lie on the CPU while the tokens are on an accelerator. Then the engines see
    where documents end without waiting for the device.
    """
    check_tensor("cu_seqlens", cu_seqlens, ("S + 1",), (torch.int32, torch.int64))
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens: got device {cu_seqlens.device}, expected {device} or the CPU"
        )
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: got shape (0,), expected (S + 1,) with at least one entry")


def check_boundary_values(cu_seqlens: Tensor, total: int) -> None:
    """Raises unless the boundaries go from 0 to ``total`` and never fall. Waits for the device."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens: starts at {first}, expected 0")
    if last != total:
        raise ValueError(f"cu_seqlens: ends at {last}, expected the number of tokens, {total}")
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if falls.numel():
        place = int(falls[0])
        here, there = int(cu_seqlens[place]), int(cu_seqlens[place + 1])
        raise ValueError(
            f"cu_seqlens: falls from {here} to {there} at entry {place + 1}, expected lengths of "
            "at least 0"
        )


def check_items(num_items: Tensor, labelled: Tensor, wait: bool) -> None:
    """Raises unless ``num_items`` is at least 0, and 0 only in a call without labels.

    Labels on a device are read only if ``wait`` allows to wait for the device.
    """
    check_number("num_items", float(num_items), 0)
    visible = wait or labelled.device.type == "cpu"
    if num_items == 0 and visible and bool(labelled.any()):
        raise ValueError(
            f"num_items: got 0 with {int(labelled.sum())} labelled tokens in this call, expected "
            "the number that the whole step divides by, or None to count this call's"
        )


def check_capture(device: torch.device, got: str, expected: str) -> None:
    """Raises in a capture of a CUDA graph on ``device``, for what needs the host or its memory.

    A replay repeats the device's work but not the host's. A captured copy from the host's memory
    reads that memory again, whoever owns it by then. Compiled code is captured later, in the ops.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{got} while a CUDA graph is captured, expected {expected}")


def check_waiting(device: torch.device, check: object) -> None:
    """Refuses ``check=True`` in a capture: it waits for the device, and a capture cannot wait."""
    if check and device.type == "cuda":
        check_capture(device, "check: got True", "None or False: checks of values wait for the GPU")


def check_finite(name: str, value: Tensor, *, rows: Tensor | None = None) -> None:
    """Raises where ``value`` holds a NaN or an infinity. Waits for the device.

    ``rows [N]`` bool: the rows of ``value [N, D]`` to check; ``None`` checks all.
    """
    wrong = ~torch.isfinite(value)
    if rows is not None:
        wrong &= rows[:, None]
    _raise_at(name, value, wrong, "finite numbers")


def check_bias(bias: Tensor) -> None:
    """Raises where ``bias [V]`` holds a NaN or +inf; -inf masks a column. Waits for the device."""
    _raise_at("bias", bias, torch.isnan(bias) | (bias == math.inf), "finite numbers or -inf")


def check_confidence(confidence: Tensor) -> None:
    """Raises unless ``confidence [n]`` lies between 0 and 1. Waits for the device."""
    wrong = ~((confidence >= 0) & (confidence <= 1))
    _raise_at("confidence", confidence, wrong, "probabilities, 0 to 1")


def _raise_at(name: str, value: Tensor, wrong: Tensor, expected: str) -> None:
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"position {place[0]}"
        raise ValueError(
            f"{name}: got {float(value[place])} in {where} ({int(wrong.sum())} such values), "
            f"expected {expected}"
        )
