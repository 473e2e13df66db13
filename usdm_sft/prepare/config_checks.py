"""What the settings of prepare may be: their types and ranges, and the words for both."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from usdm_sft.template.config import EXPECTED_LOSS, EXPECTED_PARTS, Template

# The least value of settings that are whole numbers.
MINIMUM = {
    "max_length": 1,
    "shard_dialogs": 1,
    "num_output_shards": 1,
    "num_proc": 1,
    "agreement_utterances": 1,
    "tasks": 1,
    "num_gpus": 0,
    "shuffle_seed": 0,
}
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    dict: 'names and values, such as {partition: NAME, time: "04:00:00"}',
    tuple: EXPECTED_LOSS,
    Template: "a dailytalk_usdm.Template, such as Template(loss=('user_text',))",
}


def describe_type(hint: Any, name: str = "") -> str:
    """Say what a type hint asks for, such as "a whole number" for `int | None`.

    Args:
        hint: The type hint of a setting.
        name: The setting, of which two lists have the same type.
    """
    if name == "template.parts":
        return EXPECTED_PARTS
    hint = _alternatives(hint)[0]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _EXPECTED[get_origin(hint) or hint]


def check_settings(hints: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check type and range of each setting.

    Args:
        hints: The type hint of each setting, as `typing.get_type_hints` returns them.
        settings: The values by name.

    Raises:
        ValueError: A value is of another type, or out of its range.
    """
    for name, value in settings.items():
        _check_setting(name, value, hints[name])


def _check_setting(name: str, value: Any, hint: Any) -> None:
    first, *others = _alternatives(hint)
    if value is None and NoneType in others:
        return
    if get_origin(first) is Literal and isinstance(value, str):
        if value not in get_args(first):
            raise ValueError(f"{name} {value!r} is unknown: choose {describe_type(hint)}")
    elif not any(_is_instance(value, kind) for kind in (first, *others)):
        kind = "" if value is None else f", a value of type {type(value).__name__}"
        raise ValueError(f"{name} is {value!r}{kind}: give {describe_type(hint)}")
    if first is float and not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: give a positive number")
    if name in MINIMUM and value < MINIMUM[name]:
        raise ValueError(f"{name} is {value}: give {'0 or more' if MINIMUM[name] == 0 else 'a positive number'}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone; `int | None` -> (int, NoneType)."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_instance(value: Any, kind: Any) -> bool:
    if kind in (int, float):  # True is an int for Python
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    return get_origin(kind) is not Literal and isinstance(value, get_origin(kind) or kind)
