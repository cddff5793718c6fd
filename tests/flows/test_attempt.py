"""Attempts at a run: how long one may take, and how many there may be."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from polars.testing import assert_frame_equal
from prefect import flow
from prefect.exceptions import ParameterTypeError

from belt_tasks import progress, score_tables
from belt_tasks.errors import DeadlineError
from belt_tasks.specs import CorpusSpec, ScoreSpec
from flows.attempt import MOST_ATTEMPTS, attempt
from flows.score import score

CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)


def test_a_run_that_takes_too_long_fails_and_the_next_attempt_goes_on(
    labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    output = tmp_path / "out"

    def receipts() -> list[Path]:
        return sorted(output.glob("runs/*/receipts/*"))

    # hours go by once a shard is finished
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 7200.0 if receipts() else 0.0))
    with pytest.raises(DeadlineError, match=r"not done within the 3,600 s that the run may take"):
        score(labelled_corpus, tiny_checkpoint, str(output), CorpusSpec(), CPU, time_limit_s=3600)
    monkeypatch.undo()

    finished = receipts()
    before = [path.stat().st_mtime_ns for path in finished]
    assert 1 <= len(finished) < 3
    assert score_tables.shown(str(output)) is None
    score(labelled_corpus, tiny_checkpoint, str(output), CorpusSpec(), CPU, time_limit_s=600)
    score(labelled_corpus, tiny_checkpoint, str(tmp_path / "whole"), CorpusSpec(), CPU)
    assert [path.stat().st_mtime_ns for path in finished] == before
    tables = [score_tables.read_table(str(tmp_path / name), "predictions") for name in ("out", "whole")]
    assert_frame_equal(*(table.drop("scored_at", "run_id") for table in tables), abs_tol=1e-6)


def test_a_limit_is_a_number_of_seconds(labelled_corpus, tiny_checkpoint, tmp_path):
    with pytest.raises(ParameterTypeError, match="time_limit_s"):
        score(labelled_corpus, tiny_checkpoint, str(tmp_path / "out"), time_limit_s=0)


def test_a_run_is_not_started_for_ever():
    numbers = []

    @flow(retries=2 * MOST_ATTEMPTS, retry_delay_seconds=0)
    def ends_in_disorder() -> None:
        with attempt():
            numbers.append(1)
            raise OSError("and again")

    state = ends_in_disorder(return_state=True)

    assert len(numbers) == MOST_ATTEMPTS
    assert f"was started {2 * MOST_ATTEMPTS} times and did not end in order" in state.message
