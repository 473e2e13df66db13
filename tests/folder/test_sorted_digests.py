"""Digests in sorted files."""

import numpy as np
import pytest

from usdm_sft.folder import sorted_digests
from usdm_sft.folder.sorted_digests import (
    DigestTable,
    as_pairs,
    digest_texts,
    iter_stretches,
    merge_digests,
    write_digests,
)


def halves(*pairs):
    """Digests with these halves."""
    return np.array(pairs, "<u8").tobytes()


def test_digests_are_128_bits_of_blake2b():
    # RFC 7693: the digest length is a parameter of the hash, so that these are not the first bytes of a longer digest
    assert digest_texts([b"", b"abc"]).hex() == "cae66941d9efbd404e4d88758ea67670cf4ab791c62b8d2b2109c90275287816"


@pytest.mark.parametrize("in_memory", [1, 2, 1000])
def test_every_digest_is_in_one_stretch(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sorted_digests, "_IN_MEMORY", in_memory)
    top = 2**64 - 1
    write_digests(tmp_path / "0.npy", halves((top, 0), (0, 5), (2**63, 1)), first=7)
    write_digests(tmp_path / "1.npy", halves((0, 5), (0, 4)))
    stretches = list(iter_stretches([tmp_path / "0.npy", tmp_path / "1.npy"]))
    assert len(stretches) == -(-5 // in_memory)
    assert [np.concatenate(parts).tolist() for parts in zip(*stretches, strict=True)] == [
        [(0, 5, 8), (2**63, 1, 9), (top, 0, 7)],
        [(0, 5, 0), (0, 4, 1)],
    ]


@pytest.mark.parametrize("in_memory", [1, 2, 1000])
def test_table_finds_the_last_content_of_a_key(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sorted_digests, "_IN_MEMORY", in_memory)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    write_digests(files[0], halves((3, 1), (3, 2), (9, 9)), contents=halves((1, 0), (2, 0), (3, 0)))
    write_digests(files[1], halves((3, 1), (1, 1)), contents=halves((4, 0), (5, 6)))
    merge_digests(files, str(tmp_path))
    keys = [(9, 9), (3, 1), (3, 2), (1, 1), (3, 3), (3, 0), (0, 0), (2**64 - 1, 0)]
    found, contents = DigestTable.open(str(tmp_path)).find(halves(*keys))
    assert found.tolist() == [True, True, True, True, False, False, False, False]
    assert contents[:4].tolist() == [[3, 0], [4, 0], [2, 0], [5, 6]]


def test_table_without_keys(tmp_path):
    merge_digests([], str(tmp_path))
    found, contents = DigestTable.open(str(tmp_path)).find(halves((1, 2)))
    assert (found.tolist(), contents.tolist()) == ([False], [[0, 0]])
    assert as_pairs(halves((1, 2))).tolist() == [[1, 2]]
