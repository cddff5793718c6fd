"""Drift is nothing where nothing changed, is found where something did, and its numbers are those of plain formulas."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from belt_tasks.drift import SMOOTHING, drift_of, grouped, psi
from belt_tasks.specs import DriftSpec
from belt_tasks.statistics import RunStatistics

LABELS = ("ham", "spam")
SPEC = DriftSpec()


@st.composite
def pairs(draw):
    """Counts of the same categories, each above 0 somewhere."""
    size = draw(st.integers(1, 8))
    counts = st.lists(st.integers(0, 1_000), min_size=size, max_size=size).filter(any)
    return draw(counts), draw(counts)


@given(counts=pairs(), times=st.integers(1, 50))
def test_psi_is_zero_where_the_shares_are_the_same_and_only_there(counts, times):
    one, two = counts

    assert psi(one, [times * count for count in one]) == pytest.approx(0.0, abs=1e-12)
    are_alike = all(a * sum(two) == b * sum(one) for a, b in zip(one, two, strict=True))
    assert (psi(one, two) > 1e-12) != are_alike


@given(counts=pairs(), seed=st.integers(0, 9))
def test_psi_is_symmetric_and_does_not_depend_on_the_order_of_categories(counts, seed):
    one, two = map(np.array, counts)
    order = np.random.default_rng(seed).permutation(len(one))

    assert psi(two, one) == pytest.approx(psi(one, two), abs=1e-12)
    assert psi(one[order], two[order]) == pytest.approx(psi(one, two), abs=1e-12)


@given(counts=pairs())
def test_psi_of_coarser_categories_is_never_larger(counts):
    one, two = map(np.array, counts)
    pairs_of = np.arange(0, len(one), 2)

    assert psi(np.add.reduceat(one, pairs_of), np.add.reduceat(two, pairs_of)) <= psi(one, two) + 1e-12


@given(counts=pairs())
def test_psi_is_the_formula_over_shares_mixed_with_their_mean(counts):
    one, two = ([count / sum(part) for count in part] for part in counts)
    expected = 0.0
    for p, q in zip(one, two, strict=True):
        mean = (p + q) / 2
        p_mixed, q_mixed = p - SMOOTHING * (p - mean), q - SMOOTHING * (q - mean)
        if mean:
            expected += (p_mixed - q_mixed) * math.log(p_mixed / q_mixed)

    assert psi(*counts) == pytest.approx(expected, abs=1e-9)


def test_psi_is_bounded_where_nothing_is_in_common():
    assert psi([7, 0], [0, 3]) == pytest.approx((1 - SMOOTHING) * 2 * math.log(2 / SMOOTHING - 1))


def test_smoothing_hardly_matters_where_every_category_is_filled():
    one, two = np.array([400, 350, 250]), np.array([300, 300, 400])
    p, q = one / one.sum(), two / two.sum()

    assert psi(one, two) == pytest.approx(float(((p - q) * np.log(p / q)).sum()), rel=0.03)


@given(one=st.lists(st.floats(-5, 5), min_size=1, max_size=60), two=st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_groups_hold_all_documents_and_are_the_same_for_both_sides(one, two):
    one_B, two_B = grouped(one, two)

    assert (one_B.sum(), two_B.sum()) == (len(one), len(two))
    assert [part.tolist() for part in grouped(two, one)] == [two_B.tolist(), one_B.tolist()]


def test_groups_hold_equal_shares_however_the_numbers_lie():
    skewed = np.random.default_rng(0).beta(30, 1, size=10_000)  # of a model that is sure

    one_B, _ = grouped(skewed, skewed)

    assert one_B.tolist() == [1_000] * 10


def test_one_value_far_from_all_others_hides_nothing():
    random = np.random.default_rng(0)
    reference, now = [*random.normal(5, 1, 500), 1e6], random.normal(8, 1, 500)

    assert psi(*grouped(now, reference)) == pytest.approx(psi(*grouped(now, reference[:-1])), rel=0.1)
    assert psi(*grouped(now, reference)) > 5


def statistics_of(scores, *, lengths=None, spam=None, unknown=0, fingerprint="f") -> RunStatistics:
    """Statistics of made up documents."""
    number = len(scores)
    spam = [score > 0.5 for score in scores] if spam is None else spam
    labels = ["spam" if is_spam else "ham" for is_spam in spam]
    rows = pl.DataFrame(
        {
            "doc_id": [f"{scores[0] if number else 0}-{i}" for i in range(number)],
            "label": pl.Series(labels, dtype=pl.String),
            "labels": pl.Series([[label] for label in labels], dtype=pl.List(pl.String)),
            "score": pl.Series(list(scores), dtype=pl.Float64),
            "num_tokens": pl.Series([100] * number if lengths is None else list(lengths), dtype=pl.Int32),
            "content_fingerprint": [f"{i:064x}" for i in range(number)],
        }
    )
    counted = RunStatistics.of_rows(rows, LABELS, scoring_fingerprint=fingerprint)
    return counted.model_copy(update={"num_tokens": 100 * number, "num_unknown_tokens": unknown})


def drawn(seed: int, number: int = 2_000, *, a: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).beta(a, 2.0, size=number)


def lengths_of(seed: int, number: int = 2_000, *, mean: float = 5.0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(mean, 1.0, size=number).astype(int)


def failed(report) -> set[tuple[str, str]]:
    return {(measure.quantity, measure.statistic) for measure in report.measures if not measure.passed}


REFERENCE = statistics_of(drawn(0), lengths=lengths_of(0))


def test_a_run_has_no_drift_against_itself():
    report = drift_of(REFERENCE, REFERENCE, SPEC)

    assert report.verdict == "none"
    assert [measure.value for measure in report.measures] == [0.0] * 6
    assert (report.num_documents, report.num_documents_reference) == (2_000, 2_000)


@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("number", [200, 2_000])
def test_documents_drawn_from_the_same_have_no_drift(seed, number):
    now = statistics_of(drawn(seed, number), lengths=lengths_of(seed, number))

    assert drift_of(now, REFERENCE, SPEC).verdict == "none"


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (
            statistics_of(drawn(1, a=6.0), lengths=lengths_of(1)),
            {("labels", "psi"), ("scores", "psi"), ("scores", "ks")},
        ),
        (statistics_of(drawn(1), lengths=lengths_of(1, mean=6.5)), {("lengths", "psi"), ("lengths", "ks")}),
        (statistics_of(drawn(1), lengths=lengths_of(1), spam=[True] * 2_000), {("labels", "psi")}),
        (statistics_of(drawn(1), lengths=lengths_of(1), unknown=6_000), {("unknown_tokens", "increase")}),
    ],
    ids=["scores", "lengths", "labels", "unknown tokens"],
)
def test_what_has_shifted_is_found_and_nothing_else(now, expected):
    report = drift_of(now, REFERENCE, SPEC)

    assert report.verdict == "drifted"
    assert failed(report) == expected


def test_numbers_are_those_of_plain_formulas():
    now = statistics_of(drawn(3, 500, a=3.0), lengths=lengths_of(3, 500), unknown=700)
    found = {(measure.quantity, measure.statistic): measure for measure in drift_of(now, REFERENCE, SPEC).measures}

    for quantity, mine, its in (
        ("scores", drawn(3, 500, a=3.0), drawn(0)),
        ("lengths", lengths_of(3, 500), lengths_of(0)),
    ):
        edges = np.sort(np.concatenate([mine, its]))
        cumulated = [np.searchsorted(np.sort(values), edges, side="right") / len(values) for values in (mine, its)]
        assert found[quantity, "ks"].value == pytest.approx(np.abs(cumulated[0] - cumulated[1]).max())
        assert found[quantity, "ks"].p_value == stats.ks_2samp(mine, its, method="asymp").pvalue
    spam = [np.array([(values <= 0.5).sum(), (values > 0.5).sum()]) for values in (drawn(3, 500, a=3.0), drawn(0))]
    assert found["labels", "psi"].value == psi(*spam)
    assert found["labels", "psi"].p_value == pytest.approx(stats.chi2_contingency(spam, correction=False).pvalue)
    assert found["unknown_tokens", "increase"].value == pytest.approx(700 / 50_000)


def test_a_large_distance_of_few_documents_may_be_chance():
    spec = SPEC.model_copy(update={"min_documents": 1})
    now = statistics_of(drawn(1, 50), lengths=lengths_of(1, 50))

    report = drift_of(now, REFERENCE, spec)

    over = {measure.quantity for measure in report.measures if measure.value and measure.value > measure.limit}
    assert over
    assert report.verdict == "none"


@pytest.mark.parametrize(("now", "then"), [(199, 2_000), (2_000, 199), (0, 2_000), (0, 0)])
def test_there_is_no_verdict_on_too_few_documents(now, then):
    shifted, reference = statistics_of(drawn(1, now, a=9.0)), statistics_of(drawn(0, then))

    report = drift_of(shifted, reference, SPEC)

    assert report.verdict == "too_few_documents"
    assert all(measure.passed is None for measure in report.measures)
    assert bool(report.measures) == bool(now and then)


@pytest.mark.parametrize("unknown", [(None, 0), (0, None)])
def test_a_share_that_is_not_known_is_no_drift(unknown):
    now, reference = (REFERENCE.model_copy(update={"num_unknown_tokens": number}) for number in unknown)

    report = drift_of(now, reference, SPEC)

    assert report.verdict == "none"
    assert report.measures[-1].value is None


def test_drift_of_parts_together_is_that_of_the_whole():
    scores, lengths = drawn(4, 600, a=3.0), lengths_of(4, 600)
    parts = [statistics_of(scores[i::3], lengths=lengths[i::3]) for i in range(3)]

    together = drift_of(parts[0] + parts[1] + parts[2], REFERENCE, SPEC)

    whole = drift_of(statistics_of(scores, lengths=lengths), REFERENCE, SPEC)
    assert [measure.value for measure in together.measures] == [measure.value for measure in whole.measures]


def test_a_value_has_no_labels_that_could_shift():
    values = REFERENCE.model_copy(update={"is_regression": True})

    assert "labels" not in {measure.quantity for measure in drift_of(values, values, SPEC).measures}


def test_other_rules_do_not_compare():
    with pytest.raises(ValueError, match="scoring_fingerprint must be that of the reference, got 'g' and 'f'"):
        drift_of(statistics_of([0.1], fingerprint="g"), REFERENCE, SPEC)


def test_a_limit_is_the_largest_value_that_passes():
    value = {
        m.quantity: m for m in drift_of(statistics_of(drawn(1, a=6.0)), REFERENCE, SPEC).measures if m.statistic == "ks"
    }
    now, distance = statistics_of(drawn(1, a=6.0)), value["scores"].value

    for limit, passes in ((distance, True), (np.nextafter(distance, 0.0), False)):
        report = drift_of(now, REFERENCE, DriftSpec(max_ks=limit))
        assert (("scores", "ks") not in failed(report)) == passes
