"""The flows as a deployment runs them: real Prefect, a tiny encoder, a corpus of three files."""

import base64
import json
import os
import re
import shutil
import time
from pathlib import Path

import httpx
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from prefect import flow
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError

from belt_tasks import checkpoint, planning, progress, publishing, score_planning, score_tables, scoring, storage
from belt_tasks.errors import ConfigError, ShardError, TransientError
from belt_tasks.progress import StoppedError, advance, stop
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec, TrainSpec
from flows import progress_artifact, tasks
from flows.chunk import chunk
from flows.evaluate import evaluate
from flows.fine_tune import fine_tune
from flows.score import score
from tests.conftest import labelled_rows
from tests.flows.conftest import write_files

CHUNKS = ChunkSpec(chunk_size=30, stride=15)
TRAIN = TrainSpec(chunks=CHUNKS, epochs=1, learning_rate=1e-3, validation_fraction=0.2)


@pytest.fixture(scope="module")
def fine_tuned(labelled_corpus, tiny_encoder, tmp_path_factory):
    """(state, output) of a fine-tuning."""
    output = str(tmp_path_factory.mktemp("fine-tuned"))
    return fine_tune(labelled_corpus, str(tiny_encoder), output, CorpusSpec(), TRAIN, return_state=True), output


@pytest.fixture
def corpus(tmp_path) -> str:
    """Three files of 4 documents each, this test's own."""
    return write_files(tmp_path / "corpus", labelled_rows(12, most_words=40), num_files=3)


def flow_run(client, state):
    return client.read_flow_run(state.state_details.flow_run_id)


def task_names(client, state) -> list[str]:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    return sorted(run.name for run in client.read_task_runs(flow_run_filter=wanted))


