"""What a check of the set-up finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # a re-export

from usdm_sft.utils.texts import first_line


class Finding(NamedTuple):
    """One line of the doctor. The message of a warning or an error ends with the remedy."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<9}{self.subject}: {self.message}"


@dataclass
class Needs:
    """What a run will fetch and write. The checks fill it in, and the check of the disk reads it.

    Attributes:
        online: Whether files can be fetched.
        model_bytes: Bytes that the model cache must hold at once.
        audio_seconds: Seconds of all recordings of the corpus; 0 if it was not read.
        audio_bytes: Size of these recordings as mono of 16 bits.
    """

    online: bool = False
    model_bytes: int = 0
    audio_seconds: float = 0.0
    audio_bytes: float = 0.0


def run_check(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. An error that the check raises becomes a finding, with the remedy of its message."""
    try:
        yield from check()
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError, HTTPError) as error:
        yield Finding("error", subject, first_line(error))
