"""Statistics of runs add up, count what an oracle counts, and draw a sample that stands for all documents."""

from collections import Counter
from functools import reduce
from operator import add

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import score_tables, statistics, storage
from belt_tasks.histograms import Histogram
from belt_tasks.prepare import content_fingerprints
from belt_tasks.publishing import RunRef
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, ScoreSpec
from belt_tasks.statistics import RunStatistics
from tests.conftest import words

LABELS = ("a", "b", "c")
SCHEMA = {
    "doc_id": pl.String,
    "label": pl.String,
    "labels": pl.List(pl.String),
    "score": pl.Float64,
    "num_tokens": pl.Int32,
    "content_fingerprint": pl.String,
    "logits": pl.List(pl.Float32),
}
SPEC = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.5)


def rows_of(documents: list[tuple[str, list[str], float, int, str]], *, logit: float | None = None) -> pl.DataFrame:
    """Predictions of documents: id, labels, score, tokens, text."""
    texts = content_fingerprints([text for *_, text in documents]).to_list()
    rows = [
        (doc_id, labels[0] if labels else None, labels, score, num_tokens, text, [score if logit is None else logit])
        for (doc_id, labels, score, num_tokens, _), text in zip(documents, texts, strict=True)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


documents = st.lists(
    st.tuples(
        st.text(max_size=3),
        st.lists(st.sampled_from(LABELS), unique=True),
        st.floats(0.0, 1.0),
        st.integers(0, 5_000),
        st.sampled_from(["", "fox", "dog"]),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(parts=st.lists(documents, min_size=1, max_size=4), seed=st.integers(0, 9))
def test_statistics_of_parts_are_added_those_of_all_in_any_order(parts, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SAMPLE_SIZE", 5)
        counted = [RunStatistics.of_rows(rows_of(part), LABELS) for part in parts]
        shuffled = np.random.default_rng(seed).permutation(np.array(counted, dtype=object))
        everything = rows_of([document for part in parts for document in part]).sample(
            fraction=1, shuffle=True, seed=seed
        )

        assert reduce(add, shuffled) == RunStatistics.of_rows(everything, LABELS)


@settings(max_examples=60)
@given(found=documents)
def test_counts_are_those_of_an_oracle(found):
    counted = RunStatistics.of_rows(rows_of(found), LABELS)

    carried = Counter(label for _, labels, *_ in found for label in labels)
    assert counted.num_documents == len(found)
    assert counted.label_counts == tuple(carried[label] for label in LABELS)
    assert counted.num_without_label == sum(not labels for _, labels, *_ in found)
    assert counted.scores == Histogram.of([score for _, _, score, *_ in found])
    assert sum(counted.lengths.counts) == len(found)
    drawn = zip(counted.sample.scores, counted.sample.labels, counted.sample.num_tokens, strict=True)
    first = [LABELS.index(labels[0]) if labels else -1 for _, labels, *_ in found]
    expected = [(score, label, number) for (_, _, score, number, _), label in zip(found, first, strict=True)]
    assert sorted(drawn) == sorted(expected)  # all of so few


def test_a_sample_stands_for_all_documents_also_where_a_text_is_repeated(monkeypatch):
    """By the fingerprint of the text alone it would hold all of these copies, or none."""
    monkeypatch.setattr(statistics, "SAMPLE_SIZE", 400)
    found = [(f"doc-{i}", ["a"], i / 2_000, i, "copy" if i < 1_000 else f"text {i}") for i in range(2_000)]

    sample = RunStatistics.of_rows(rows_of(found), LABELS).sample

    assert len(sample) == 400
    assert list(sample.keys) == sorted(sample.keys)
    assert 160 < sum(number < 1_000 for number in sample.num_tokens) < 240  # four standard deviations
    assert abs(np.mean(sample.scores) - 0.5) < 0.06


def test_statistics_of_other_rules_or_labels_do_not_add_up():
    one = RunStatistics.of_rows(rows_of([]), LABELS, scoring_fingerprint="1")

    with pytest.raises(ValueError, match="scoring_fingerprint must be that of both, got '1' and '2'"):
        one + one.model_copy(update={"scoring_fingerprint": "2"})
    with pytest.raises(ValueError, match="labels must be that of both"):
        one + RunStatistics.of_rows(rows_of([]), ("a",), scoring_fingerprint="1")


@pytest.mark.parametrize(("logit", "is_regression"), [(None, True), (0.3, False)])
def test_a_value_is_told_from_a_probability_by_its_logit(logit, is_regression):
    found = rows_of([("x", [], 0.75, 3, "fox"), ("y", [], 0.25, 3, "dog")], logit=logit)

    assert RunStatistics.of_rows(found, ("a",)).is_regression == is_regression
    assert not RunStatistics.of_rows(found, LABELS).is_regression


@pytest.mark.parametrize(("tokens", "share"), [((100, 5), 0.05), ((0, 0), None), ((100, None), None)])
def test_the_share_of_unknown_tokens_is_known_where_there_are_tokens(tokens, share):
    none = RunStatistics.of_rows(rows_of([]), LABELS)
    counted = none.model_copy(update={"num_tokens": tokens[0], "num_unknown_tokens": tokens[1]})

    assert counted.unknown_share == share
    assert (counted + none).unknown_share == share


@pytest.fixture
def corpus(tmp_path) -> str:
    """Two files of thirty documents, some without a text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(2):
        texts = [None if j == 3 else f"\N{SNOWMAN} {words(5 * j, seed=j)}" for j in range(30)]
        pl.DataFrame({"doc_id": [f"{i}-{j}" for j in range(30)], "text": texts}).write_parquet(folder / f"{i}.parquet")
    return str(folder)


def run_of(output: str, manifest) -> RunRef:
    return RunRef(output_uri=output, run_id=manifest.run["run_id"])


def test_the_statistics_of_a_run_are_those_of_its_predictions_and_its_manifest(corpus, tiny_checkpoint, output):
    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=SPEC)
    run = run_of(output, manifest)

    counted = statistics.of_run(run, manifest)

    rows = score_tables.read_table(output, "predictions")
    expected = RunStatistics.of_rows(rows, manifest.labels, scoring_fingerprint=manifest.run["scoring_fingerprint"])
    of_manifest = {"run_ids": (run.run_id,), "num_tokens": rows["num_tokens"].sum(), "num_unknown_tokens": 58}
    assert counted == expected.model_copy(update=of_manifest)
    assert RunStatistics.model_validate_json(storage.read_bytes(statistics.uri_of(run))) == counted

    storage.remove_files(manifest.uris(output, "predictions"))
    assert statistics.of_run(run, manifest) == counted  # what is counted is not counted again
    storage.remove_files([statistics.uri_of(run)])
    assert statistics.of_run(run, manifest) is None


@pytest.mark.parametrize("batch_rows", [1, 10, statistics.BATCH_ROWS])
def test_some_rows_at_a_time_give_the_same(corpus, tiny_checkpoint, tmp_path, monkeypatch, batch_rows):
    manifest = score_corpus(corpus, tiny_checkpoint, str(tmp_path / "out"), spec=SPEC)
    uris = manifest.uris(str(tmp_path / "out"), "predictions")
    whole = statistics.of_files(uris, manifest)

    for uri in uris:
        pl.read_parquet(uri).write_parquet(uri, row_group_size=7)
    monkeypatch.setattr(statistics, "BATCH_ROWS", batch_rows)

    assert statistics.of_files(uris[::-1], manifest) == whole