def artifacts(client, state, kind: str = "markdown") -> list:
    """Those of a flow run and a type."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    return [found for found in client.read_artifacts(artifact_filter=wanted) if found.type == kind]


def artifact(client, state, key: str) -> str:
    """The one markdown artifact of a flow run of such a key."""
    (found,) = [each for each in artifacts(client, state) if each.key == key]
    return found.data


def check_name(client, state, begins: str) -> None:
    """It ends with when the run was due."""
    run = flow_run(client, state)
    assert run.name == f"{begins} {run.expected_start_time:%Y-%m-%d %H:%M} UTC"


def shard_keys(corpus_uri: str) -> set[str]:
    return {shard.key for shard in planning.corpora.plan_shards(corpus_uri, CorpusSpec())}


def check_names(client, state, *, verb: str, others: set[str], corpus_uri: str) -> None:
    """Shards are named after themselves, other tasks after their function."""
    names = task_names(client, state)
    assert {name for name in names if name.startswith(f"{verb}-")} == {f"{verb}-{k}" for k in shard_keys(corpus_uri)}
    assert {re.sub(r"-\w+$", "", name) for name in names if not name.startswith(f"{verb}-")} == others


def mtimes(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*.parquet")}


def predictions(output: str) -> pl.DataFrame:
    return score_tables.read_table(output, "predictions").sort("doc_id")


def test_fine_tune(fine_tuned, client, labelled_corpus):
    state, output = fine_tuned
    assert state.is_completed()
    manifest, receipt = state.result()

    check_name(client, state, f"fine-tune {labelled_corpus}")
    check_names(
        client,
        state,
        verb="prepare",
        others={"plan_fine_tuning", "republish", "fine_tune_prepared", "publish", "forget"},
        corpus_uri=labelled_corpus,
    )
    assert manifest == publishing.read_manifest(output)
    assert manifest.run["flow"] == "fine-tune"
    assert manifest.run["num_documents"] == 35
    assert manifest.rejected_by_reason == {"text_null": 1}
    assert manifest.run["checkpoint_digest"] == receipt.checkpoint_digest
    assert TrainSpec.model_validate_json(manifest.run["spec"]) == TRAIN
    assert manifest.labels == ("fox", "window")
    assert checkpoint.read_card(checkpoint.resolve(output)).chunks == CHUNKS
    assert not list(Path(output).glob("runs/*/training"))  # published, it needs no states
    (picture,) = (Path(output) / "runs").glob("*/learning_curves.png")
    assert base64.b64encode(picture.read_bytes()).decode() in artifact(client, state, "learning-curves")
    shown = artifact(client, state, "fine-tune-summary")
    assert f"run {manifest.run['run_id']}" in shown
    assert "| rejected rows | 1 (text_null 1) |" in shown
    assert f"| 1 (kept) | {receipt.epochs[0].training_loss:.4f} |" in shown
    assert f"- checkpoint: `{receipt.checkpoint_uri}`" in shown


def test_fine_tuning_that_is_complete_is_not_done_again(fine_tuned, client, labelled_corpus, tiny_encoder):
    first, output = fine_tuned
    before = mtimes(output)

    again = fine_tune(labelled_corpus, str(tiny_encoder), output, CorpusSpec(), TRAIN, return_state=True)

    assert again.result() == first.result()
    assert mtimes(output) == before
    assert {name.rsplit("-", 1)[0] for name in task_names(client, again)} == {
        "plan_fine_tuning",
        "republish",
        "read_receipt",
    }
    assert "This run was complete already" in artifact(client, again, "fine-tune-summary")
    assert "This run was complete already" not in artifact(client, first, "fine-tune-summary")


def test_score(fine_tuned, client, labelled_corpus, tmp_path):
    _, model = fine_tuned
    output = str(tmp_path / "predictions")

    state = score(labelled_corpus, model, output, return_state=True)

    assert state.is_completed()
    manifest = state.result()
    check_name(client, state, f"score {labelled_corpus}")
    check_names(
        client,
        state,
        verb="score",
        others={"plan_scoring", "complete", "publish_tables", "score_report"},
        corpus_uri=labelled_corpus,
    )
    assert manifest == score_tables.shown(output).manifest
    run = manifest.run
    assert (run["flow"], run["num_documents"], run["num_rejected"], run["num_shards"]) == ("score", 35, 1, 3)
    assert run["corpus_uri"] == labelled_corpus
    assert ScoreSpec.model_validate_json(run["spec"]).chunks == CHUNKS
    assert {file.table for file in manifest.files} == {"predictions", "evidence", "rejected"}
    assert all((Path(output) / file.path).is_file() for file in manifest.files)
    assert sum(file.num_rows for file in manifest.files if file.table != "evidence") == 36
    assert score_tables.read_table(output, "rejected")["doc_id"].to_list() == ["doc-0030"]
    (progressed,) = artifacts(client, state, "progress")
    assert (progressed.key, progressed.data) == ("score-progress", 100.0)
    assert progressed.description.startswith("score: 35 of 35 documents")
    shown = artifact(client, state, "score-summary")
    assert "## score: 35 documents" in shown
    assert "| rejected rows | 1 (text_null 1) |" in shown
    assert f"- output: `{output}`" in shown


def test_the_flow_and_the_function_give_the_same_predictions(fine_tuned, labelled_corpus, tmp_path):
    _, model = fine_tuned
    score(labelled_corpus, model, str(tmp_path))
    rows = pl.read_parquet(f"{labelled_corpus}/*.parquet").drop_nulls("text").sort("doc_id")

    loaded = checkpoint.load_checkpoint(checkpoint.resolve(model))
    expected = scoring.score_texts(rows["text"].to_list(), loaded, ScoreSpec())

    published = predictions(str(tmp_path))
    assert published["doc_id"].to_list() == rows["doc_id"].to_list()
    assert_frame_equal(
        published.select(pl.col("logits").list.first()),
        pl.DataFrame({"logits": expected.logits_DL[:, 0]}),
        abs_tol=1e-5,
    )
    assert published["label"].to_list() == [loaded.head.labels[i] for i in expected.scores_DL.argmax(axis=1)]


def test_evaluate(fine_tuned, client, labelled_corpus, tmp_path):
    _, model = fine_tuned
    test_split = CorpusSpec(split_column="split", split="test")

    spec = ScoreSpec(max_rejected_share=0.2)  # one of eight
    state = evaluate(labelled_corpus, model, str(tmp_path), test_split, spec, return_state=True)

    assert state.is_completed()
    manifest, receipt = state.result()
    expected = labelled_rows(36, most_words=60).filter(pl.col("split") == "test", pl.col("doc_id") != "doc-0030")
    assert receipt.metrics["num_documents"] == manifest.run["num_documents"] == len(expected)
    accuracy = (predictions(str(tmp_path))["label"] == expected["label"]).mean()
    assert receipt.metrics["accuracy"] == pytest.approx(accuracy)
    assert json.loads(Path(receipt.metrics_uri).read_bytes()) == receipt.metrics
    assert all(Path(uri).read_bytes().startswith(b"\x89PNG") for uri in receipt.plot_uris)
    check_name(client, state, f"evaluate {labelled_corpus}")
    shown = artifact(client, state, "evaluate-summary")
    assert f"| accuracy | {accuracy:.4f} |" in shown
    assert receipt.plot_uris[0] in shown


def test_chunk(client, labelled_corpus, tiny_encoder, tmp_path):
    state = chunk(labelled_corpus, str(tiny_encoder), str(tmp_path), CorpusSpec(), CHUNKS, return_state=True)

    assert state.is_completed()
    manifest = state.result()
    check_name(client, state, f"chunk {labelled_corpus}")
    check_names(
        client, state, verb="chunk", others={"plan_chunking", "republish", "publish"}, corpus_uri=labelled_corpus
    )
    table = publishing.read_table(str(tmp_path), "chunks")
    assert table["doc_id"].n_unique() == 35
    assert len(table) == manifest.run["num_chunks"]
    assert table["num_tokens"].max() == 30
    assert f"| chunks | {len(table)}" in artifact(client, state, "chunk-summary")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"spec": {"chunks": {"chunk_size": 0}}}, "spec.chunks.chunk_size"),
        ({"spec": {"pooling": {"pooling_strategy": "median"}}}, "spec.pooling.pooling_strategy"),
        ({"spec": {"chunk_size": 20}}, "spec.chunk_size"),
        ({"corpus": {"split": "train"}}, "split and split_column go together"),
    ],
)
def test_parameters_are_checked_before_any_task(wrong, field, labelled_corpus, tmp_path):
    with pytest.raises(ParameterTypeError, match=re.escape(field)):
        score(labelled_corpus, "no-such-checkpoint", str(tmp_path / "out"), **wrong)

    assert not (tmp_path / "out").exists()


def test_parameters_may_be_plain_json(corpus, tiny_checkpoint, tmp_path):
    parameters = json.loads('{"spec": {"chunks": {"chunk_size": 20, "stride": 10}}, "corpus": {"id_column": "doc_id"}}')

    manifest = score(corpus, tiny_checkpoint, str(tmp_path / "out"), **parameters)

    assert ScoreSpec.model_validate_json(manifest.run["spec"]).chunks == ChunkSpec(chunk_size=20, stride=10)


def test_a_complete_run_is_not_done_again_and_a_changed_file_makes_another(
    corpus, tiny_checkpoint, tmp_path, monkeypatch, client
):
    output = str(tmp_path / "out")
    first = score(corpus, tiny_checkpoint, output)
    before = mtimes(output)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded again"))
        state = score(corpus, tiny_checkpoint, output, return_state=True)
    assert state.result() == first
    assert mtimes(output) == before
    assert "so nothing was scored" in artifact(client, state, "score-summary")
    assert artifacts(client, state, "progress") == []

    changed = pl.read_parquet(f"{corpus}/part-1.parquet").with_columns(text=pl.lit("a window"))
    changed.write_parquet(f"{corpus}/part-1.parquet")
    second = score(corpus, tiny_checkpoint, output)

    assert second.run["run_id"] != first.run["run_id"]
    assert score_tables.shown(output).manifest == second
    assert predictions(output).filter(pl.col("doc_id").is_in(changed["doc_id"]))["num_tokens"].unique().to_list() == [2]


def test_a_server_that_cannot_be_told_of_progress_is_a_warning(
    tiny_checkpoint, client, corpus, tmp_path, monkeypatch, caplog
):
    def unreachable(**_):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(progress_artifact, "get_client", unreachable)
    state = score(corpus, tiny_checkpoint, str(tmp_path / "out"), return_state=True)

    assert state.is_completed()
    assert artifacts(client, state, "progress") == []
    assert "progress: cannot tell the Prefect server: ConnectError" in caplog.text


def run_in_flow(function):
    """Call a function as one of belt's tasks, in a flow."""
    bound = tasks.bind(function)

    @flow(name="one-task")
    def one_task():
        return bound()

    return one_task()


