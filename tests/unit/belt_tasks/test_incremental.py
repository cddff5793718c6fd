"""Incremental scoring: whatever happens to a corpus, the published table is that of a full scoring of it."""

from pathlib import Path

import hypothesis.strategies as st
import polars as pl
import pytest
from hypothesis import given, settings

from belt_tasks import changes, delta_tables, score_tables
from belt_tasks.checkpoint import load_checkpoint
from belt_tasks.run_list import roll_back
from belt_tasks.score_corpus import score_corpus
from belt_tasks.scoring import score_texts
from belt_tasks.specs import ChunkSpec, ScoreSpec

TEXTS = ["the quick brown fox", "the lazy dog sleeps", "", "a window covers some tokens " * 8, None]
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
            "rollback": st.booleans(),
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


@settings(max_examples=35, deadline=None)
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

            present = set(expected(files)[0])
            now = now | present if night["removed"] == "mark" else present
            shown[manifest.run["run_id"]] = now
            check(output, files, now - present, night["size"], logits)
            again = score_corpus(str(corpus), tiny_checkpoint, output, spec=asked.model_copy(update={"full": False}))
            assert again == manifest
            if (
                night["rollback"]
                and len(delta_tables.versions_by_run(score_tables.table_at(output, "predictions"))) > 1
            ):
                run_id = roll_back(output).run_id
                now = shown.get(run_id) or set(score_tables.read_table(output, "predictions")["doc_id"])
