"""Histograms add up exactly, whatever the numbers are, and their bins are as narrow as they can be."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from belt_tasks.histograms import FINEST, MOST_BINS, MOST_INDEX, Histogram, aligned

ANY = st.floats(allow_nan=False, allow_infinity=False)
MODERATE = st.floats(-1e6, 1e6)
PROBABILITIES = st.floats(0.0, 1.0)


def lists(numbers, **bounds):
    return st.one_of(st.lists(kind, max_size=40, **bounds) for kind in numbers)


@given(parts=st.lists(lists([ANY, MODERATE, PROBABILITIES]), min_size=1, max_size=4))
@example(parts=[[-5e-324], [1e300], [0.0]])
@example(parts=[[-1.7e308, 1.7e308], [-1e-30]])
def test_histograms_of_parts_are_added_that_of_the_whole(parts):
    whole = Histogram.of([value for part in parts for value in part])

    forth, back = Histogram(), Histogram()
    for part in parts:
        forth = forth + Histogram.of(part)
    for part in reversed(parts):
        back = Histogram.of(part) + back

    assert forth == back == whole


@given(values=lists([MODERATE, PROBABILITIES], min_size=1))
def test_a_bin_counts_the_numbers_between_its_edges(values):
    found = Histogram.of(values)

    edges = np.ldexp(np.arange(found.first, found.stop + 1, dtype=float), found.exponent)
    expected = [sum(low <= value < high for value in values) for low, high in itertools.pairwise(edges)]
    assert list(found.counts) == expected
    assert sum(found.counts) == len(values)


@given(values=lists([ANY, MODERATE, PROBABILITIES], min_size=1))
def test_bins_are_as_narrow_as_so_few_of_them_can_be(values):
    found = Histogram.of(values)

    assert len(found.counts) <= MOST_BINS
    assert found.counts[0]
    assert found.counts[-1]
    width = math.ldexp(1.0, found.exponent - 1)
    narrower = [math.floor(value / width) for value in (min(values), max(values))]
    is_needed = narrower[1] - narrower[0] >= MOST_BINS or max(map(abs, narrower)) > MOST_INDEX
    assert found.exponent == FINEST or is_needed


def test_years_are_told_apart_though_they_are_much_alike():
    years = Histogram.of([1990.0, 1991.0, 1991.5, 2026.0])

    assert sum(years.counts) == 4
    assert sum(count > 0 for count in years.counts) == 4


@given(values=lists([MODERATE, PROBABILITIES], min_size=1), more=st.integers(0, 70))
def test_wider_bins_are_those_of_the_numbers_themselves(values, more):
    found = Histogram.of(values)

    wider = found.coarsened(found.exponent + more)

    index = [math.floor(math.ldexp(value, -wider.exponent)) for value in values]
    index = [min(place, -1) if value < 0 else place for place, value in zip(index, values, strict=True)]
    assert [wider.first, *wider.counts] == [min(index), *np.bincount(np.array(index) - min(index)).tolist()]


@given(one=lists([MODERATE, PROBABILITIES]), two=lists([MODERATE, PROBABILITIES], min_size=1), most=st.integers(2, 300))
def test_two_histograms_are_counted_in_the_same_bins(one, two, most):
    edges, one_B, two_B = aligned(Histogram.of(one), Histogram.of(two), most_bins=most)

    assert len(edges) - 1 == len(one_B) == len(two_B) <= most
    for values, counts_B in ((one, one_B), (two, two_B)):
        assert (
            counts_B.tolist()
            == np.histogram(values, np.append(edges[:-1], np.nextafter(edges[-1], -np.inf)))[0].tolist()
        )


@pytest.mark.parametrize("histogram", [Histogram(), Histogram.of([0.25, 0.75, -3.0])])
def test_a_histogram_is_the_same_after_it_was_stored(histogram):
    assert Histogram.model_validate_json(histogram.model_dump_json()) == histogram
