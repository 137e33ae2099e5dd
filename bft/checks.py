"""Checks of settings. Each error names the setting, what came and what was expected."""

import math


def check_int(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    """Raises unless ``value`` is an int of ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < low:
        raise ValueError(f"{name}: got {value}, expected at least {low}")
    if value > high:
        raise ValueError(f"{name}: got {value}, expected at most {high}")


def check_number(name: str, value: object, high: float = math.inf) -> None:
    """Raises unless ``value`` is a finite number of 0 to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (0 <= value <= high and math.isfinite(value)):
        expected = "at least 0.0" if math.isinf(high) else f"between 0.0 and {high}"
        raise ValueError(f"{name}: got {value}, expected a finite number {expected}")
