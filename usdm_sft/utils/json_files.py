"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as JSON in plain ASCII, which no terminal changes."""
    print(json.dumps(value, indent=2))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose top-level value is an object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON, or its top-level value is not an object.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a file: name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): correct the file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(values).__name__}: correct the file")
    return values
