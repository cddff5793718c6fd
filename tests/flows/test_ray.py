"""Scoring on a Ray cluster: a real one, on this machine."""

from polars.testing import assert_frame_equal

from belt_tasks import score_tables
from belt_tasks.specs import CorpusSpec, RaySpec, ScoreSpec
from flows.score import score

CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)


def test_a_private_cluster(labelled_corpus, tiny_checkpoint, tmp_path):
    near = score(labelled_corpus, tiny_checkpoint, str(tmp_path / "near"), CorpusSpec(), CPU)
    far = score(
        labelled_corpus,
        tiny_checkpoint,
        str(tmp_path / "far"),
        CorpusSpec(),
        CPU,
        runner="ray",
        ray=RaySpec(num_workers=2),
    )
    assert far.run["run_id"] == near.run["run_id"]
    tables = [score_tables.read_table(str(tmp_path / name), "predictions") for name in ("near", "far")]
    assert_frame_equal(*(table.drop("scored_at") for table in tables), abs_tol=1e-6)
