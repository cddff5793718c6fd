"""The training set: labels to tasks, shards to one ordered set."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from belt_tasks import fine_tuning
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, TrainSpec
from tests.fine_tuned import prepared, validation_shards

SPEC = TrainSpec(chunks=ChunkSpec(chunk_size=20, stride=20))


def load(corpus_uri, encoder, output, *, spec=SPEC, corpus=CorpusSpec()):  # noqa: B008 - frozen
    plan, receipts = prepared(corpus_uri, encoder, output, spec, corpus)
    with fine_tuning.load(plan, receipts, validation_shards(corpus_uri, plan, receipts, spec)) as (found, _):
        return replace(found, input_ids_T=np.array(found.input_ids_T))


def tokens_of(found):
    """The tokens of each document."""
    spans = zip(found.first_token_D, found.num_tokens_D, strict=True)
    return [found.input_ids_T[first : first + number].tolist() for first, number in spans]


TEXTS = ["the fox", "", "a window of tokens", "numbers 1 2 3"]


@pytest.mark.parametrize(
    ("labels", "task", "head", "target"),
    [
        (["b", "a", "b", "a"], None, Head(task="binary", labels=("a", "b")), [1, 0, 1, 0]),
        (["b", "a", "b", "a"], "multiclass", Head(task="multiclass", labels=("a", "b")), [1, 0, 1, 0]),
        (["b", "a", "c", "a"], None, Head(task="multiclass", labels=("a", "b", "c")), [1, 0, 2, 0]),
        ([1, 0, 1, 0], None, Head(task="binary", labels=("0", "1")), [1, 0, 1, 0]),
        ([True, False, True, True], None, Head(task="binary", labels=("false", "true")), [1, 0, 1, 1]),
        ([1, 0, 7, 2], "regression", Head(task="regression", labels=("label",)), [1.0, 0.0, 7.0, 2.0]),
        ([0.5, -1.0, 2.0, 0.0], None, Head(task="regression", labels=("label",)), [0.5, -1.0, 2.0, 0.0]),
        (
            [["x", "y"], [], ["y"], ["x"]],
            None,
            Head(task="multilabel", labels=("x", "y")),
            [[True, True], [False, False], [False, True], [True, False]],
        ),
    ],
)
def test_the_label_column_decides_the_task(write_corpus, tiny_encoder, tmp_path, labels, task, head, target):
    corpus_uri = write_corpus({"doc_id": ["1", "2", "3", "4"], "text": TEXTS, "label": labels})

    found = load(corpus_uri, tiny_encoder, tmp_path / "out", spec=SPEC.model_copy(update={"task": task}))

    assert found.head == head
    assert found.target.tolist() == target


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([0.5, 1.0, 2.0, 3.0], "multiclass", "task must be regression for a label column of double"),
        (["a", "b", "a", "b"], "regression", "task must be binary or multiclass for a label column of string"),
        (["a", "a", "a", "a"], None, "needs at least 2 different labels, got 1: 'a'"),
        (["a", "b", "c", "a"], "binary", "a binary task needs exactly 2 different labels, got 3"),
        ([[], [], [], []], None, "label column|multilabel task needs labels"),
    ],
)
def test_labels_that_make_no_task_are_refused(write_corpus, tiny_encoder, tmp_path, labels, task, message):
    column = pa.array(labels, pa.list_(pa.string())) if labels == [[], [], [], []] else labels
    corpus_uri = write_corpus({"doc_id": ["1", "2", "3", "4"], "text": TEXTS, "label": column})

    with pytest.raises(ConfigError, match=message):
        load(corpus_uri, tiny_encoder, tmp_path / "out", spec=SPEC.model_copy(update={"task": task}))


def test_rows_without_a_usable_label_are_put_aside(write_corpus, tiny_encoder, tmp_path):
    corpus_uri = write_corpus({"doc_id": ["1", "2", "3", "4"], "text": TEXTS, "label": [0.5, None, float("nan"), 1.0]})

    found = load(corpus_uri, tiny_encoder, tmp_path / "out")

    assert found.doc_ids == ["1", "4"]


def test_files_and_their_order_do_not_change_the_set(write_corpus, tiny_encoder, tmp_path):
    rows = pl.DataFrame({"doc_id": ["4", "1", "3", "2"], "text": TEXTS, "label": ["a", "b", "a", "b"]})

    one = load(write_corpus(rows, name="one"), tiny_encoder, tmp_path / "a")
    many = load(write_corpus(rows[::-1], num_files=4, name="many"), tiny_encoder, tmp_path / "b")

    assert one.doc_ids == many.doc_ids == ["1", "2", "3", "4"]
    assert one.fingerprint == many.fingerprint
    assert tokens_of(one) == tokens_of(many)
    assert one.num_tokens_D[0] == 0  # the empty text is a document
    assert one.target.tolist() == many.target.tolist()


def test_another_label_or_text_is_another_fingerprint(write_corpus, tiny_encoder, tmp_path):
    rows = {"doc_id": ["1", "2"], "text": ["x", "y"], "label": ["a", "b"]}
    variants = [rows, rows | {"label": ["b", "a"]}, rows | {"text": ["x", "z"]}, rows | {"doc_id": ["1", "3"]}]

    fingerprints = {
        load(write_corpus(variant, name=f"c{i}"), tiny_encoder, tmp_path / f"o{i}").fingerprint
        for i, variant in enumerate(variants)
    }

    assert len(fingerprints) == len(variants)


def test_the_held_out_documents_are_stable(write_corpus, tiny_encoder, tmp_path):
    ids = [f"doc-{i}" for i in range(400)]
    rows = pl.DataFrame({"doc_id": ids, "text": ["x"] * 400, "label": ["a", "b"] * 200})
    everything = load(write_corpus(rows, name="all"), tiny_encoder, tmp_path / "a")
    fewer = load(write_corpus(rows[:200], name="fewer"), tiny_encoder, tmp_path / "b")

    held = {i for i, out in zip(everything.doc_ids, everything.held_out_D(0.2, 0), strict=True) if out}
    held_of_fewer = {i for i, out in zip(fewer.doc_ids, fewer.held_out_D(0.2, 0), strict=True) if out}

    assert 50 < len(held) < 110
    assert held_of_fewer == held & set(fewer.doc_ids)
    assert not everything.held_out_D(0.0, 0).any()
    assert (everything.held_out_D(0.2, 1) != everything.held_out_D(0.2, 0)).any()
