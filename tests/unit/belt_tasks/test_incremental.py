"""Incremental scoring: whatever happens to a corpus, the published table is that of a full scoring of it."""

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings

from belt_tasks import changes, delta_tables, prepare, score_tables, shard_scoring
from belt_tasks.checkpoint import load_checkpoint
from belt_tasks.run_list import roll_back
from belt_tasks.score_corpus import score_corpus
from belt_tasks.score_tables import FOLLOWERS
from belt_tasks.scoring import score_texts
from belt_tasks.specs import ChunkSpec, ScoreSpec

POISON = "no finite number comes of this"
TEXTS = ["the quick brown fox", "the lazy dog sleeps", "", "a window covers some tokens " * 8, POISON, None]
SIZES = [20, 30]
Rows = list[tuple[str, str | None]]

ROWS = st.lists(st.tuples(st.sampled_from([f"d{i}" for i in range(6)]), st.sampled_from(TEXTS)), max_size=4)
NIGHTS = st.lists(
    st.fixed_dictionaries(
        {
            "files": st.dictionaries(st.sampled_from(["b", "c", "d"]), st.none() | ROWS, max_size=2),
            "size": st.sampled_from(SIZES),
            "removed": st.sampled_from(["delete", "mark"]),
            "extra": st.sampled_from([{}, {}, {"full": True}, {"publish_every": 1}, {"publish_every": 3}]),
            "rollback": st.sampled_from([None, "whole", "cut", "cut and done again"]),
        }
    ),
    min_size=2,
    max_size=6,
)


def spec(size: int = 30, **more) -> ScoreSpec:
    return ScoreSpec(chunks=ChunkSpec(chunk_size=size, stride=size), device="cpu", max_rejected_share=1.0, **more)


def write(folder: Path, name: str, rows: Rows) -> None:
    folder.mkdir(exist_ok=True)
    frame = pl.DataFrame(rows, schema={"doc_id": pl.String, "text": pl.String}, orient="row")
    frame.write_parquet(folder / f"{name}.parquet", row_group_size=2)


def expected(files: dict[str, Rows]) -> tuple[dict[str, str], set[tuple[str, int, str]]]:
    """Texts by doc_id, and file, row and reason of rows put aside: the rules of a corpus in a few lines."""
    texts, rejected, seen = {}, set(), set()
    for name, rows in sorted(files.items()):
        for i, (doc_id, text) in enumerate(rows):
            if doc_id in seen:
                rejected.add((name, i, "doc_id_duplicate"))
            elif text is None:
                rejected.add((name, i, "text_null"))
            elif text == POISON:
                rejected.add((name, i, "output_not_finite"))
            else:
                texts[doc_id] = text
            seen.add(doc_id)
    return texts, rejected


@pytest.fixture(scope="module")
def logits(tiny_checkpoint) -> dict[tuple[int, str], list[float]]:
    """What the model says of each text, by chunk size."""
    checkpoint, texts = load_checkpoint(tiny_checkpoint), [text for text in TEXTS if text is not None]
    return {
        (size, text): scores.tolist()
        for size in SIZES
        for text, scores in zip(texts, score_texts(texts, checkpoint, spec(size)).logits_DL, strict=True)
    }


def check(output: str, files: dict[str, Rows], gone: set[str], size: int, logits) -> None:
    texts, rejected = expected(files)
    table = score_tables.read_table(output, "predictions")
    present = table.filter(pl.col("removed_at").is_null())
    assert present["doc_id"].to_list() == sorted(texts)
    for doc_id, found in present.select("doc_id", "logits").iter_rows():
        assert found == pytest.approx(logits[size, texts[doc_id]], abs=1e-5)
    assert set(table.filter(pl.col("removed_at").is_not_null())["doc_id"]) == gone
    put_aside = score_tables.read_table(output, "rejected").select("source_uri", "row_index", "reason").rows()
    assert {(Path(uri).stem, i, reason) for uri, i, reason in put_aside} == rejected
    assert len(put_aside) == len(rejected)
    known = set(score_tables.read_table(output, "runs")["run_id"])
    assert set(table["run_id"]) <= known
    evidence = score_tables.read_table(output, "evidence")
    assert set(evidence.select("doc_id", "run_id").rows()) == set(table.select("doc_id", "run_id").rows())


class Interruption(BaseException):
    """Stands for what ends a process between two tables."""


def cut(patch) -> None:
    """The next rollback ends after its first table."""
    really, done = delta_tables.restore, []

    def restore(*args, **more):
        if done:
            raise Interruption
        done.append(args)
        return really(*args, **more)

    patch.setattr(delta_tables, "restore", restore)


def rolled_back(output: str, how: str) -> str:
    """Show the run before, in one go or not; returns which."""
    if how == "whole":
        return roll_back(output).run_id
    with pytest.MonkeyPatch.context() as patch, suppress(Interruption):
        cut(patch)
        roll_back(output)
    predictions = score_tables.table_at(output, "predictions").load()
    run_id, tables = delta_tables.shown_run(predictions), [score_tables.table_at(output, name) for name in FOLLOWERS]
    if how == "cut and done again" and any(delta_tables.shown_run(table.load()) != run_id for table in tables):
        assert roll_back(output).run_id == run_id
        assert {delta_tables.shown_run(table.load()) for table in tables} == {run_id}
    return run_id


