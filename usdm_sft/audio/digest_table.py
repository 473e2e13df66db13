"""The digests of a whole corpus in columns: 80 bytes for each recording, where a dict of tuples takes 600."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_KEY_BYTES = 16  # of the hash that stands for an address: no two of a billion addresses share one


class AudioDigest(NamedTuple):
    """Digest, length and check of an audio file.

    Attributes:
        sha256: Digest of the content, or of the content and the stretch; "" for a bad file.
        num_samples: Number of samples at 16 kHz.
        seconds: Duration.
        problem: Why the file is bad, without the path; None if it is good.
    """

    sha256: str
    num_samples: int
    seconds: float
    problem: str | None = None


class AudioDigests(Mapping[str, AudioDigest]):
    """The digest of each address, in the order of the addresses.

    Args:
        addresses: Addresses, which are not copied: each iteration over them gives the same ones again. Duplicates count once.

    Attributes:
        problems: Address -> problem of each bad file.
    """

    def __init__(self, addresses: Iterable[str]):
        self._addresses = addresses
        keys, first = np.unique(_hash(addresses), return_index=True)
        num_addresses = int(first.max()) + 1 if len(first) else 0
        self._is_first = np.zeros(
            num_addresses, bool
        )  # False for a duplicate; those after the last new one need no mark
        self._is_first[first] = True
        self._keys, self._rows = keys, (np.cumsum(self._is_first) - 1)[first]
        self._sha256, self._num_samples, self._seconds = bytearray(), array("q"), array("d")
        self.problems: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return compress(self._addresses, self._is_first)

    def __getitem__(self, address: str) -> AudioDigest:
        return self.find_all([address])[0]

    def append(self, address: str, digest: AudioDigest) -> None:
        """Add the digest of the next address."""
        self._sha256 += bytes.fromhex(digest.sha256) if digest.sha256 else bytes(32)
        self._num_samples.append(digest.num_samples)
        self._seconds.append(digest.seconds)
        if digest.problem is not None:
            self.problems[address] = digest.problem

    def find_all(self, addresses: Sequence[str]) -> list[AudioDigest]:
        """Return the digest of each address.

        Raises:
            KeyError: An address is unknown.
        """
        wanted = _hash(addresses)
        places = np.searchsorted(self._keys, wanted)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == wanted[known]
        if not known.all():
            raise KeyError(addresses[int(np.argmin(known))])
        return [self._at(row, address) for row, address in zip(self._rows[places].tolist(), addresses, strict=True)]

    def _at(self, row: int, address: str) -> AudioDigest:
        problem = self.problems.get(address) if self.problems else None
        sha256 = "" if problem is not None else self._sha256[32 * row : 32 * row + 32].hex()
        return AudioDigest(sha256, self._num_samples[row], self._seconds[row], problem)

    def select(self, addresses: Iterable[str]) -> AudioDigests:
        """Return the digests of some of the addresses, in their order; `addresses` as in the constructor."""
        selected = AudioDigests(addresses)
        remaining = iter(selected)
        while batch := list(islice(remaining, 512)):
            for address, digest in zip(batch, self.find_all(batch), strict=True):
                selected.append(address, digest)
        return selected

    def iter_sha256(self) -> Iterator[str]:
        """Yield the sha256 of each address; 64 zeros for a bad file."""
        return (self._sha256[start : start + 32].hex() for start in range(0, len(self._sha256), 32))


def _hash(addresses: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return the (num_addresses,) hashes of addresses, which sort and compare as bytes."""
    keys = bytearray()
    for address in addresses:
        keys += hashlib.blake2b(address.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
    return np.frombuffer(bytes(keys), f"S{_KEY_BYTES}")