def test_a_transient_error_is_retried(monkeypatch):
    monkeypatch.setattr(tasks, "RETRY_DELAYS_S", [0.0, 0.0, 0.0])
    calls = []

    def third_time_lucky() -> str:
        calls.append(len(calls))
        if len(calls) < 3:
            raise TransientError("dropped connection")
        return "done"

    told = []
    with progress.listen(lambda *_: None, told.append):
        assert run_in_flow(third_time_lucky) == "done"
    assert calls == [0, 1, 2]
    assert told == ["dropped connection; trying again in 0 seconds"] * 2


@pytest.mark.parametrize(
    ("error", "num_calls"), [(TransientError, 4), (ConfigError, 1), (ShardError, 1), (ValueError, 1)]
)
def test_only_transient_errors_are_retried_and_not_for_ever(error, num_calls, monkeypatch):
    monkeypatch.setattr(tasks, "RETRY_DELAYS_S", [0.0, 0.0, 0.0])
    calls = []

    def never() -> None:
        calls.append(1)
        raise error("no")

    with pytest.raises(error, match="no"):
        run_in_flow(never)
    assert len(calls) == num_calls


def test_retries_wait_longer_each_time():
    assert sorted(tasks.score_shard.retry_delay_seconds) == tasks.score_shard.retry_delay_seconds
    assert tasks.score_shard.retries == len(tasks.score_shard.retry_delay_seconds) == 3


