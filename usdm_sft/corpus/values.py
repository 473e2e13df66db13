"""Values of the cells of a table, in any spelling."""

import math
from typing import Any

UNITS = "units"  # required in place of audio where units are wanted
_NUMBERS = ("turn", "start", "end", "channel")


def is_missing(value: Any, name: str) -> bool:
    """Return True for no value, an empty one, and NaN, which is how pandas writes a missing value."""
    if name == UNITS and not isinstance(value, str | float):
        return value is None
    if value is None or value == "" or value != value:
        return True
    return isinstance(value, str) and name in _NUMBERS and value.lower() == "nan"


def number_of(value: Any) -> float | None:
    """Return a finite number in any spelling of a table, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not math.isfinite(number) else number


def whole_number(value: Any) -> int | None:
    """Return a whole number in any spelling of a table, such as 1, "1" and "1.0", or None."""
    number = number_of(value)
    return int(number) if number is not None and number == int(number) else None
