"""Mini-batches: plans are permutations within budget; tensors hold what the windows say."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks.batches import collate, plan_batches
from belt_tasks.specs import ChunkSpec
from belt_tasks.tokens import SpecialTokens
from belt_tasks.windows import chunk_windows

SPECIAL = SpecialTokens(prefix_ids=(101,), suffix_ids=(102, 103), pad_id=9)


@given(num_tokens=st.lists(st.integers(1, 100), max_size=60).map(np.array), budget=st.integers(1, 500))
def test_a_plan_is_a_permutation_within_budget_longest_first(num_tokens, budget):
    batches = plan_batches(num_tokens.astype(np.int64), max_batch_tokens=budget)

    assert sorted(np.concatenate([[], *batches])) == list(range(len(num_tokens)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * num_tokens[rows].max() <= budget
    longest = [num_tokens[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)


@given(num_tokens=st.lists(st.integers(1, 100), min_size=2, max_size=60).map(np.array), budget=st.integers(1, 500))
def test_a_plan_wastes_no_budget(num_tokens, budget):
    batches = plan_batches(num_tokens.astype(np.int64), max_batch_tokens=budget)

    for rows in batches[:-1]:
        assert (len(rows) + 1) * num_tokens[rows].max() > budget


@given(num_tokens=st.lists(st.integers(0, 50), min_size=1, max_size=5).map(np.array), data=st.data())
def test_rows_are_special_content_special_padding(num_tokens, data):
    offsets = np.concatenate([[0], np.cumsum(num_tokens)])
    input_ids_T = np.arange(1000, 1000 + offsets[-1], dtype=np.int32)
    windows = chunk_windows(num_tokens, ChunkSpec(chunk_size=7, stride=4))
    rows = np.array(data.draw(st.permutations(range(windows.num_chunks))))[:5]

    batch = collate(rows, input_ids_T=input_ids_T, windows=windows, first_token_D=offsets[:-1], special=SPECIAL)

    assert len(batch) == len(rows)
    input_ids_BT, attention_mask_BT = batch.padded()
    assert input_ids_BT.shape == attention_mask_BT.shape
    packed = []
    for row, ids, mask in zip(rows, input_ids_BT.tolist(), attention_mask_BT.tolist(), strict=True):
        document = windows.doc_of_chunk_C[row]
        start, stop = offsets[document] + windows.start_C[row], offsets[document] + windows.stop_C[row]
        expected = [101, *input_ids_T[start:stop].tolist(), 102, 103]
        assert ids == expected + [9] * (len(ids) - len(expected))
        assert mask == [1] * len(expected) + [0] * (len(ids) - len(expected))
        packed += expected
    assert batch.input_ids_T.tolist() == packed
    assert batch.num_tokens_B.sum() == len(packed)
    assert (attention_mask_BT.sum(dim=1) == input_ids_BT.shape[1]).any()  # padded to the longest, no more
