"""Checks of plain values. They import no torch, and their errors say what came and was expected."""

import math
from collections.abc import Sequence


def check_type(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raises unless ``value`` is a ``kind``. The message calls that kind ``what``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {what}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raises unless ``value`` is finite and ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (low <= value <= high and value < math.inf):  # isinf cannot be traced
        expected = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name}: got {value}, expected a finite number {expected}")


def check_positive(name: str, value: object, high: float = math.inf) -> None:
    """Raises unless ``value`` is finite and ``0 < value <= high``."""
    check_number(name, value, 0, high)
    if value == 0:
        raise ValueError(f"{name}: got {value}, expected a number above 0")


def check_int(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    """Raises unless ``value`` is an int from ``low`` to ``high`` (by default what 64 bits hold)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < low:
        raise ValueError(f"{name}: got {value}, expected at least {low}")
    if value > high:
        raise ValueError(f"{name}: got {value}, expected at most {high}")


def check_bool(name: str, value: object) -> None:
    """Raises unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