def test_a_failed_shard_leaves_the_others_finished(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    output, broken = str(tmp_path / "out"), Path(corpus, "part-1.parquet")
    content, times = broken.read_bytes(), broken.stat()

    def plan_and_break(*arguments):
        plan = score_planning.plan_scoring(*arguments)
        broken.write_bytes(content[: len(content) // 2])
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "plan_scoring", tasks.bind(plan_and_break))
        state = score(corpus, tiny_checkpoint, output, return_state=True)

    assert state.is_failed()
    with pytest.raises(ShardError, match=r"1 of 3 shards failed, so nothing was published.*\n- .*part-1\.parquet"):
        state.result()
    assert len(list(Path(output).glob("runs/*/receipts/*.json"))) == 2
    assert score_tables.shown(output) is None
    before = mtimes(output)

    broken.write_bytes(content)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    manifest = score(corpus, tiny_checkpoint, output)

    assert manifest.run["num_documents"] == 12
    assert {path: changed for path, changed in mtimes(output).items() if path in before} == before
    written = mtimes(output).keys() - before.keys()
    assert sorted(Path(path).parent.name for path in written if "/out/runs/" in path) == sorted(
        [
            "evidence",
            "predictions",
            "rejected",
            manifest.run["run_id"],
        ]  # of the shard that had failed, and the run's row
    )
    undisturbed = str(tmp_path / "undisturbed")
    score(corpus, tiny_checkpoint, undisturbed)
    assert_frame_equal(predictions(output).drop("scored_at"), predictions(undisturbed).drop("scored_at"))


def test_an_error_that_is_not_a_shard_s_own_is_raised_as_it_is(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    def plan_and_change(*arguments):
        plan = score_planning.plan_scoring(*arguments)
        folder = Path(corpus).parent / "copy"
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
        checkpoint.cache._kept.clear()
        return plan

    storage.put_directory(Path(tiny_checkpoint), str(tmp_path / "copy"), last="belt.json")
    monkeypatch.setattr(tasks, "plan_scoring", tasks.bind(plan_and_change))

    with pytest.raises(ConfigError, match=r"damaged checkpoint|changed during the run"):
        score(corpus, str(tmp_path / "copy"), str(tmp_path / "out"))


def test_an_interrupted_gather_stops_the_shards_at_their_next_report(monkeypatch):
    reached = []

    def endless() -> None:
        for _ in range(3000):
            advance("test", 1)
            reached.append(1)
            time.sleep(0.01)

    bound = tasks.bind(endless)
    errors = []

    @flow(name="interrupted", task_runner=tasks.one_worker)
    def interrupted():
        future = bound.submit()

        def interrupt(_future):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tasks, "_result", interrupt)
            try:
                tasks.gather([future])
            except KeyboardInterrupt as error:
                errors.append(error)
        errors.append(future.result(raise_on_failure=False))
        return "left"

    try:
        assert interrupted() == "left"
    finally:
        planning.progress.go_on()
    assert isinstance(errors[0], KeyboardInterrupt)
    assert isinstance(errors[1], StoppedError)
    assert len(reached) < 3000


def test_a_stopped_run_does_not_stop_the_next_one(corpus, tiny_checkpoint, tmp_path):
    stop()

    manifest = score(corpus, tiny_checkpoint, str(tmp_path / "out"))

    assert manifest.run["num_documents"] == 12


def test_a_score_run_does_not_hide_a_model_and_a_lost_checkpoint_is_made_again(write_corpus, tiny_encoder, tmp_path):
    corpus_uri, model = write_corpus(labelled_rows(12, most_words=20), name="small"), str(tmp_path / "model")
    spec = TrainSpec(chunks=ChunkSpec(chunk_size=30, stride=30), epochs=1, validation_fraction=0.0)
    first, receipt = fine_tune(corpus_uri, str(tiny_encoder), model, CorpusSpec(), spec)

    with pytest.raises(ConfigError, match="holds what a fine-tune run published, which a score run would hide"):
        score(corpus_uri, model, model)
    shutil.rmtree(receipt.checkpoint_uri)
    again, _ = fine_tune(corpus_uri, str(tiny_encoder), model, CorpusSpec(), spec)

    assert again.run["run_id"] == first.run["run_id"]
    assert again.run["checkpoint_digest"] == first.run["checkpoint_digest"]
    assert Path(receipt.checkpoint_uri, "belt.json").exists()
