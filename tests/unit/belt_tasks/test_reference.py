"""The reference is what the first whole scoring by some rules counted, in whatever steps, and nothing changes it."""

from datetime import UTC, datetime

import polars as pl
import pytest

from belt_tasks import reference, score_planning, score_tables, statistics, storage
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.score_corpus import complete, score_corpus, score_shards
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from belt_tasks.statistics import RunStatistics
from tests.conftest import words


def spec(size: int = 30, **more) -> ScoreSpec:
    return ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=size, stride=size), **more)


def write(folder, name: str, number: int) -> None:
    folder.mkdir(exist_ok=True)
    rows = {"doc_id": [f"{name}-{i}" for i in range(number)], "text": [words(9 * i, seed=i) for i in range(number)]}
    pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")


@pytest.fixture
def corpus(tmp_path):
    """Three files of eight documents."""
    for name in "abc":
        write(tmp_path / "corpus", name, 8)
    return tmp_path / "corpus"


def refer(output: str, manifest: Manifest) -> RunStatistics | None:
    run = RunRef(output_uri=output, run_id=manifest.run["run_id"])
    return reference.reference_of(run, manifest, statistics.of_run(run, manifest))


def stored(output: str) -> list[str]:
    folder = storage.join(output, "statistics")
    return [file.uri for file in storage.list_files(folder, suffix=".json")] if storage.is_directory(folder) else []


def nights(corpus, checkpoint: str, output: str, spec: ScoreSpec, *, after=lambda _: None) -> list[Manifest]:
    """The runs of a night, one a step; after each of them something is done."""
    manifests = []
    while True:
        plan = score_planning.plan_scoring(str(corpus), checkpoint, output, CorpusSpec(), spec)
        receipts = score_shards(plan, CorpusSpec())
        started_at = datetime.now(UTC)
        manifests.append(complete(plan, receipts, corpus_uri=str(corpus), started_at=started_at))
        score_tables.publish_tables(plan.run, manifests[-1], base_version=plan.base_version)
        after(manifests[-1])
        if plan.is_last:
            return manifests


def test_the_first_run_is_the_reference_of_those_that_follow(corpus, tiny_checkpoint, output):
    first = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    made = refer(output, first)

    assert made.num_documents == 24
    assert made.run_ids == (first.run["run_id"],)
    write(corpus, "d", 5)
    second = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    assert second.run["num_documents"] == 5
    assert refer(output, second) == made
    assert len(stored(output)) == 1


def test_other_rules_have_a_reference_of_their_own(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    first = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(30))
    before = refer(output, first)
    second = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(20))

    now = refer(output, second)

    assert now.run_ids == (second.run["run_id"],)
    assert now.num_documents == 24
    assert refer(output, first) == before
    assert len(stored(output)) == 2


@pytest.mark.parametrize("counted_on_the_way", [True, False])
def test_the_steps_of_a_whole_scoring_are_the_reference_together(corpus, tiny_checkpoint, tmp_path, counted_on_the_way):
    output = str(tmp_path / "out")
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(20))
    seen = []

    steps = nights(
        corpus,
        tiny_checkpoint,
        output,
        spec(publish_every=8),
        after=lambda manifest: seen.append(refer(output, manifest)) if counted_on_the_way else None,
    )

    assert len(steps) == 3
    assert seen[:2] == [None, None][: len(seen)]  # not before the last
    made = refer(output, steps[-1])
    assert made.run_ids == tuple(sorted(step.run["run_id"] for step in steps))
    at_once = score_corpus(str(corpus), tiny_checkpoint, str(tmp_path / "at once"), spec=spec())
    expected = refer(str(tmp_path / "at once"), at_once)
    assert made.model_copy(update={"run_ids": expected.run_ids}) == expected
    assert [refer(output, step) for step in steps] == [made] * 3


def test_steps_of_rules_that_were_given_up_are_no_part_of_it(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    plan = score_planning.plan_scoring(str(corpus), tiny_checkpoint, output, CorpusSpec(), spec(20, publish_every=8))
    started_at = datetime.now(UTC)
    step = complete(plan, score_shards(plan, CorpusSpec()), corpus_uri=str(corpus), started_at=started_at)
    score_tables.publish_tables(plan.run, step, base_version=plan.base_version)

    whole = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(30))

    assert refer(output, step) is None
    assert refer(output, whole).run_ids == (whole.run["run_id"],)
    assert refer(output, whole).num_documents == 24


def test_a_night_that_scored_only_what_changed_is_no_reference(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())  # before there were statistics
    write(corpus, "d", 5)
    second = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())

    assert refer(output, second) is None
    assert stored(output) == []
    whole = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(full=True))
    assert refer(output, whole).num_documents == 29
    assert refer(output, second).num_documents == 29


def test_a_later_whole_scoring_does_not_change_it(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    made = refer(output, score_corpus(str(corpus), tiny_checkpoint, output, spec=spec()))
    write(corpus, "d", 5)

    again = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(full=True))

    assert again.run["num_documents"] == 29
    assert refer(output, again) == made
