"""Scoring by alias: a run belongs to the checkpoint that the alias was at when it was planned, to its end."""

import multiprocessing
import os
import signal
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import evaluation, model_store, planning, registry, score_tables, shard_scoring
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import CorpusSpec, ScoreSpec
from tests.conftest import labelled_rows, save_tiny_checkpoint, save_tiny_encoder

CPU = ScoreSpec(device="cpu")


@pytest.fixture(scope="module")
def two_checkpoints(tiny_encoder, tmp_path_factory) -> tuple[str, str]:
    """Of different encoders, so of different scores."""
    other = save_tiny_encoder(tmp_path_factory.mktemp("other"), "bert", seed=1)
    folder, labels = tmp_path_factory.mktemp("checkpoints"), ("fox", "window")
    return save_tiny_checkpoint(folder / "a", tiny_encoder, labels), save_tiny_checkpoint(folder / "b", other, labels)


@pytest.fixture
def models(two_checkpoints, tmp_path) -> tuple[str, str, str]:
    """A registry, and the digests of its champion and of another model."""
    uri = str(tmp_path / "registry")
    first, second = (model_store.add(uri, checkpoint, who="ann").digest for checkpoint in two_checkpoints)
    move(uri, first)
    return uri, first, second


def move(uri: str, digest: str) -> None:
    registry.put_alias(uri, "champion", digest, who="ann", why="a test")


@pytest.fixture
def corpus(write_corpus) -> str:
    return write_corpus(labelled_rows(12, most_words=40), num_files=3)


def predictions(output: Path | str) -> pl.DataFrame:
    return score_tables.read_table(str(output), "predictions").drop("scored_at", "run_id")


@pytest.mark.parametrize("spec", [CPU, CPU.model_copy(update={"publish_every": 4})], ids=["at once", "in steps"])
def test_an_alias_that_moves_during_a_run_changes_nothing(models, corpus, tmp_path, monkeypatch, spec):
    uri, first, second = models
    score_corpus(corpus, registry.checkpoint_uri(uri, first), str(tmp_path / "expected"), spec=spec)
    scored, score_shard = [], shard_scoring.score_shard

    def score_and_move(shard, *arguments, **more):
        scored.append(shard.key)
        receipt = score_shard(shard, *arguments, **more)
        move(uri, [first, second][len(scored) % 2])
        return receipt

    monkeypatch.setattr(shard_scoring, "score_shard", score_and_move)
    manifest = score_corpus(corpus, f"{uri}@champion", str(tmp_path / "out"), spec=spec)

    assert len(scored) == 3
    assert registry.find(uri, "champion").number > 3
    assert manifest.run["checkpoint_uri"] == registry.checkpoint_uri(uri, first)
    assert manifest.run["checkpoint_digest"] == first
    assert predictions(tmp_path / "out")["checkpoint_digest"].unique().to_list() == [first]
    assert_frame_equal(predictions(tmp_path / "out"), predictions(tmp_path / "expected"), abs_tol=1e-6)


def score_one_shard_and_die(*arguments) -> None:
    score_shard = shard_scoring.score_shard

    def score_and_die(*its, **more):
        score_shard(*its, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    shard_scoring.score_shard = score_and_die
    score_corpus(*arguments, spec=CPU)


@pytest.mark.parametrize("moves", [False, True])
def test_a_run_that_was_killed_is_taken_up_unless_the_alias_has_moved(models, corpus, tmp_path, moves):
    uri, first, second = models
    arguments = (corpus, f"{uri}@champion", str(tmp_path / "out"))
    process = multiprocessing.get_context("spawn").Process(target=score_one_shard_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    ((run_id, finished),) = ((path.parents[1].name, path) for path in (tmp_path / "out").glob("runs/*/receipts/*"))
    before = finished.stat().st_mtime_ns

    if moves:
        move(uri, second)
    manifest = score_corpus(*arguments, spec=CPU)

    digest = second if moves else first
    assert (manifest.run["run_id"] != run_id) is moves
    assert finished.stat().st_mtime_ns == before
    score_corpus(corpus, registry.checkpoint_uri(uri, digest), str(tmp_path / "expected"), spec=CPU)
    assert_frame_equal(predictions(tmp_path / "out"), predictions(tmp_path / "expected"), abs_tol=1e-6)
    assert predictions(tmp_path / "out")["checkpoint_digest"].unique().to_list() == [digest]


def test_a_night_scores_again_when_the_alias_moved_to_another_checkpoint_only(models, corpus, tmp_path):
    uri, first, second = models
    arguments = (corpus, f"{uri}@champion", str(tmp_path / "out"))
    shown = score_corpus(*arguments, spec=CPU)

    assert score_corpus(*arguments, spec=CPU) == shown
    assert score_corpus(corpus, registry.checkpoint_uri(uri, first), str(tmp_path / "out"), spec=CPU) == shown
    move(uri, second)
    assert score_corpus(*arguments, spec=CPU).run["checkpoint_digest"] == second


def test_an_evaluation_measures_the_checkpoint_that_it_was_planned_on(models, corpus, tmp_path):
    uri, first, second = models

    plan = planning.plan_evaluation(corpus, f"{uri}@champion", CorpusSpec())
    move(uri, second)
    manifest = score_corpus(corpus, plan.checkpoint_uri, str(tmp_path / "out"), spec=CPU)

    assert plan.checkpoint_uri == registry.checkpoint_uri(uri, first)
    assert manifest.run["checkpoint_digest"] == first
    assert evaluation.evaluate_run(plan, CorpusSpec(), manifest).metrics["num_documents"] == 12
