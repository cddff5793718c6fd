"""Evidence: what chunks contribute adds up to what was pooled, and its spans are those of the text."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belt_tasks import heads, score_tables
from belt_tasks.errors import ConfigError
from belt_tasks.evidence import ChunkEvidence
from belt_tasks.preview import preview_scoring
from belt_tasks.score_corpus import score_corpus
from belt_tasks.scoring import chunk_evidence, score_windows
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec
from belt_tasks.windows import chunk_windows
from tests.conftest import words

LABELS = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "multilabel": ("a", "b"), "regression": ("stars",)}


def pooled(task: str, strategy: str, space: str, num_tokens_D: list[int], seed: int):
    """Windows, head, random chunk outputs and what they are pooled to."""
    windows = chunk_windows(np.array(num_tokens_D), ChunkSpec(chunk_size=10, stride=6))
    head = Head(task=task, labels=LABELS[task])
    spec = PoolingSpec(pooling_strategy=strategy, pooling_space=space)
    generator = torch.Generator().manual_seed(seed)
    outputs_CK = 3 * torch.randn(windows.num_chunks, head.num_logits + (strategy == "attention"), generator=generator)
    return windows, head, spec, outputs_CK, score_windows(outputs_CK, windows, spec=spec, head=head)


@given(
    task=st.sampled_from(sorted(LABELS)),
    strategy=st.sampled_from(["mean", "max", "length_weighted_mean", "attention"]),
    space=st.sampled_from(["logits", "probabilities"]),
    num_tokens_D=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_contributions_add_up_to_what_was_pooled(task, strategy, space, num_tokens_D, seed):
    windows, head, spec, outputs_CK, scores = pooled(task, strategy, space, num_tokens_D, seed)
    label_D = scores.scores_DL.argmax(axis=1)

    said = chunk_evidence(outputs_CK, windows, label_D, spec=spec, head=head)

    total_D = np.add.reduceat(said.contribution_C, windows.doc_offsets[:-1])
    rows = np.arange(len(label_D))
    if space == "logits" or task == "regression":
        expected_D = (
            scores.logits_DL[:, 0] * np.where(label_D == 1, 1, -1)
            if task == "binary"
            else scores.logits_DL[rows, label_D]
        )
    elif strategy == "max" and task == "multiclass":  # largest log-probabilities, which sum to no certain number
        expected_D = np.exp(scores.logits_DL[rows, label_D])
    else:
        expected_D = scores.scores_DL[rows, label_D]
    np.testing.assert_allclose(total_D, expected_D, atol=1e-5)
    alone_CL = heads.scores(outputs_CK[:, : head.num_logits].double(), head).numpy()
    np.testing.assert_allclose(said.score_C, alone_CL[np.arange(len(alone_CL)), label_D[windows.doc_of_chunk_C]])


@given(
    num_chunks_D=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    most=st.none() | st.integers(1, 4),
    data=st.data(),
)
def test_chunks_are_ranked_by_their_order(num_chunks_D, most, data):
    doc_offsets = np.concatenate([[0], np.cumsum(num_chunks_D)])
    few = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    num_chunks = sum(num_chunks_D)
    values = np.array(data.draw(st.lists(few, min_size=num_chunks, max_size=num_chunks)))

    ranked = ChunkEvidence(score_C=values / 2, contribution_C=values, order_C=values).ranked(doc_offsets, most=most)

    for rows, first, stop in zip(ranked, doc_offsets[:-1], doc_offsets[1:], strict=True):
        best = sorted(range(stop - first), key=lambda i: (-values[first + i], i))[:most]
        assert rows["position"].tolist() == best
        assert rows["contribution"].tolist() == [values[first + i] for i in best]
        assert rows["score"].tolist() == [values[first + i] / 2 for i in best]


@pytest.mark.parametrize("task", ["multilabel", "multiclass", "regression", "binary"])
def test_the_winner_under_max_comes_first_also_where_it_speaks_against_the_label(task):
    """Losers contribute nothing, which is more than what a negative logit does."""
    windows = chunk_windows(np.array([50]), ChunkSpec(chunk_size=10, stride=10))
    head, spec = Head(task=task, labels=LABELS[task]), PoolingSpec(pooling_strategy="max")
    outputs_CK = torch.tensor([[-3.0], [-2.5], [-4.0], [-0.4], [-2.0]]).expand(5, head.num_logits)
    label = 1 if task == "binary" else 0

    said = chunk_evidence(outputs_CK, windows, np.array([label]), spec=spec, head=head)

    (rows,) = said.ranked(windows.doc_offsets, most=3)
    assert rows["position"].tolist() == [3, 4, 1]
    assert rows["contribution"].tolist() == pytest.approx([-0.4, 0.0, 0.0])


TEXTS = {"empty": "", "long": "  Zürich 🦊 " + words(70), "same": "  Zürich 🦊 " + words(70), "short": "the fox"}


@pytest.fixture
def corpus(write_corpus) -> str:
    return write_corpus({"doc_id": list(TEXTS), "text": list(TEXTS.values())})


def spec(**more) -> ScoreSpec:
    return ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=20, stride=10), **more)


def test_the_evidence_of_a_document_is_what_its_text_says(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    manifest = score_corpus(corpus, tiny_checkpoint, output, spec=spec(evidence="all", evidence_text=True))

    table, predictions = (score_tables.read_table(output, name) for name in ("evidence", "predictions"))
    assert (
        table.group_by("doc_id").len().sort("doc_id").rows()
        == predictions.select("doc_id", pl.col("num_chunks").cast(pl.UInt32)).sort("doc_id").rows()
    )
    for row in table.iter_rows(named=True):
        passage = TEXTS[row["doc_id"]][row["start_char"] : row["stop_char"]]
        assert row["text"] == passage
        assert row["start_token"] == 10 * row["chunk_index"]
    together = (
        table.join(predictions, on=["doc_id", "run_id"])
        .group_by("doc_id")
        .agg(pl.col("contribution").sum(), pl.col("logits").first(), pl.col("label").first())
    )
    assert len(together) == len(TEXTS)
    for _, total, logits, label in together.iter_rows():
        assert total == pytest.approx(logits[manifest.labels.index(label)], abs=1e-5)
    (of_one_chunk,) = table.filter(pl.col("doc_id") == "short")["score"]
    assert of_one_chunk == pytest.approx(predictions.filter(pl.col("doc_id") == "short")["score"].item(), abs=1e-6)
    by_document = table.partition_by("doc_id", as_dict=True)
    assert by_document["same",].drop("doc_id").equals(by_document["long",].drop("doc_id"))  # encoded once


def test_texts_are_copied_for_those_alone_who_ask(corpus, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    score_corpus(corpus, tiny_checkpoint, str(output), spec=spec())

    table = score_tables.read_table(str(output), "evidence")
    assert table["text"].null_count() == len(table)
    assert table.group_by("doc_id").len()["len"].max() == 3
    assert table["rank"].max() == 3
    words_of_text = ["Zürich".encode(), "\N{FOX FACE}".encode()]
    for path in output.rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            assert not any(word in path.read_bytes() for word in words_of_text), path
        elif path.is_file():
            flat = str(pl.read_parquet(path).to_dicts()).encode()
            assert not any(word in flat for word in words_of_text), path


def test_evidence_follows_its_documents(write_corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")

    def night(texts: dict[str, str], **more) -> pl.DataFrame:
        folder = write_corpus({"doc_id": list(texts), "text": list(texts.values())})
        score_corpus(folder, tiny_checkpoint, output, spec=spec(**more))
        table, predictions = (score_tables.read_table(output, name) for name in ("evidence", "predictions"))
        assert table.join(predictions, on=["doc_id", "run_id"], how="anti").is_empty()
        return table

    first = night({"a": words(50), "b": words(50, seed=1), "c": words(50, seed=2)})
    second = night({"a": words(50), "b": words(60, seed=3)})
    assert second["doc_id"].unique().sort().to_list() == ["a", "b"]
    assert second.filter(pl.col("doc_id") == "a").equals(first.filter(pl.col("doc_id") == "a"))
    third = night({"a": words(50), "b": words(60, seed=4)}, evidence="none")
    assert third["doc_id"].unique().to_list() == ["a"]  # what was said of b before is not true any more


def test_a_table_holds_no_two_kinds_of_evidence(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score_corpus(corpus, tiny_checkpoint, output, spec=spec())

    words_of_it = "evidence was 'top' and is 'all' now, evidence_text was False and is True now, but documents"
    for ask in (score_corpus, preview_scoring):
        with pytest.raises(ConfigError, match=words_of_it):
            ask(corpus, tiny_checkpoint, output, CorpusSpec(), spec(evidence="all", evidence_text=True))

    score_corpus(corpus, tiny_checkpoint, output, spec=spec(evidence="all", evidence_text=True, full=True))
    assert score_tables.read_table(output, "evidence")["text"].null_count() == 0
    other_rules = ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=15, stride=15))
    score_corpus(corpus, tiny_checkpoint, output, spec=other_rules)
    assert score_tables.read_table(output, "evidence")["rank"].max() == 3


def test_without_evidence_there_is_no_such_table(corpus, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"

    score_corpus(corpus, tiny_checkpoint, str(output), spec=spec(evidence="none"))

    assert sorted(path.name for path in (output / "tables").iterdir()) == ["predictions", "rejected", "runs"]