def no_number_of_poison(patch) -> None:
    """As of a model that overflows."""
    (fingerprint,) = prepare.content_fingerprints(pl.Series([POISON]))
    really = shard_scoring.score_block

    def score_block(planned, *args):
        scored = really(planned, *args)
        if scored.scores is None:
            return scored
        is_poison_D = (planned.block.documents["content_fingerprint"] == fingerprint).to_numpy()
        logits_DL = np.where(is_poison_D[:, None], np.nan, scored.scores.logits_DL)
        return replace(scored, scores=replace(scored.scores, logits_DL=logits_DL))

    patch.setattr(shard_scoring, "score_block", score_block)


@settings(max_examples=25, deadline=None)
@given(first=ROWS, nights=NIGHTS)
def test_a_table_is_that_of_a_full_scoring_whatever_happened(tmp_path_factory, tiny_checkpoint, logits, first, nights):
    root = tmp_path_factory.mktemp("law")
    corpus, output = root / "corpus", str(root / "out")
    files: dict[str, Rows] = {"a": [("always", "the quick brown fox")], "c": first}
    for name, rows in files.items():
        write(corpus, name, rows)
    shown: dict[str, set[str]] = {}  # by run, all documents that its table has
    now: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "ROWS_AT_ONCE", 2)
        no_number_of_poison(patch)
        for night in nights:
            for name, rows in night["files"].items():
                if rows is None:
                    files.pop(name, None)
                    (corpus / f"{name}.parquet").unlink(missing_ok=True)
                else:
                    files[name] = rows
                    write(corpus, name, rows)
            asked = spec(night["size"], removed=night["removed"], **night["extra"])

            manifest = score_corpus(str(corpus), tiny_checkpoint, output, spec=asked)

            texts, rejected = expected(files)
            present = set(texts)
            unscored = {files[name][i][0] for name, i, reason in rejected if reason == "output_not_finite"}
            now = (now | present) - unscored if night["removed"] == "mark" else present
            shown[manifest.run["run_id"]] = now
            check(output, files, now - present, night["size"], logits)
            again = score_corpus(str(corpus), tiny_checkpoint, output, spec=asked.model_copy(update={"full": False}))
            assert again == manifest
            if (
                night["rollback"]
                and len(delta_tables.versions_by_run(score_tables.table_at(output, "predictions"))) > 1
            ):
                run_id = rolled_back(output, night["rollback"])
                now = shown.get(run_id) or set(score_tables.read_table(output, "predictions")["doc_id"])


@pytest.mark.parametrize("removed", ["delete", "mark"])
def test_what_a_document_had_goes_where_its_new_text_gets_no_score(
    tmp_path, tiny_checkpoint, logits, monkeypatch, removed
):
    """It would be the prediction of another text; and it would stay where the document goes."""
    no_number_of_poison(monkeypatch)
    corpus, output = tmp_path / "corpus", str(tmp_path / "out")
    files = {"a": [("d1", TEXTS[0]), ("d2", TEXTS[1])], "b": [("d3", TEXTS[0])]}
    for name, rows in files.items():
        write(corpus, name, rows)
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(removed=removed))
    for rows in ([("d1", POISON), ("d2", TEXTS[1])], [("d2", TEXTS[1])]):
        files["a"] = rows
        write(corpus, "a", rows)

        score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(removed=removed))

        check(output, files, set(), 30, logits)


@pytest.mark.parametrize("how", ["cut", "cut and done again"])
def test_a_rollback_that_was_ended_between_tables_is_completed(tmp_path, tiny_checkpoint, logits, how):
    """By the next night, or by the same command: no table keeps what a run said that is not shown."""
    corpus, output = tmp_path / "corpus", str(tmp_path / "out")
    first = {"a": [("d1", TEXTS[0]), ("d2", TEXTS[1])], "b": [("d3", TEXTS[0])]}
    second = first | {"a": [("d1", TEXTS[0]), ("d2", TEXTS[0])]}  # a small step: not all is replaced
    third = second | {"b": [("d3", TEXTS[1]), ("d4", None)]}
    for files in (first, second, third):
        for name, rows in files.items():
            write(corpus, name, rows)
        score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())

    rolled_back(output, how)
    for name, rows in second.items():
        write(corpus, name, rows)
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())

    check(output, second, set(), 30, logits)


def test_a_run_without_evidence_is_shown_again_without_any(tmp_path, tiny_checkpoint, logits):
    """Also where its own files are gone, which nobody needs then."""
    corpus, output = tmp_path / "corpus", str(tmp_path / "out")
    files = {"a": [("d1", TEXTS[0])], "b": [("d2", TEXTS[1])]}
    for name, rows in files.items():
        write(corpus, name, rows)
    bare = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(evidence="none"))
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(full=True))
    shutil.rmtree(Path(output) / "runs" / bare.run["run_id"] / "predictions")

    assert rolled_back(output, "cut") == bare.run["run_id"]
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(evidence="none"))

    assert len(score_tables.read_table(output, "evidence")) == 0
    assert set(score_tables.read_table(output, "predictions")["run_id"]) == {bare.run["run_id"]}
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(full=True))
    check(output, files, set(), 30, logits)
