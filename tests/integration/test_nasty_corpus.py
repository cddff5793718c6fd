"""A nasty corpus, planned, scored and published without Prefect: every row ends in one place, whatever it holds.

The laws behind it: a document's prediction depends on nothing but the document, and memory on no document's shape.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_contracts
from belt_tasks import corpus, prepare, score_tables
from belt_tasks.receipts import Stopwatch
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import BatchSpec, CorpusSpec, ScoreSpec
from belt_tasks.tokens import load_tokenizer
from tests.conftest import words

CPU = ScoreSpec(device="cpu", max_rejected_share=1.0)

GOOD = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "empty": "",
    "one space": " ",
    "nul": "before \0 and after \0\0",
    "only nul": "\0",
    "white space": " \t\n\r\u00a0\u2003\u3000" * 140_000,
    "endless word": "endless" * 200_000,
    "endless punctuation": "." * 5_000,
    "bidirectional": "\u202eright to left\u202c \u2066isolated\u2069 \u200f\u200e",
    "family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 " * 50,
    "noncharacters": "\ufffe \uffff \U0001fffe \U0010ffff \ufdd0",
    "combining": "e" + "\u0301" * 2_000,
    "private use": "\ue000 \U000f0000",
    "control": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029",
    "special": "[SEP] [CLS] [PAD] [MASK] [UNK] </s> <s> <mask> <pad> <|endoftext|>" * 20,
    "glued special": "fox[SEP]window[CLS]</s><mask>[MASK]",
    "long": words(2_000),
}
BAD = [
    (None, b"no id", "doc_id_null"),
    (b"\xff\xfe", b"an id that is no text", "doc_id_invalid_utf8"),
    (b"plain", b"an id for the second time", "doc_id_duplicate"),
    (b"null text", None, "text_null"),
    (b"lone byte", b"\xff", "text_invalid_utf8"),
    (b"torn end", "caf\u00e9".encode()[:-1], "text_invalid_utf8"),
    (b"surrogate", b"\xed\xa0\x80", "text_invalid_utf8"),
    (b"overlong", b"\xc0\xaf", "text_invalid_utf8"),
    (b"beyond unicode", b"\xf5\x80\x80\x80", "text_invalid_utf8"),
    (None, None, "doc_id_null"),
]


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Most bytes by which this process grew, measured every few milliseconds."""
    process, done = psutil.Process(), threading.Event()
    before, growth = process.memory_info().rss, [0]

    def watch():
        while not done.wait(0.005):
            growth[0] = max(growth[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()


def write_nasty(folder, *, kind):
    """The corpus in three files, good and bad rows mixed; returns (file, row) -> (doc_id, reason or None)."""
    rows = [(name.encode(), text.encode(), None) for name, text in GOOD.items()]
    for i, bad in enumerate(BAD):
        rows.insert(2 * i + 1, bad)
    rows.sort(key=lambda row: row[2] == "doc_id_duplicate")  # after the row whose id it takes
    expected = {}
    for i, part in enumerate((rows[:9], rows[9:18], rows[18:])):
        raw = [pa.array([row[column] for row in part], pa.binary()) for column in (0, 1)]
        columns = [pc.cast(column, kind, safe=False) for column in raw]
        uri = folder / f"part={i}" / f"{i}.parquet"
        uri.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns, names=["doc_id", "text"]), uri, row_group_size=4)
        expected |= {(str(uri), row): (doc_id, reason) for row, (doc_id, _, reason) in enumerate(part)}
    return expected


def score(corpus_uri, checkpoint_uri, output_uri, spec=CPU):
    return score_corpus(corpus_uri, checkpoint_uri, output_uri, spec=spec)


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_every_row_is_scored_once_or_rejected_once_with_its_reason(tmp_path, tiny_checkpoint, monkeypatch, kind):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1)
    expected = write_nasty(tmp_path / "corpus", kind=kind)
    output = str(tmp_path / "out")

    with watched_memory() as growth_bytes:
        manifest = score(str(tmp_path / "corpus"), tiny_checkpoint, output)

    assert growth_bytes[0] < 700e6
    predictions = score_tables.read_table(output, "predictions")
    rejected = score_tables.read_table(output, "rejected")
    assert manifest.run["num_shards"] == 7  # two row groups hold nothing to score
    assert sorted(predictions["doc_id"]) == sorted(GOOD)
    found = {(uri, row): reason for uri, row, reason in rejected.select("source_uri", "row_index", "reason").rows()}
    assert len(found) == len(rejected)
    assert found == {place: reason for place, (_, reason) in expected.items() if reason is not None}
    assert (manifest.run["num_documents"], manifest.run["num_rejected"]) == (len(GOOD), len(BAD))
    assert sum(manifest.rejected_by_reason.values()) == len(BAD)


