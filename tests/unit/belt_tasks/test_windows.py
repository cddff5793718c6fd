"""Windows: the laws of the method, and examples that a person can check."""

import itertools

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks.specs import ChunkSpec
from belt_tasks.windows import chunk_windows


@st.composite
def specs(draw, **fixed):
    chunk_size = draw(st.integers(1, 40))
    return ChunkSpec(
        **{
            "chunk_size": chunk_size,
            "stride": draw(st.integers(1, chunk_size)),
            "minimal_chunk_length": draw(st.integers(1, chunk_size)),
            "maximal_text_length": draw(st.none() | st.integers(1, 200)),
            "drop_contained_tail": draw(st.booleans()),
            "selection": draw(st.sampled_from(["all", "head", "head_tail", "random_k"])),
            "num_random_chunks": draw(st.integers(1, 5)),
            **fixed,
        }
    )


lengths = st.lists(st.integers(0, 300), min_size=1, max_size=6).map(np.array)


def cut(num_tokens, spec):
    seeds_D = np.arange(len(num_tokens)) + 7
    return chunk_windows(num_tokens, spec, document_seed_D=seeds_D)


def spans(windows, document=0):
    rows = slice(windows.doc_offsets[document], windows.doc_offsets[document + 1])
    return list(zip(windows.start_C[rows].tolist(), windows.stop_C[rows].tolist(), strict=True))


@given(num_tokens=lengths, spec=specs())
def test_every_document_has_windows_in_order_and_within_its_tokens(num_tokens, spec):
    windows = cut(num_tokens, spec)

    for document, length in enumerate(np.minimum(num_tokens, spec.maximal_text_length or 1000)):
        found = spans(windows, document)
        assert found
        assert all(0 <= start < stop <= length for start, stop in found) or (length == 0 and found == [(0, 0)])
        assert all(stop - start <= spec.chunk_size for start, stop in found)
        assert found == sorted(set(found))
        assert [stop for _, stop in found] == sorted(stop for _, stop in found)


@given(num_tokens=lengths, spec=specs(minimal_chunk_length=1, selection="all"))
def test_windows_cover_every_token_when_none_is_too_short(num_tokens, spec):
    windows = cut(num_tokens, spec)

    for document, length in enumerate(np.minimum(num_tokens, spec.maximal_text_length or 1000)):
        covered = {token for start, stop in spans(windows, document) for token in range(start, stop)}
        assert covered == set(range(length))


@given(num_tokens=lengths, spec=specs())
def test_new_tokens_count_each_covered_token_once(num_tokens, spec):
    windows = cut(num_tokens, spec)

    new_D = np.add.reduceat(windows.new_tokens_C(), windows.doc_offsets[:-1])

    for document in range(len(num_tokens)):
        covered = {token for start, stop in spans(windows, document) for token in range(start, stop)}
        assert new_D[document] == len(covered)


@given(num_tokens=lengths, spec=specs(selection="all", drop_contained_tail=False))
def test_dropping_contained_tails_drops_just_those(num_tokens, spec):
    kept = cut(num_tokens, spec.model_copy(update={"drop_contained_tail": True}))
    everything = cut(num_tokens, spec)

    for document in range(len(num_tokens)):
        found = spans(everything, document)
        contained = {b for a, b in itertools.pairwise(found) if b[1] <= a[1]}
        assert spans(kept, document) == [span for span in found if span not in contained]


@given(num_tokens=lengths, spec=specs(), data=st.data())
def test_a_documents_windows_do_not_depend_on_its_neighbours(num_tokens, spec, data):
    together = cut(num_tokens, spec)
    document = data.draw(st.integers(0, len(num_tokens) - 1))

    alone = chunk_windows(num_tokens[[document]], spec, document_seed_D=np.array([document + 7]))

    assert spans(alone) == spans(together, document)
    assert spans(together.of_documents(np.array([document]))) == spans(together, document)


@given(num_tokens=lengths, spec=specs(selection="random_k"))
def test_random_k_takes_k_different_windows_of_the_grid(num_tokens, spec):
    grid = cut(num_tokens, spec.model_copy(update={"selection": "all"}))
    drawn = cut(num_tokens, spec)

    for document in range(len(num_tokens)):
        of_grid, of_draw = spans(grid, document), spans(drawn, document)
        assert len(of_draw) == min(len(of_grid), spec.num_random_chunks)
        assert set(of_draw) <= set(of_grid)


def test_random_k_draws_differently_for_another_seed_or_document():
    spec = ChunkSpec(chunk_size=2, stride=2, selection="random_k", num_random_chunks=3)
    num_tokens = np.array([400, 400])
    windows = chunk_windows(num_tokens, spec, document_seed_D=np.array([1, 2]))
    other = chunk_windows(num_tokens, spec.model_copy(update={"seed": 1}), document_seed_D=np.array([1, 2]))

    assert spans(windows, 0) != spans(windows, 1)
    assert spans(windows, 0) != spans(other, 0)


@pytest.mark.parametrize(
    ("num_tokens", "fields", "expected"),
    [
        (0, {}, [(0, 0)]),
        (1, {}, [(0, 1)]),
        (10, {}, [(0, 10)]),
        (11, {}, [(0, 10), (10, 11)]),
        (25, {"stride": 5}, [(0, 10), (5, 15), (10, 20), (15, 25), (20, 25)]),
        (25, {"stride": 5, "drop_contained_tail": True}, [(0, 10), (5, 15), (10, 20), (15, 25)]),
        (25, {"stride": 5, "minimal_chunk_length": 6}, [(0, 10), (5, 15), (10, 20), (15, 25)]),
        (25, {"maximal_text_length": 12}, [(0, 10), (10, 12)]),
        (25, {"selection": "head"}, [(0, 10)]),
        (25, {"selection": "head_tail"}, [(0, 10), (15, 25)]),
        (12, {"selection": "head_tail"}, [(0, 10), (2, 12)]),
        # belt-nlp drops both windows of this one and scores an empty text
        (8, {"stride": 5, "minimal_chunk_length": 10}, [(0, 8)]),
    ],
)
def test_examples(num_tokens, fields, expected):
    spec = ChunkSpec(**{"chunk_size": 10, "stride": 10, **fields})

    assert spans(chunk_windows(np.array([num_tokens]), spec)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 10, "stride": 11}, r"stride must be at most chunk_size \(10\), got 11"),
        ({"chunk_size": 10, "stride": 5, "minimal_chunk_length": 11}, r"at most chunk_size \(10\), got 11"),
        ({"chunk_size": 0}, "greater than or equal to 1"),
        ({"stride": 0}, "greater than or equal to 1"),
        ({"maximal_text_length": 0}, "greater than or equal to 1"),
        ({"selection": "tail"}, "'all', 'head', 'head_tail' or 'random_k'"),
        ({"chunk_length": 10}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_spec_is_refused_at_construction(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ChunkSpec(**fields)
