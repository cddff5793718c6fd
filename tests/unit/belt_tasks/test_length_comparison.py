"""Length comparison: groups hold each document once, and differences are those of the same draws."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import metrics
from belt_tasks.length_comparison import Scores, length_groups, length_rows, tokens_encoded
from belt_tasks.resampling import METRICS
from belt_tasks.specs import ChunkSpec, Head, LengthSpec
from tests.random_scores import scored

QUICK = LengthSpec(num_resamples=100, min_bucket_documents=5)
lengths = st.lists(st.integers(0, 3000), min_size=1, max_size=60)
TASKS = ("binary", "multiclass", "multilabel", "regression")


def rows_of(task, target, predicted, num_tokens, spec=QUICK, chunk_size=100):
    """Groups and rows of ways that read the head, head and tail, and all."""
    labels = {"binary": ("no", "yes"), "regression": ("stars",)}.get(task, ("a", "b", "c"))
    ways = [
        Scores(selection=selection, scores_DL=scores, num_tokens_encoded_D=np.full(len(target), number))
        for number, (selection, scores) in enumerate(zip(("head", "head_tail", "all"), predicted, strict=True))
    ]
    groups = length_groups(num_tokens, chunk_size, min_documents=spec.min_bucket_documents)
    head = Head(task=task, labels=labels)
    return groups, length_rows(
        groups, ways, head=head, target=target, num_tokens_D=num_tokens, threshold=0.5, spec=spec
    )


@given(num_tokens=lengths, chunk_size=st.integers(1, 600))
def test_buckets_hold_each_document_once(num_tokens, chunk_size):
    groups = length_groups(np.array(num_tokens), chunk_size, min_documents=3)

    everything, longer, *buckets = groups
    held = [
        [n for n in num_tokens if group.min_tokens <= n and (group.max_tokens is None or n <= group.max_tokens)]
        for group in buckets
    ]
    assert sorted(n for group in held for n in group) == sorted(num_tokens)
    assert [group.num_documents for group in buckets] == [len(group) for group in held]
    assert everything.num_documents == len(num_tokens)
    assert not everything.is_too_small
    assert longer.num_documents == sum(n > chunk_size for n in num_tokens) == len(num_tokens) - len(held[0])
    assert [group.is_too_small for group in buckets] == [len(group) < 3 for group in held]
    assert (buckets[0].min_tokens, buckets[0].max_tokens) == (0, chunk_size)


def test_buckets_double_until_the_longest_document_is_in():
    bounds = [(g.min_tokens, g.max_tokens) for g in length_groups(np.array([0, 2041]), 510, min_documents=1)[2:]]

    assert bounds == [(0, 510), (511, 1020), (1021, 2040), (2041, 4080)]
    far = length_groups(np.array([10**6]), 510, min_documents=1)[2:]
    assert (len(far), far[-1].min_tokens, far[-1].max_tokens, far[-1].num_documents) == (6, 8161, None, 1)


@given(num_tokens=lengths, chunk_size=st.integers(1, 300), most=st.none() | st.integers(1, 400))
def test_tokens_encoded_are_those_that_the_selections_read(num_tokens, chunk_size, most):
    chunks = ChunkSpec(chunk_size=chunk_size, stride=chunk_size, maximal_text_length=most)
    read = [n if most is None else min(n, most) for n in num_tokens]

    found = {
        selection: tokens_encoded(np.array(num_tokens), chunks.model_copy(update={"selection": selection})).tolist()
        for selection in ("head", "head_tail", "all")
    }

    assert found["all"] == read
    assert found["head"] == [min(n, chunk_size) for n in read]
    assert found["head_tail"] == [min(n, chunk_size) + (chunk_size if n > chunk_size else 0) for n in read]


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=10)
@given(num_tokens=lengths, seed=st.integers(0, 10**6))
def test_nothing_is_changed_by_reading_the_same(task, num_tokens, seed):
    target, scores, _ = scored(task, len(num_tokens), seed)

    _, rows = rows_of(task, target, [scores, scores.copy(), scores.copy()], np.array(num_tokens))

    told = [(row.value, row.lower, row.upper) for row in rows if row.compared_with is not None]
    assert told
    assert {numbers for numbers in told if numbers[0] is not None} <= {(0.0, 0.0, 0.0)}
    assert (0.0, 0.0, 0.0) in told


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=10)
@given(num_tokens=lengths, seed=st.integers(0, 10**6))
def test_what_one_way_gains_on_the_other_the_other_loses(task, num_tokens, seed):
    target, one, _ = scored(task, len(num_tokens), seed)
    _, other, _ = scored(task, len(num_tokens), seed, skill=2.0)

    _, there = rows_of(task, target, [one, one, other], np.array(num_tokens))
    _, back = rows_of(task, target, [other, one, one], np.array(num_tokens))

    for row, opposite in zip(there, back, strict=True):
        if row.compared_with == "head" and row.value is not None:
            expected = (-opposite.value, -opposite.upper, -opposite.lower)
            assert (row.value, row.lower, row.upper) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_values_are_the_metrics_of_the_groups_documents(task):
    rng = np.random.default_rng(1)
    num_tokens = rng.integers(0, 500, 80)
    target, _, labels = scored(task, 80, 1)
    predicted = [scored(task, 80, 1, skill=skill)[1] for skill in (0.5, 1.0, 2.0)]

    groups, rows = rows_of(task, target, predicted, num_tokens)

    assert [row.metric for row in rows if row.kind == "bucket"] == [METRICS[task][0]] * (5 * len(groups[2:]))
    for row in rows:
        inside = (num_tokens >= row.min_tokens) & (num_tokens <= (row.max_tokens or 10**9))
        of = [metrics.task_metrics(task, target[inside], scores[inside], labels)[row.metric] for scores in predicted]
        number = ("head", "head_tail", "all").index(row.compared_with or row.selection)
        assert row.value == pytest.approx(of[number] if row.compared_with is None else of[2] - of[number])
        assert row.num_documents == inside.sum()
        reads = ("head", "head_tail", "all").index(row.selection)
        assert row.num_tokens_encoded == reads * inside.sum()


@pytest.mark.parametrize(("task", "metric"), [("multiclass", "accuracy"), ("regression", "mse")])
def test_the_interval_of_the_difference_is_about_that_of_scipy(task, metric):
    target, one, _ = scored(task, 150, 5)
    _, other, _ = scored(task, 150, 5, skill=1.6)
    if task == "regression":
        of = [(scores[:, 0] - target) ** 2 for scores in (one, other)]
    else:
        of = [(scores.argmax(axis=1) == target).astype(float) for scores in (one, other)]
    expected = scipy.stats.bootstrap(
        of, lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis), paired=True, vectorized=True,
        method="percentile", confidence_level=0.95, n_resamples=4000, rng=0,
    ).confidence_interval  # fmt: skip

    _, rows = rows_of(task, target, [one, one, other], np.full(150, 7), LengthSpec(num_resamples=4000))

    (row,) = (row for row in rows if (row.kind, row.metric, row.compared_with) == ("all", metric, "head"))
    width = expected.high - expected.low
    assert (row.lower, row.upper) == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    assert width > 0


def test_pairs_are_kept_so_that_a_constant_gain_is_certain():
    rng = np.random.default_rng(0)
    target = rng.normal(size=60) * 100  # documents differ a lot, the ways always by the same
    errors = rng.normal(size=60) * 50
    one, other = target + np.sqrt(errors**2 + 3), target + np.abs(errors)

    _, rows = rows_of("regression", target, [one[:, None], one[:, None], other[:, None]], np.full(60, 7))

    (row,) = (row for row in rows if (row.kind, row.metric, row.compared_with) == ("all", "mse", "head"))
    assert (row.value, row.lower, row.upper) == pytest.approx((-3.0, -3.0, -3.0))


def test_of_few_documents_nothing_is_told_and_the_seed_decides_the_rest():
    target, scores, _ = scored("binary", 30, 0)
    _, other, _ = scored("binary", 30, 0, skill=2)
    num_tokens = np.array([10] * 26 + [150] * 4)

    groups, rows = rows_of("binary", target, [scores, scores, other], num_tokens)

    small = [row for row in rows if row.min_tokens > 0]
    assert {(row.value, row.lower, row.upper) for row in small} == {(None, None, None)}
    assert {row.num_documents for row in small} == {4}
    assert [group.is_too_small for group in groups] == [False, True, False, True]
    assert rows == rows_of("binary", target, [scores, scores, other], num_tokens)[1]
    reseeded = QUICK.model_copy(update={"resampling_seed": 1})
    assert rows != rows_of("binary", target, [scores, scores, other], num_tokens, reseeded)[1]