def test_tables_of_a_nasty_corpus_satisfy_their_contracts(tmp_path, tiny_checkpoint):
    write_nasty(tmp_path / "corpus", kind=pa.string())
    output = str(tmp_path / "out")

    manifest = score(str(tmp_path / "corpus"), tiny_checkpoint, output)

    for name in ("predictions", "rejected"):
        schema = data_contracts.arrow_schema(name)
        table = score_tables.read_table(output, name).to_arrow().cast(schema)
        assert data_contracts.violations(table, name) == []
    predictions = {row["doc_id"]: row for row in score_tables.read_table(output, "predictions").to_dicts()}
    assert predictions["empty"]["num_tokens"] == 0
    assert predictions["empty"]["num_chunks"] == 1
    assert all(row["num_tokens_scored"] == row["num_tokens"] for row in predictions.values())
    for doc_id, row in predictions.items():
        top = row["top_chunk"]
        assert 0 <= top["start_char"] <= top["stop_char"] <= len(GOOD[doc_id])
        assert abs(sum(score["score"] for score in row["scores"]) - 1) < 1e-9
        assert [score["label"] for score in row["scores"]] == list(manifest.labels)
    fingerprints = prepare.content_fingerprints(list(GOOD.values()))
    assert [predictions[doc_id]["content_fingerprint"] for doc_id in GOOD] == fingerprints.to_list()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_no_text_spells_a_special_token(tmp_path, tiny_encoders, family):
    write_nasty(tmp_path / "corpus", kind=pa.binary())
    source = str(tiny_encoders(family))
    tokenizer = load_tokenizer(source)
    special = {*tokenizer.special.prefix_ids, *tokenizer.special.suffix_ids, tokenizer.special.pad_id}
    num_documents = 0

    for shard in corpus.plan_shards(str(tmp_path / "corpus"), CorpusSpec()):
        for block in prepare.token_blocks(shard, CorpusSpec(), tokenizer, stopwatch=Stopwatch()):
            assert not np.isin(block.tokens.input_ids_T, sorted(special)).any()
            num_documents += len(block.documents)

    assert num_documents == len(GOOD) + 1  # the duplicate, which nobody told of


def test_the_same_run_again_does_nothing_and_tells_the_same(tmp_path, tiny_checkpoint):
    write_nasty(tmp_path / "corpus", kind=pa.string())
    arguments = (str(tmp_path / "corpus"), tiny_checkpoint, str(tmp_path / "out"))

    first = score(*arguments)
    before = score_tables.read_table(arguments[2], "predictions")
    again = score(*arguments)

    assert again == first
    assert score_tables.read_table(arguments[2], "predictions").equals(before)


def test_rows_without_a_token_do_not_pile_up(tmp_path, tiny_encoder, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_TOKENS", 2_000 * prepare.ROW_TOKENS)
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"doc_id": range(10_000), "text": ["", None] * 5_000}), path)
    (shard,) = corpus.plan_shards(path, CorpusSpec())

    blocks = list(prepare.token_blocks(shard, CorpusSpec(), load_tokenizer(tiny_encoder), stopwatch=Stopwatch()))

    assert sum(len(block.documents) for block in blocks) == 5_000
    assert sum(len(block.rejected) for block in blocks) == 5_000
    assert max(len(block.documents) + len(block.rejected) for block in blocks) < 2_000 + corpus.BATCH_ROWS


LAW_TEXTS = {f"doc-{i}": words(n, seed=i) for i, n in enumerate((0, 1, 5, 29, 30, 31, 60, 200, 7, 90, 3, 45))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_checkpoint) -> dict[str, list[float]]:
    """Logits of every document, each scored in a corpus of its own."""
    logits = {}
    for doc_id, text in LAW_TEXTS.items():
        folder = tmp_path_factory.mktemp("alone")
        pq.write_table(pa.table({"doc_id": [doc_id], "text": [text]}), folder / "a.parquet")
        score(str(folder / "a.parquet"), tiny_checkpoint, str(folder / "out"))
        logits |= dict(score_tables.read_table(str(folder / "out"), "predictions").select("doc_id", "logits").rows())
    return logits


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(sorted(LAW_TEXTS)),
    num_files=st.integers(1, 4),
    rows_per_group=st.integers(1, 12),
    shard_bytes=st.sampled_from([1, 300, 10**9]),
    batch_rows=st.integers(1, 12),
    block_tokens=st.sampled_from([1, 100, 10**6]),
    max_batch_tokens=st.sampled_from([1, 64, 500, 10**5]),
)
def test_a_prediction_depends_on_its_document_alone(
    tmp_path_factory,
    tiny_checkpoint,
    alone,
    order,
    num_files,
    rows_per_group,
    shard_bytes,
    batch_rows,
    block_tokens,
    max_batch_tokens,
):
    folder, output = tmp_path_factory.mktemp("together"), str(tmp_path_factory.mktemp("output") / "out")
    for i in range(num_files):
        ids = order[i::num_files]
        table = pa.table({"doc_id": ids, "text": [LAW_TEXTS[doc_id] for doc_id in ids]})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=rows_per_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", shard_bytes)
        patch.setattr(corpus, "BATCH_ROWS", batch_rows)
        patch.setattr(prepare, "BLOCK_TOKENS", block_tokens)
        spec = ScoreSpec(device="cpu", batches=BatchSpec(max_batch_tokens=max_batch_tokens))
        score(str(folder), tiny_checkpoint, output, spec)

    together = dict(score_tables.read_table(output, "predictions").select("doc_id", "logits").rows())
    assert together.keys() == alone.keys()
    for doc_id, logits in together.items():
        np.testing.assert_allclose(logits, alone[doc_id], atol=1e-5, rtol=0)
    assert pl.Series(list(alone.values())).list.get(0).n_unique() > len(LAW_TEXTS) // 2  # documents do differ
