"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is something else.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a file: name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): correct the file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: correct the file")
    return values
