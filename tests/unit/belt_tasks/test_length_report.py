"""Length reports without Prefect: what is compared, what is left out, and what cannot be compared."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from belt_tasks import length_report, planning, score_corpus, score_planning, score_tables
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef
from belt_tasks.specs import CorpusSpec, LengthSpec, ScoreSpec
from tests.conftest import save_tiny_checkpoint, save_tiny_encoder, words

CORPUS = CorpusSpec()
SPEC = ScoreSpec(device="cpu")
QUICK = LengthSpec(num_resamples=100, min_bucket_documents=3)
TARGETS = {
    "multilabel": (("a", "b"), lambda i: [["a"], [], ["a", "b"]][i % 3]),
    "regression": (("stars",), lambda i: i / 4),
}


def corpus_of(write_corpus, label, *, num_documents=24) -> str:
    rows = [(f"d{i:02}", words(5 * i, seed=i), label(i)) for i in range(num_documents)]
    return write_corpus(pl.DataFrame(rows, schema=["doc_id", "text", "label"], orient="row"), num_files=2)


def scored(corpus_uri, ways) -> list[RunRef]:
    """Every way's run, as the flow makes them."""
    runs = []
    for way in ways:
        plan = score_planning.plan_scoring(corpus_uri, way.checkpoint_uri, way.output_uri, CORPUS, way.spec)
        if plan.manifest is None:
            receipts = score_corpus.score_shards(plan, CORPUS)
            score_corpus.complete(plan, receipts, corpus_uri=corpus_uri, started_at=datetime.now(UTC))
        runs.append(plan.run)
    return runs


def evaluated(corpus_uri, checkpoint, output, spec=SPEC) -> tuple[planning.EvaluationPlan, RunRef]:
    plan = planning.plan_evaluation(corpus_uri, checkpoint, CORPUS)
    run = score_corpus.score_corpus(corpus_uri, checkpoint, str(output), CORPUS, spec).run
    return plan, RunRef(output_uri=run["output_uri"], run_id=run["run_id"])


@pytest.mark.parametrize("task", TARGETS)
def test_other_tasks_are_compared_by_their_own_main_metric(task, tiny_encoder, write_corpus, tmp_path):
    labels, label = TARGETS[task]
    corpus_uri = corpus_of(write_corpus, label)
    checkpoint = save_tiny_checkpoint(tmp_path / "model", tiny_encoder, labels, task=task)
    plan, run = evaluated(corpus_uri, checkpoint, tmp_path / "out")
    ways = length_report.plan_ways(plan, str(tmp_path / "out"), SPEC)
    assert [length_report.is_done_by(way, run) for way in ways] == [False, False, True]

    report = length_report.write_length_report(plan, ways, [*scored(corpus_uri, ways[:2]), run], run, CORPUS, QUICK)

    assert report.metric == {"multilabel": "micro_f1", "regression": "mse"}[task]
    table = score_tables.read_table(str(tmp_path / "out"), "predictions")
    said = np.array([[score["score"] for score in scores] for scores in table["scores"]])
    true = [label(int(doc_id[1:])) for doc_id in table["doc_id"]]
    value = report.row(report.group("all"), "all").value
    if task == "regression":
        assert value == pytest.approx(((said[:, 0] - np.array(true)) ** 2).mean())
    else:
        carried, found = np.array([[name in each for name in labels] for each in true]), said >= 0.5
        assert value == pytest.approx(2 * (carried & found).sum() / (carried.sum() + found.sum()))
    assert report.reading("all").num_tokens_encoded == table["num_tokens"].sum()
    assert sum(group.num_documents for group in report.buckets) == report.num_documents == 24


def test_documents_that_a_way_lacks_are_left_out_of_all(tiny_checkpoint, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda i: ["ham", "spam"][i % 2])
    plan, run = evaluated(corpus_uri, tiny_checkpoint, tmp_path / "out")
    ways = length_report.plan_ways(plan, str(tmp_path / "out"), SPEC)
    runs = scored(corpus_uri, ways[:2])
    for number, (lost, doc_id) in enumerate([(True, "d03"), (False, "d20")]):  # no score here, another text there
        for path in Path(runs[number].uri, "predictions").glob("*.parquet"):
            rows, it = pl.read_parquet(path), pl.col("doc_id") == doc_id
            other = pl.when(it).then(pl.lit("f" * 64)).otherwise(pl.col("content_fingerprint"))
            rows = rows.filter(~it) if lost else rows.with_columns(content_fingerprint=other)
            rows.write_parquet(path)

    report = length_report.write_length_report(plan, ways, [*runs, run], run, CORPUS, QUICK)

    assert (report.num_documents, report.num_left_out) == (22, 2)
    table = score_tables.read_table(str(tmp_path / "out"), "predictions").filter(
        ~pl.col("doc_id").is_in(["d03", "d20"])
    )
    true = ["ham" if int(doc_id[1:]) % 2 == 0 else "spam" for doc_id in table["doc_id"]]
    for reading in report.readings:
        assert reading.num_tokens_encoded <= table["num_tokens"].sum()
    assert report.row(report.group("all"), "all").value == pytest.approx((table["label"] == pl.Series(true)).mean())


