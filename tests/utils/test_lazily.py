"""Lazy items are made when they are asked for."""

import pytest

from usdm_sft.utils.lazily import Lazily


def test_lazy_items_are_made_at_each_access():
    made = []
    items = Lazily(lambda index: made.append(index) or index * 2, 4)
    assert made == [] and len(items) == 4
    assert (items[1], items[-1], items[1:3], list(items)) == (2, 6, [2, 4], [0, 2, 4, 6])
    assert made == [1, 3, 1, 2, 0, 1, 2, 3]
    with pytest.raises(IndexError):
        items[4]
