"""What a run asks of the source of its units, whatever it is: a k-means on a speech encoder, a codec, or the corpus itself."""

from __future__ import annotations

from typing import Any, Protocol

from usdm_sft.template.streams import UnitStreams


class UnitSource(Protocol):
    """The source of the units of a run: a `UnitTokenizer`, which also turns audio into units, or `GivenUnits` of the corpus."""

    @property
    def streams(self) -> UnitStreams:
        """The frames per second, the number of units of each stream, and what rows keep of several streams."""

    @property
    def num_units(self) -> int:
        """Number of different units in the rows."""

    @property
    def settings(self) -> dict[str, Any]:
        """What units depend on beside the corpus and the unit model, as `settings` of counts.json; JSON values."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that units depend on beside the bytes of the corpus; JSON values."""

    @property
    def digest(self) -> str | None:
        """sha256 of the unit model; None where there is none."""

    def describe(self) -> dict[str, Any] | None:
        """Return what counts.json says of the unit model; None where there is none."""
