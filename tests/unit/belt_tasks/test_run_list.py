"""The runs of an output are listed with how far they came, and a bad night is rolled back by one commit."""

from datetime import datetime

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from belt_tasks import delta_tables, score_planning, score_tables, scoring, shard_scoring, summaries
from belt_tasks.errors import ConfigError, RejectedError
from belt_tasks.run_list import earlier_steps, list_runs, roll_back
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from tests.delta_readers import by_delta_lake


def spec(size: int) -> ScoreSpec:
    return ScoreSpec(chunks=ChunkSpec(chunk_size=size, stride=size), max_rejected_share=0.2)


@pytest.fixture
def corpus(tmp_path) -> str:
    """Two files of five documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(2):
        texts = ["the quick brown fox", None, "the lazy dog", "it sleeps", ""]
        pl.DataFrame({"doc_id": [f"{i}-{j}" for j in range(5)], "text": texts}).write_parquet(folder / f"{i}.parquet")
    return str(folder)


def read(output: str, name: str) -> pl.DataFrame:
    return by_delta_lake(score_tables.table_at(output, name).uri)


def states(output: str) -> dict[str, str]:
    return {run.run_id: run.state for run in list_runs(output)}


def test_runs_are_listed_with_their_state_and_cost(corpus, tiny_checkpoint, output):
    first = score_corpus(corpus, tiny_checkpoint, output, spec=spec(30)).run
    second = score_corpus(corpus, tiny_checkpoint, output, spec=spec(20)).run
    plan = score_planning.plan_scoring(corpus, tiny_checkpoint, output, CorpusSpec(), spec(10))
    shard_scoring.score_shard(
        plan.shards[0],
        CorpusSpec(),
        plan.spec,
        run=plan.run,
        checkpoint_uri=plan.checkpoint_uri,
        checkpoint_digest=plan.checkpoint_digest,
        scoring_fingerprint=plan.scoring_fingerprint,
        rows_uri=plan.run.rows_uri(plan.shards[0].key),
    )

    runs = list_runs(output)

    assert [(run.run_id, run.state, run.num_shards) for run in runs] == [
        (second["run_id"], "shown", 2),
        (first["run_id"], "complete", 2),
        (plan.run.run_id, "unfinished", 1),
    ]
    assert (runs[0].num_documents, runs[0].num_rejected, runs[0].elapsed_s) == (8, 2, second["elapsed_s"])
    told = summaries.runs_summary(runs).splitlines()
    assert told[2].startswith(f"| {second['run_id']} | shown | score | 20")
    assert told[4] == f"| {plan.run.run_id} | unfinished | score |  | 1 of 2 |  | 2 |  |  |"


def test_a_refused_run_says_why(corpus, tiny_checkpoint, output):
    score_corpus(corpus, tiny_checkpoint, output, spec=spec(30))
    strict = spec(20).model_copy(update={"max_rejected_share": 0.1})
    with pytest.raises(RejectedError) as refused:
        score_corpus(corpus, tiny_checkpoint, output, spec=strict)

    run = list_runs(output)[1]

    assert (run.state, run.num_shards, run.num_shards_planned, run.num_rejected) == ("refused", 0, 2, 2)
    assert run.reason == str(refused.value)
    assert summaries.runs_summary(list_runs(output)).endswith(f"\n\n- {run.run_id}: {run.reason}\n")

    lenient = score_corpus(corpus, tiny_checkpoint, output, spec=spec(20)).run
    assert lenient["run_id"] == run.run_id
    assert set(states(output).values()) == {"shown", "complete"}


def test_steps_of_a_night_are_told_together(corpus, tiny_checkpoint, output):
    before = score_corpus(corpus, tiny_checkpoint, output, spec=spec(30))
    stepwise = spec(20).model_copy(update={"publish_every": 1})

    last = score_corpus(corpus, tiny_checkpoint, output, spec=stepwise)

    (step,) = earlier_steps(last)
    assert earlier_steps(before) == earlier_steps(step) == []
    assert [run.is_step for run in list_runs(output)] == [False, True, False]
    assert f"| {step.run['run_id']} | complete (a step) |" in summaries.runs_summary(list_runs(output))
    counts = [(run.run["num_documents"], run.run["num_rejected"]) for run in (step, last)]
    assert counts == [(4, 1), (4, 1)]
    asked_at = datetime.fromisoformat(before.run["finished_at"])
    told = summaries.run_summary(last, asked_at=asked_at, earlier_steps=[step])
    assert "| in all 2 steps | 8 documents, 2 rejected rows, " in told
    assert "in all" not in summaries.run_summary(before, asked_at=asked_at, earlier_steps=[])


def test_rolling_back_shows_what_was_shown_and_again_undoes_it(corpus, tiny_checkpoint, output):
    first, second = (score_corpus(corpus, tiny_checkpoint, output, spec=spec(size)).run["run_id"] for size in (30, 20))
    bad = {name: read(output, name) for name in ("predictions", "rejected")}
    assert set(bad["predictions"]["run_id"]) == {second}

    done = roll_back(output)

    assert (done.run_id, done.from_run_id, done.version) == (first, second, 2)
    assert states(output) == {first: "shown", second: "complete"}
    assert set(read(output, "predictions")["run_id"]) == set(read(output, "rejected")["run_id"]) == {first}
    assert len(read(output, "runs")) == 2

    assert roll_back(output).run_id == second
    for name, before in bad.items():
        assert_frame_equal(read(output, name), before)


def test_a_run_by_name_and_the_next_night_after_a_rollback(corpus, tiny_checkpoint, output):
    names = [score_corpus(corpus, tiny_checkpoint, output, spec=spec(size)).run["run_id"] for size in (30, 20, 10)]

    assert roll_back(output, names[0]).from_run_id == names[2]
    assert set(read(output, "predictions")["run_id"]) == {names[0]}

    night = score_corpus(corpus, tiny_checkpoint, output, spec=spec(10)).run
    assert night["base_run_id"] == names[0]
    assert set(read(output, "predictions")["run_id"]) == {night["run_id"]}
    assert states(output)[night["run_id"]] == "shown"


def test_the_night_after_a_rollback_shows_what_it_had_scored(corpus, tiny_checkpoint, output, monkeypatch):
    _, second = (score_corpus(corpus, tiny_checkpoint, output, spec=spec(size)).run["run_id"] for size in (30, 20))
    roll_back(output)
    monkeypatch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded again"))

    night = score_corpus(corpus, tiny_checkpoint, output, spec=spec(20)).run

    assert night["run_id"] == second
    assert states(output)[second] == "shown"


def test_a_run_that_is_shown_during_a_rollback_keeps_its_tables(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    for size in (30, 20):
        score_corpus(corpus, tiny_checkpoint, output, spec=spec(size))
    restore, shown = delta_tables.restore, []

    def restore_and_score(table, version, **options):
        made = restore(table, version, **options)
        if table.name == "predictions":
            shown.append(score_corpus(corpus, tiny_checkpoint, output, spec=spec(10)).run["run_id"])
        return made

    monkeypatch.setattr(delta_tables, "restore", restore_and_score)
    roll_back(output)

    for name in ("predictions", "evidence", "rejected"):
        assert set(read(output, name)["run_id"]) == set(shown), name


def test_what_cannot_be_rolled_back_is_said(corpus, tiny_checkpoint, output):
    with pytest.raises(ConfigError, match="no run has written there"):
        list_runs(output)
    with pytest.raises(ConfigError, match="nothing was published there"):
        roll_back(output)
    first = score_corpus(corpus, tiny_checkpoint, output, spec=spec(30)).run["run_id"]
    with pytest.raises(ConfigError, match=f"run {first} is the only one that was ever shown"):
        roll_back(output)
    second = score_corpus(corpus, tiny_checkpoint, output, spec=spec(20)).run["run_id"]
    with pytest.raises(ConfigError, match=f"run {second} is what is shown"):
        roll_back(output, second)
    with pytest.raises(ConfigError, match=f"run must be one that was shown: {first}; got 'nonsense'"):
        roll_back(output, "nonsense")
