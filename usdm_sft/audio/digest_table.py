"""The digests of a whole corpus in columns: 70 bytes for each recording, where a dict of tuples takes 600."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_KEY_BYTES = 16  # of the hash that stands for an address: no two of a billion addresses share one
_BATCH = 512

Places = npt.NDArray[np.integer]  # places of addresses: 0 for the first one, in ascending order or not


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
    """The digest of each address, in the order of the addresses. A digest is put at its place, in any order.

    Args:
        addresses: Addresses, which are not copied: the sequence must not change. Duplicates count once.

    Attributes:
        problems: Address -> problem of each bad file, in the order in which they were put.
    """

    def __init__(self, addresses: Sequence[str]):
        self._addresses = addresses
        self._keys, first = _unique(_hash(addresses))
        num = len(first)
        self._positions: Places | None = None  # of the first appearances in `addresses`; None if no address comes twice
        if num and int(first.max()) >= num:
            self._positions = np.sort(first)
            first = np.searchsorted(self._positions, first)
        self._places = first.astype(np.min_scalar_type(num))  # of each key
        del first
        self._sha256 = np.zeros((num, 32), np.uint8)
        self._num_samples, self._seconds = np.zeros(num, np.int64), np.zeros(num, np.float64)
        self._is_set = np.zeros(num, bool)
        self.problems: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        if self._positions is None:
            return islice(self._addresses, len(self))
        return (self._addresses[int(position)] for position in self._positions)

    def __getitem__(self, address: str) -> AudioDigest:
        return self.find_all([address])[0]

    def addresses_at(self, places: Places) -> list[str]:
        """Return the addresses at some places."""
        positions = places if self._positions is None else self._positions[places]
        return [self._addresses[position] for position in positions.tolist()]

    def find_unset(self) -> Places:
        """Return the places that have no digest yet, in ascending order."""
        return np.flatnonzero(~self._is_set)

    def put(self, places: Places, digests: Sequence[AudioDigest | None]) -> int:
        """Put digests at their places, in any order; a None leaves its place as it is. Return how many were put."""
        is_given = np.array([digest is not None for digest in digests], bool)
        given = [digest for digest in digests if digest is not None]
        chosen = places[is_given]
        content = bytes.fromhex("".join(digest.sha256 or "00" * 32 for digest in given))
        self._sha256[chosen] = np.frombuffer(content, np.uint8).reshape(-1, 32)
        self._num_samples[chosen] = [digest.num_samples for digest in given]
        self._seconds[chosen] = [digest.seconds for digest in given]
        self._is_set[chosen] = True
        bad = [(index, digest.problem) for index, digest in enumerate(given) if digest.problem is not None]
        addresses = self.addresses_at(chosen[[index for index, _ in bad]])
        self.problems |= {address: problem for address, (_, problem) in zip(addresses, bad, strict=True)}
        return len(given)

    def find_all(self, addresses: Sequence[str]) -> list[AudioDigest]:
        """Return the digest of each address.

        Raises:
            KeyError: An address is unknown.
        """
        wanted = _hash(addresses)
        found = np.searchsorted(self._keys, wanted)
        known = found < len(self._keys)
        known[known] = self._keys[found[known]] == wanted[known]
        if not known.all():
            raise KeyError(addresses[int(np.argmin(known))])
        places = self._places[found]
        sha256 = self._sha256[places].tobytes().hex()
        columns = zip(addresses, self._num_samples[places].tolist(), self._seconds[places].tolist(), strict=True)
        digests = [
            AudioDigest(sha256[64 * row : 64 * row + 64], num_samples, seconds, self.problems.get(address))
            for row, (address, num_samples, seconds) in enumerate(columns)
        ]
        return [digest if digest.problem is None else digest._replace(sha256="") for digest in digests]

    def select(self, addresses: Sequence[str]) -> AudioDigests:
        """Return the digests of some of the addresses, in their order; `addresses` as in the constructor."""
        selected = AudioDigests(addresses)
        for places, batch in selected.batches():
            selected.put(places, self.find_all(batch))
        return selected

    def batches(self, places: Places | None = None) -> Iterator[tuple[Places, list[str]]]:
        """Yield all addresses, or those at some places, a few hundred at a time and each time with their places."""
        if places is not None:
            for start in range(0, len(places), _BATCH):
                yield places[start : start + _BATCH], self.addresses_at(places[start : start + _BATCH])
            return
        addresses = iter(self)  # faster than access by place
        for start in range(0, len(self), _BATCH):
            batch = list(islice(addresses, _BATCH))
            yield np.arange(start, start + len(batch)), batch

    def iter_sha256(self) -> Iterator[str]:
        """Yield the sha256 of each address; 64 zeros for a bad file."""
        return (row.tobytes().hex() for row in self._sha256)


def _hash(addresses: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return the (num_addresses,) hashes of addresses, which sort and compare as bytes."""
    keys = bytearray()
    for address in addresses:
        keys += hashlib.blake2b(address.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
    return np.frombuffer(keys, f"S{_KEY_BYTES}")


def _unique(keys: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bytes_], Places]:
    """Return the sorted keys, and where each comes first; as `np.unique`, which takes twice the memory."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[1:] != keys[:-1]
    return (keys, order) if is_new.all() else (keys[is_new], order[is_new])
