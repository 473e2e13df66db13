"""Runs of equal units: collapsed and expanded, and the template with collapsed units."""

import json
import pickle
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dailytalk_usdm import collapse_units, expand_units
from tests.helpers import ids_and_labels
from tests.template.test_chat import make_tokenizer
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder
from usdm_sft.template.repetition import find_problem

# Few different units, so that they repeat.
UNITS = st.lists(st.integers(0, 3), max_size=40)
ROW = {"user_units": [5, 5, 7, 5], "user_text": "Where?", "agent_text": "at home.", "agent_units": [3, 3, 3]}
COLLAPSED = ROW | {"user_units": [5, 7, 5], "agent_units": [3]}


def batch(row):
    return {name: [row[name]] for name in COLUMNS}


@settings(deadline=None)
@given(units=UNITS)
def test_units_are_those_of_the_runs_and_come_back(units):
    found, durations = collapse_units(units)
    assert found.tolist() == [unit for unit, _ in groupby(units)]
    assert durations.tolist() == [len(list(run)) for _, run in groupby(units)]
    assert durations.dtype == np.uint16
    assert expand_units(found, durations).tolist() == units
    assert find_problem(found, durations) is None


@settings(deadline=None)
@given(runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=20))
def test_collapsed_units_are_those_that_were_expanded(runs):
    runs = [next(run) for _, run in groupby(runs, key=lambda run: run[0])]
    units, durations = [unit for unit, _ in runs], [duration for _, duration in runs]
    found = collapse_units(expand_units(np.array(units, np.uint16), durations))
    assert [each.tolist() for each in found] == [units, durations]
    assert found[0].dtype == np.uint16


def test_a_run_of_65535_units_fits_and_a_longer_one_is_refused():
    units, durations = collapse_units(np.full(65_535, 9, np.uint16))
    assert (units.tolist(), durations.tolist()) == ([9], [65_535])
    assert len(expand_units(units, durations)) == 65_535
    message = r"unit 9 follows itself 65,536 times, but a duration is at most 65,535: leave the rec"
    with pytest.raises(ValueError, match=message):
        collapse_units([1, *[9] * 65_536])


def test_units_and_durations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="units have 2 dimensions: give a flat list"):
        collapse_units([[1, 2]])
    with pytest.raises(ValueError, match=r"units of shape \(2,\) have durations of shape \(1,\): give one per unit"):
        expand_units([1, 2], [3])


@pytest.mark.parametrize(
    ("units", "durations", "problem"),
    [
        ([1, 2], [3], "2 units, but 1 durations"),
        ([1, 2, 2], [1, 1, 1], "unit 2 at position 2 equals the one before, but the units are collapsed"),
        ([1, 2], [1, 0], "the duration at position 1 is 0"),
    ],
)
def test_problems_are_named(units, durations, problem):
    assert find_problem(units, durations) == problem


@pytest.fixture(scope="module", params=["separate", "chat"])
def encoders(request):
    tokenizer, template = make_tokenizer(), Template(tokenization=request.param)
    return [TemplateEncoder(tokenizer, template, unit_repetition=each) for each in ("keep", "collapse")]


def test_ids_are_those_of_the_collapsed_units(encoders):
    keep, collapse = encoders
    expected = ids_and_labels(keep, batch(COLLAPSED))
    for row in (ROW, COLLAPSED):  # collapsed units stay as they are
        assert ids_and_labels(collapse, batch(row)) == expected
    assert len(ids_and_labels(keep, batch(ROW))[0]) == len(expected[0]) + 3


def test_prompts_are_collapsed_as_the_rows_are(encoders):
    keep, collapse = encoders
    ids = collapse(batch(ROW))["input_ids"][0].tolist()
    for number in (1, 2, 3):
        prompt = collapse.prompt(*[ROW[name] for name in COLUMNS[:number]]).tolist()
        assert ids[: len(prompt)] == prompt
    history = [tuple(ROW[name] for name in COLUMNS)]
    kept = keep.prompt(COLLAPSED["user_units"], history=[tuple(COLLAPSED[name] for name in COLUMNS)])
    assert collapse.prompt(ROW["user_units"], history=history).tolist() == kept.tolist()


def test_key_names_the_repetition_only_where_units_are_collapsed(encoders):
    keep, collapse = encoders
    assert "unit_repetition" not in json.dumps(keep.key) and keep.key != collapse.key
    for each in encoders:
        copy = pickle.loads(pickle.dumps(each))
        assert copy.key == each.key
        assert ids_and_labels(copy, batch(ROW)) == ids_and_labels(each, batch(ROW))


def test_unknown_repetition_is_refused(small_tokenizer):
    with pytest.raises(ValueError, match="unit_repetition is 'drop': give keep or collapse"):
        TemplateEncoder(small_tokenizer, unit_repetition="drop")
