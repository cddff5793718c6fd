"""Maintenance as a deployment runs it: it cleans up, checks the tables, and says so."""

from pathlib import Path

import pytest

from belt_tasks import lake, score_tables
from belt_tasks.errors import ConfigError, DeadlineError
from belt_tasks.specs import CorpusSpec, ScoreSpec
from flows.maintain import maintain
from flows.score import score
from tests.flows.test_flows import artifact


def test_orphans_go_and_every_published_row_is_checked(labelled_corpus, tiny_checkpoint, tmp_path, client):
    output = str(tmp_path / "out")
    score(labelled_corpus, tiny_checkpoint, output, CorpusSpec(), ScoreSpec(device="cpu"))
    orphan = Path(output, "runs", "0123456789abcdef", "plan.json")
    orphan.parent.mkdir()
    orphan.write_text("{}")

    state = maintain(output, older_than_days=0, return_state=True)

    cleaned, checks = state.result()
    assert not orphan.exists()
    assert cleaned.num_unfinished_runs == 1
    assert {check.table: check.num_rows for check in checks}["predictions"] == 35
    told = artifact(client, state, "maintain-summary")
    assert "Removed 1 files" in told
    assert "| predictions | 1 | 35 |" in told


def test_a_table_that_lost_a_file_fails_the_run(labelled_corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score(labelled_corpus, tiny_checkpoint, output, CorpusSpec(), ScoreSpec(device="cpu"))
    table = score_tables.table_at(output, "predictions")
    Path(lake.file_uris(table, table.load().version())[0]).unlink()

    with pytest.raises(ConfigError, match=r"cannot read .*/tables/predictions/.*: no such file"):
        maintain(output)


def test_it_takes_no_longer_than_it_may(labelled_corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    score(labelled_corpus, tiny_checkpoint, output, CorpusSpec(), ScoreSpec(device="cpu"))

    with pytest.raises(DeadlineError, match=r"^check: not done within the 1e-06 s that the run may take"):
        maintain(output, time_limit_s=1e-6)