def test_a_run_that_did_not_score_everything_by_the_same_rules_is_no_ways(tiny_checkpoint, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda i: ["ham", "spam"][i % 2], num_documents=6)
    output = str(tmp_path / "out")
    plan, run = evaluated(corpus_uri, tiny_checkpoint, output)

    def done(spec=SPEC, run=run):
        return [length_report.is_done_by(way, run) for way in length_report.plan_ways(plan, output, spec)]

    assert done() == [False, False, True]
    assert done(SPEC.model_copy(update={"threshold": 0.7})) == [False, False, False]
    chunks = plan_chunks(plan, output)
    assert done(SPEC.model_copy(update={"chunks": chunks.model_copy(update={"stride": 10})})) == [False, False, False]
    heads = SPEC.model_copy(update={"chunks": chunks.model_copy(update={"selection": "head"})})
    assert done(heads, evaluated(corpus_uri, tiny_checkpoint, tmp_path / "heads", heads)[1]) == [True, False, False]
    more = pl.DataFrame({"doc_id": ["new"], "text": ["a fox"], "label": ["ham"]})
    more.write_parquet(Path(corpus_uri, "part-9.parquet"))
    assert done(run=evaluated(corpus_uri, tiny_checkpoint, output)[1]) == [False, False, False]  # one document alone


def plan_chunks(plan, output):
    return length_report.plan_ways(plan, output, SPEC)[-1].spec.chunks


def test_checkpoints_of_their_own_keep_their_pooling_and_get_the_windows(tiny_encoder, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda i: ["a", "b"][i % 2], num_documents=4)
    one, other = (save_tiny_checkpoint(tmp_path / name, tiny_encoder, ("a", "b")) for name in ("one", "other"))
    plan = planning.plan_evaluation(corpus_uri, one, CORPUS)

    ways = length_report.plan_ways(plan, str(tmp_path / "out"), SPEC, head_tail_checkpoint_uri=other)

    assert [way.checkpoint_uri for way in ways] == [one, other, one]
    assert [way.spec.chunks.selection for way in ways] == ["head", "head_tail", "all"]
    assert {way.spec.chunks.chunk_size for way in ways} == {30}
    assert {way.spec.pooling for way in ways} == {None}


@pytest.mark.parametrize(
    ("task", "labels"), [("multiclass", ("a", "b", "c")), ("multilabel", ("a", "b")), ("multiclass", ("b", "a"))]
)
def test_a_checkpoint_of_another_task_or_other_labels_is_refused(task, labels, tiny_encoder, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda i: ["a", "b"][i % 2], num_documents=4)
    one = save_tiny_checkpoint(tmp_path / "one", tiny_encoder, ("a", "b"))
    other = save_tiny_checkpoint(tmp_path / "other", tiny_encoder, labels, task=task)
    plan = planning.plan_evaluation(corpus_uri, one, CORPUS)

    with pytest.raises(
        ConfigError,
        match=r"head_checkpoint_uri: must have the task and the labels of .*one \(multiclass of a, b\), got "
        rf"{task} of {', '.join(labels)} of .*other",
    ):
        length_report.plan_ways(plan, str(tmp_path / "out"), SPEC, head_checkpoint_uri=other)


def test_a_checkpoint_that_is_not_there(tiny_checkpoint, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda _: "ham", num_documents=2)
    plan = planning.plan_evaluation(corpus_uri, tiny_checkpoint, CORPUS)

    with pytest.raises(ConfigError, match="nowhere: no checkpoint there"):
        length_report.plan_ways(plan, "out", SPEC, head_tail_checkpoint_uri=str(tmp_path / "nowhere"))


def test_another_tokenizer_is_no_comparison_by_length(tiny_encoder, write_corpus, tmp_path):
    corpus_uri = corpus_of(write_corpus, lambda i: ["a", "b"][i % 2], num_documents=4)
    (tmp_path / "roberta").mkdir()
    roberta = save_tiny_encoder(tmp_path / "roberta", "roberta")
    one = save_tiny_checkpoint(tmp_path / "one", tiny_encoder, ("a", "b"))
    other = save_tiny_checkpoint(tmp_path / "other", roberta, ("a", "b"))
    plan, run = evaluated(corpus_uri, one, tmp_path / "out")
    ways = length_report.plan_ways(plan, str(tmp_path / "out"), SPEC, head_checkpoint_uri=other)

    with pytest.raises(
        ConfigError, match=r"must have the same tokenizer .*, got \d+ tokens of document 'd0\d' by .*other"
    ):
        length_report.write_length_report(plan, ways, [*scored(corpus_uri, ways[:2]), run], run, CORPUS, QUICK)
