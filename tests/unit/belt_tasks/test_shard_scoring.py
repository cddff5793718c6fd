"""Shard scoring: each different text once in a run, with the result that it has alone; whole shards or nothing."""

import itertools
import os
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import corpus, cost, predictions, prepare, progress, publishing, scoring, storage
from belt_tasks.calibration import Calibration
from belt_tasks.checkpoint import Checkpoint, cache, checkpoint_digest, save_checkpoint
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.errors import ContractError, ShardError
from belt_tasks.publishing import RunRef
from belt_tasks.receipts import Counts, Stopwatch, total
from belt_tasks.score_store import Claims, ScoreStore, StoredScore
from belt_tasks.scoring import Scorer
from belt_tasks.shard_scoring import encode_block, plan_block, score_block, score_shard
from belt_tasks.specs import BatchSpec, ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec
from tests.conftest import save_tiny_encoder, words

PATIENCE_S = 100.0  # of a wait that ends at once unless the law is broken

# of no token, of one, of one chunk and of many
TEXTS = ["", "fox", words(12, seed=1), words(24, seed=2), words(70, seed=3), words(150, seed=4)]
# which of them each document has: some in one block, some in others, some in other shards
REPEATED = [0, 1, 4, 1, 5, 3, 0, 4, 5, 2, 5, 1]

CPU = ScoreSpec(device="cpu")
OVERLAPPING = ChunkSpec(chunk_size=20, stride=10)
SPECS = {
    "mean": CPU,
    "random_k": CPU.model_copy(
        update={"chunks": ChunkSpec(chunk_size=20, stride=10, selection="random_k", num_random_chunks=3, seed=5)}
    ),
    "drop_contained_tail": CPU.model_copy(
        update={"chunks": ChunkSpec(chunk_size=20, stride=10, drop_contained_tail=True)}
    ),
    "head_tail": CPU.model_copy(update={"chunks": ChunkSpec(chunk_size=20, stride=20, selection="head_tail")}),
    "max": CPU.model_copy(update={"chunks": OVERLAPPING, "pooling": PoolingSpec(pooling_strategy="max")}),
    "length_weighted_mean": CPU.model_copy(
        update={"chunks": OVERLAPPING, "pooling": PoolingSpec(pooling_strategy="length_weighted_mean")}
    ),
    "probabilities": CPU.model_copy(update={"pooling": PoolingSpec(pooling_space="probabilities")}),
}


pytestmark = pytest.mark.usefixtures("living_threads")  # no test may leave a thread behind


@pytest.fixture(autouse=True)
def not_stopped():
    yield
    progress.go_on()


class WatchedEncoder:
    """An encoder that remembers what it is given, and first does what a test wants."""

    def __init__(self, encoder, batches, do):
        self._encoder, self._batches, self._do = encoder, batches, do
        self.device, self.batch_tokens, self.pads = encoder.device, encoder.batch_tokens, encoder.pads

    def encode(self, batch):
        self._batches.append(batch)
        outputs_BK = self._encoder.encode(batch)
        return outputs_BK if self._do is None else self._do(len(self._batches), batch, outputs_BK)


class Watch:
    """What the encoders of a test were given; `do(number, batch, outputs)` may change what comes out."""

    def __init__(self):
        self.batches, self.do = [], None

    def chunks(self):
        """Every chunk with its special tokens, and how often it was encoded."""
        return Counter(
            tuple(ids.tolist())
            for batch in self.batches
            for ids in batch.input_ids_T.split(torch.from_numpy(batch.num_tokens_B).tolist())
        )


@pytest.fixture
def watch(monkeypatch):
    found, make = Watch(), Checkpoint.encoder
    monkeypatch.setattr(
        Checkpoint, "encoder", lambda self, *key: WatchedEncoder(make(self, *key), found.batches, found.do)
    )
    return found


@pytest.fixture
def many_blocks(monkeypatch):
    """Three rows at a time, each time a block."""
    monkeypatch.setattr(corpus, "BATCH_ROWS", 3)
    monkeypatch.setattr(prepare, "BLOCK_TOKENS", 1)


def write(folder, texts, *, num_files=1, row_group_size=None):
    """A corpus of some texts, in files of (nearly) equal size."""
    table = pa.table(
        {"doc_id": [f"doc-{i}" for i in range(len(texts))], "text": pa.array(texts, pa.string())},
    )
    size = -(-len(texts) // num_files)
    folder.mkdir()
    for i in range(num_files):
        pq.write_table(table.slice(i * size, size), folder / f"{i}.parquet", row_group_size=row_group_size)
    return corpus.plan_shards(str(folder), CorpusSpec())


def new_run(folder):
    return RunRef(output_uri=str(folder / "out"), run_id=uuid.uuid4().hex[:16])


def score(shards, run, checkpoint_uri, spec=CPU, *, columns=CorpusSpec()):  # noqa: B008 - frozen
    return [
        score_shard(
            shard,
            columns,
            spec,
            run=run,
            checkpoint_uri=checkpoint_uri,
            checkpoint_digest=checkpoint_digest(checkpoint_uri),
            scoring_fingerprint="f" * 16,
        )
        for shard in shards
    ]


def table(run, receipts, name="predictions"):
    """Rows that were written, in the order of shards; predictions, which a shard sorts, in the corpus's order again."""
    files = [storage.join(run.output_uri, file.path) for receipt in receipts for file in receipt.files_of(name)]
    frame = pl.DataFrame(pa.concat_tables([storage.read_parquet(uri) for uri in files]))
    if name != "predictions":
        return frame
    for uri in files:
        found = storage.read_parquet(uri)["doc_id"].to_pylist()
        assert found == sorted(found)
    return frame.sort(pl.col("doc_id").str.extract(r"(\d+)$").cast(pl.Int64), maintain_order=True)


def load(checkpoint_uri):
    return cache.get(checkpoint_uri, checkpoint_digest(checkpoint_uri))


def chunks_of(texts, checkpoint_uri, spec=CPU):
    """The chunks that an encoder has to see of some texts."""
    scorer, special = Scorer.of(load(checkpoint_uri), spec), load(checkpoint_uri).tokenizer.special
    found = Counter()
    for text in texts:
        tokens = scorer.checkpoint.tokenizer.tokenize([text])
        windows = scorer.windows(tokens, prepare.content_fingerprints([text]))
        for start, stop in zip(windows.start_C, windows.stop_C, strict=True):
            found[(*special.prefix_ids, *tokens.input_ids_T[start:stop].tolist(), *special.suffix_ids)] += 1
    return found


def everything(run):
    """Every file under the output, temporary ones and receipts included."""
    return sorted(str(path) for path in Path(run.output_uri).rglob("*") if path.is_file())


# each text once


@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_a_run_encodes_each_different_text_once(tmp_path, tiny_checkpoint, watch, request, blocks, num_files):
    if blocks == "many":
        request.getfixturevalue("many_blocks")
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=num_files), new_run(tmp_path)

    receipts = score(shards, run, tiny_checkpoint)

    assert len(shards) == num_files
    assert watch.chunks() == chunks_of(TEXTS, tiny_checkpoint)
    assert total(receipts).num_documents == len(REPEATED)
    assert total(receipts).num_documents_reused == len(REPEATED) - len(TEXTS)


@pytest.mark.usefixtures("many_blocks")
def test_unknown_tokens_are_counted_of_every_document(tmp_path, tiny_checkpoint):
    texts = ["\N{SNOWMAN} fox", "fox", "\N{SNOWMAN} fox", "", "\N{SNOWMAN} \u6f22"]
    shards, run = write(tmp_path / "corpus", texts, num_files=2), new_run(tmp_path)

    counts = total(score(shards, run, tiny_checkpoint))

    assert (counts.num_documents_reused, counts.num_unknown_tokens) == (1, 4)


@pytest.mark.usefixtures("many_blocks")
def test_documents_with_the_same_text_have_the_same_scores_to_the_bit(tmp_path, tiny_checkpoint):
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=3), new_run(tmp_path)

    found = table(run, score(shards, run, tiny_checkpoint))

    said = found.drop("doc_id", "run_id", "scored_at", "checkpoint_digest").rows()
    by_text = {}
    for text, row in zip(REPEATED, said, strict=True):
        assert by_text.setdefault(text, row) == row
    assert len({row[0:4].__repr__() for row in by_text.values()}) == len(TEXTS)  # and other texts others
    assert found["doc_id"].to_list() == [f"doc-{i}" for i in range(len(REPEATED))]  # in the order of the corpus


def test_another_run_encodes_anew(tmp_path, tiny_checkpoint, watch):
    shards = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=2)
    run, other = new_run(tmp_path), new_run(tmp_path)

    first = score(shards[:1], run, tiny_checkpoint)
    seen_first = watch.chunks()
    watch.batches.clear()
    second = score(shards, other, tiny_checkpoint)

    assert seen_first == chunks_of([TEXTS[i] for i in set(REPEATED[:6])], tiny_checkpoint)
    assert watch.chunks() == chunks_of(TEXTS, tiny_checkpoint)
    assert first[0].counts.num_chunks == second[0].counts.num_chunks
    # the first run goes on; its scores are gone, its finished shard is not
    watch.batches.clear()
    first = score(shards, run, tiny_checkpoint)
    assert watch.chunks() == chunks_of([TEXTS[i] for i in set(REPEATED[6:])], tiny_checkpoint)
    assert [receipt.reused for receipt in first] == [True, False]
    columns = ["doc_id", "label", "num_tokens", "num_chunks", "top_chunk"]
    assert table(run, first).select(columns).equals(table(other, second).select(columns))


def test_a_finished_shard_is_not_scored_again(tmp_path, tiny_checkpoint, watch):
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED]), new_run(tmp_path)
    first = score(shards, run, tiny_checkpoint)
    watch.batches.clear()

    (again,) = score(shards, run, tiny_checkpoint)

    assert watch.batches == []
    assert again == first[0].model_copy(update={"reused": True})


# results


@pytest.fixture(scope="module")
def alone(tiny_checkpoint):
    """What each text is told alone, without tables, blocks and a store: text -> logits, scores, top chunk, counts."""

    def get(spec):
        checkpoint = load(tiny_checkpoint)
        found = []
        for text in TEXTS:
            scored = scoring.score_texts([text], checkpoint, spec)
            scorer, tokens = Scorer.of(checkpoint, spec), checkpoint.tokenizer.tokenize([text])
            windows = scorer.windows(tokens, prepare.content_fingerprints([text]))
            top = int(scored.top_chunk_D[0])
            first, last = int(windows.start_C[top]), int(windows.stop_C[top]) - 1
            place = (int(tokens.start_char_T[first]), int(tokens.stop_char_T[last])) if last >= first else (0, 0)
            found.append(
                {
                    "logits": scored.logits_DL[0],
                    "scores": scored.scores_DL[0],
                    "top_chunk": (int(windows.chunk_index_C[top]), *place),
                    "num_tokens": len(tokens.input_ids_T),
                    "num_chunks": windows.num_chunks,
                    "num_tokens_scored": len(
                        {i for a, b in zip(windows.start_C, windows.stop_C, strict=True) for i in range(a, b)}
                    ),
                }
            )
        return found

    return get


def assert_as_alone(found, texts, alone):
    """Rows of predictions are what their texts are told alone."""
    assert len(found) == len(texts)
    for row, text in zip(found.to_dicts(), texts, strict=True):
        expected = alone[text]
        np.testing.assert_allclose(row["logits"], expected["logits"], atol=1e-5, rtol=0)
        np.testing.assert_allclose([each["score"] for each in row["scores"]], expected["scores"], atol=1e-5, rtol=0)
        assert tuple(row["top_chunk"].values()) == expected["top_chunk"]
        assert row["content_fingerprint"] == prepare.content_fingerprints([TEXTS[text]])[0]
        for name in ("num_tokens", "num_chunks", "num_tokens_scored"):
            assert row[name] == expected[name], name


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("name", SPECS)
def test_a_text_that_others_share_has_the_result_that_it_has_alone(tmp_path, tiny_checkpoint, watch, alone, name):
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=2), new_run(tmp_path)

    receipts = score(shards, run, tiny_checkpoint, SPECS[name])

    assert watch.chunks() == chunks_of(TEXTS, tiny_checkpoint, SPECS[name])
    assert_as_alone(table(run, receipts), REPEATED, alone(SPECS[name]))


def test_top_chunks_of_the_texts_of_this_test_differ(alone):
    top_chunks = [expected["top_chunk"] for name in SPECS for expected in alone(SPECS[name])]

    assert len({index for index, _, _ in top_chunks}) > 2


@settings(deadline=None, max_examples=10)
@given(
    texts=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=14),
    num_files=st.integers(1, 3),
    batch_rows=st.integers(1, 6),
    block_tokens=st.sampled_from([1, 200, 10**6]),
    max_batch_tokens=st.sampled_from([None, 1, 100]),
)
def test_whatever_is_repeated_wherever(
    tmp_path_factory, tiny_checkpoint, alone, texts, num_files, batch_rows, block_tokens, max_batch_tokens
):
    folder, spec = tmp_path_factory.mktemp("some"), CPU.model_copy(update={"chunks": OVERLAPPING})
    shards = write(folder / "corpus", [TEXTS[i] for i in texts], num_files=num_files)
    run, found = new_run(folder), Watch()
    with pytest.MonkeyPatch.context() as patch:
        make = Checkpoint.encoder
        patch.setattr(Checkpoint, "encoder", lambda self, *key: WatchedEncoder(make(self, *key), found.batches, None))
        patch.setattr(corpus, "BATCH_ROWS", batch_rows)
        patch.setattr(prepare, "BLOCK_TOKENS", block_tokens)

        receipts = score(
            shards,
            run,
            tiny_checkpoint,
            spec.model_copy(update={"batches": BatchSpec(max_batch_tokens=max_batch_tokens)}),
        )

    assert_as_alone(table(run, receipts), texts, alone(spec))
    assert found.chunks() == chunks_of([TEXTS[i] for i in set(texts)], tiny_checkpoint, spec)
    assert total(receipts).num_documents_reused == len(texts) - len(set(texts))


def block_of(texts, tmp_path, checkpoint_uri):
    """The only block of a corpus of some texts."""
    (shard,) = write(tmp_path / uuid.uuid4().hex, texts)
    tokenizer = load(checkpoint_uri).tokenizer
    (block,) = prepare.token_blocks(shard, CorpusSpec(), tokenizer, duplicates_uri=None, stopwatch=Stopwatch())
    return block


def through(scorer, claims, *blocks):
    """Plan and encode all blocks before the first is scored, as a pipeline may."""
    planned = [plan_block(block, scorer, claims) for block in blocks]
    outputs = [encode_block(block, scorer) for block in planned]
    return [score_block(*both, scorer, claims) for both in zip(planned, outputs, strict=True)]


def test_a_block_takes_from_the_store_what_is_there_and_adds_the_rest(tmp_path, tiny_checkpoint, watch):
    scorer, store = Scorer.of(load(tiny_checkpoint), CPU), ScoreStore()
    keys = prepare.content_fingerprints(TEXTS).to_list()
    logits_L = np.array([7.0, 8.0, 9.0], np.float32)
    store.put({keys[4]: StoredScore(logits_L=logits_L, top_chunk=2)})

    block = block_of([TEXTS[i] for i in (4, 2, 2, 4)], tmp_path, tiny_checkpoint)
    (scored,) = through(scorer, Claims(store), block)

    assert watch.chunks() == chunks_of([TEXTS[2]], tiny_checkpoint)
    expected_DL = np.stack(
        [logits_L, *scoring.score_texts([TEXTS[2]] * 2, load(tiny_checkpoint), CPU).logits_DL, logits_L]
    )
    np.testing.assert_allclose(scored.scores.logits_DL, expected_DL, atol=1e-5)
    np.testing.assert_allclose(scored.scores.scores_DL, torch.tensor(expected_DL).double().softmax(1), atol=1e-5)
    assert scored.scores.top_chunk_D.tolist()[::3] == [2, 2]
    assert store.get(keys).keys() == {keys[2], keys[4]}
    np.testing.assert_array_equal(store.get(keys)[keys[2]].logits_L, scored.scores.logits_DL[1])


def test_blocks_under_way_share_what_one_of_them_encodes(tmp_path, tiny_checkpoint, watch):
    scorer, claims = Scorer.of(load(tiny_checkpoint), CPU), Claims(ScoreStore())
    chosen = [(4, 2), (3, 4), (2, 3, 4)]

    scored = through(
        scorer, claims, *(block_of([TEXTS[i] for i in rows], tmp_path, tiny_checkpoint) for rows in chosen)
    )

    assert watch.chunks() == chunks_of([TEXTS[i] for i in (4, 2, 3)], tiny_checkpoint)
    assert [block.counts.num_documents_reused for block in scored] == [0, 1, 3]
    logits = {}
    for rows, block in zip(chosen, scored, strict=True):
        for row, logits_L in zip(rows, block.scores.logits_DL, strict=True):
            np.testing.assert_array_equal(logits.setdefault(row, logits_L), logits_L)


def test_a_block_without_documents_has_no_scores(tmp_path, tiny_checkpoint, watch):
    scorer = Scorer.of(load(tiny_checkpoint), SPECS["random_k"])

    (scored,) = through(scorer, Claims(ScoreStore()), block_of([None, None], tmp_path, tiny_checkpoint))

    assert scored.scores is None
    assert scored.counts == Counts()
    assert watch.batches == []


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("name", ["mean", "random_k"])
@pytest.mark.parametrize("texts", [[None] * 5, [None, "fox", None, None, "fox"]], ids=["all", "some"])
def test_rejected_rows_are_not_scored(tmp_path, tiny_checkpoint, texts, name):
    shards, run = write(tmp_path / "corpus", texts), new_run(tmp_path)

    receipts = score(shards, run, tiny_checkpoint, SPECS[name])

    good = [f"doc-{i}" for i, text in enumerate(texts) if text is not None]
    assert table(run, receipts)["doc_id"].to_list() == good
    assert len(table(run, receipts, "rejected")) == 5 - len(good)
    counts = total(receipts)
    assert (counts.num_documents, counts.num_documents_reused) == (len(good), max(len(good) - 1, 0))
    assert counts.rejected_by_reason == {"text_null": 5 - len(good)}
    assert counts.num_chunks == (1 if good else 0)


def test_a_run_that_encoded_nothing_has_no_speed(tmp_path, tiny_checkpoint):
    shards, run = write(tmp_path / "corpus", [None] * 5), new_run(tmp_path)
    row = {"flow": "score", "corpus_uri": "corpus", "spec": "{}", "device": "cpu", "precision": "fp32"}

    manifest = publishing.publish(
        run, score(shards, run, tiny_checkpoint), row=row, labels=(), started_at=datetime.now(UTC)
    )

    names = ["tokens_per_s", "padding_share", "redundant_chunk_share", "flops_per_s", "peak_share"]
    assert {name: manifest.run[name] for name in names} == dict.fromkeys(names)


def test_a_shard_without_a_row_of_the_split_is_empty_and_finished(tmp_path, tiny_checkpoint, watch):
    for i, split in enumerate(["train", "test"]):
        rows = {"doc_id": [f"{split}-1"], "text": ["fox"], "split": [split]}
        pq.write_table(pa.table(rows), tmp_path / f"{i}.parquet")
    columns, run = CorpusSpec(split_column="split", split="test"), new_run(tmp_path)
    shards = corpus.plan_shards(str(tmp_path), columns)

    receipts = score(shards, run, tiny_checkpoint, columns=columns)

    assert table(run, receipts)["doc_id"].to_list() == ["test-1"]
    assert [receipt.counts.num_documents for receipt in receipts] == [0, 1]
    assert [publishing.finished_shard(run, shard) is not None for shard in shards] == [True, True]
    assert len(watch.batches) == 1


@pytest.mark.usefixtures("many_blocks")
def test_a_text_without_a_finite_score_is_put_aside_wherever_it_is(tmp_path, tiny_checkpoint, watch):
    poison = load(tiny_checkpoint).tokenizer.tokenize([TEXTS[4]]).input_ids_T[:20]

    def do(_, batch, outputs_BK):
        chunks = batch.input_ids_T.split(torch.from_numpy(batch.num_tokens_B).tolist())
        bad_B = torch.tensor([chunk[1:21].tolist() == poison.tolist() for chunk in chunks])
        return outputs_BK.masked_fill(bad_B[:, None], torch.nan)

    watch.do = do
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=3), new_run(tmp_path)

    receipts = score(shards, run, tiny_checkpoint)

    bad = [f"doc-{i}" for i, text in enumerate(REPEATED) if text == 4]
    assert table(run, receipts, "rejected").select("doc_id", "reason").rows() == [
        (doc_id, "output_not_finite") for doc_id in bad
    ]
    assert table(run, receipts)["doc_id"].to_list() == [
        f"doc-{i}" for i in range(len(REPEATED)) if f"doc-{i}" not in bad
    ]
    assert total(receipts).num_documents == len(REPEATED) - len(bad)
    assert watch.chunks() == chunks_of(TEXTS, tiny_checkpoint)  # and that once too


def test_scores_of_a_shard_are_calibrated_and_its_logits_are_not(tmp_path, tiny_encoder):
    found = {}
    for name, calibration in (("plain", None), ("calibrated", Calibration(slope=(2.0, 0.5), offset=(0.0, 1.0)))):
        uri = str(tmp_path / name)
        save_checkpoint(
            ChunkModel(load_body(tiny_encoder), num_logits=2, pooling=PoolingSpec()),
            uri,
            tokenizer_source=str(tiny_encoder),
            head=Head(task="multilabel", labels=("a", "b")),
            chunks=ChunkSpec(chunk_size=30, stride=30),
            pooling=PoolingSpec(),
            data_fingerprint="0" * 64,
            metrics={},
            training={},
            calibration=calibration,
        )
        shards, run = (
            write(tmp_path / f"corpus-{name}", [TEXTS[i] for i in REPEATED]),
            new_run(tmp_path / f"run-{name}"),
        )
        found[name] = table(run, score(shards, run, uri))

    for name, frame in found.items():
        logits_DL = np.array(frame["logits"].to_list())
        calibrated_DL = logits_DL * [2.0, 0.5] + [0.0, 1.0] if name == "calibrated" else logits_DL
        scores_DL = np.array([[each["score"] for each in row] for row in frame["scores"].to_list()])
        np.testing.assert_allclose(scores_DL, 1 / (1 + np.exp(-calibrated_DL)), atol=1e-6)


# counts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_checkpoint):
    """One whose encoder computes no padding, and one whose own forward has to do, which does."""
    encoder = save_tiny_encoder(tmp_path_factory.mktemp("silu"), "bert", hidden_act="silu")
    uri, head = str(tmp_path_factory.mktemp("padded")), Head(task="multiclass", labels=("a", "b"))
    save_checkpoint(
        ChunkModel(load_body(encoder), num_logits=2, pooling=PoolingSpec()),
        uri,
        tokenizer_source=str(encoder),
        head=head,
        chunks=ChunkSpec(chunk_size=30, stride=30),
        pooling=PoolingSpec(),
        data_fingerprint="0" * 64,
        metrics={},
        training={},
    )
    return {"packed": tiny_checkpoint, "padded": uri}


@pytest.mark.parametrize(
    ("how", "name", "max_batch_tokens"),
    [
        ("packed", "mean", None),
        ("packed", "length_weighted_mean", 100),
        ("packed", "drop_contained_tail", None),
        ("packed", "random_k", 100),
        ("padded", "mean", 100),
        ("padded", "length_weighted_mean", None),
        ("padded", "drop_contained_tail", 100),
        ("padded", "random_k", None),
    ],
)
def test_counts_are_those_of_what_the_encoder_saw(tmp_path, checkpoints, watch, how, name, max_batch_tokens):
    uri, spec = (
        checkpoints[how],
        SPECS[name].model_copy(update={"batches": BatchSpec(max_batch_tokens=max_batch_tokens)}),
    )
    shards, run = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED], num_files=2), new_run(tmp_path)

    counts = total(score(shards, run, uri, spec))

    checkpoint, scorer = load(uri), Scorer.of(load(uri), spec)
    num_tokens_C = np.concatenate([batch.num_tokens_B for batch in watch.batches])
    masks = [batch.padded()[1] for batch in watch.batches]
    assert scorer.encoder.pads == (how == "padded")
    assert counts.num_chunks == len(num_tokens_C)
    assert counts.num_tokens_encoded == (num_tokens_C - 2).sum()
    assert counts.num_positions == (sum(mask.numel() for mask in masks) if how == "padded" else num_tokens_C.sum())
    assert counts.num_padding == (sum(int((mask == 0).sum()) for mask in masks) if how == "padded" else 0)
    assert counts.needed_flops == cost.needed_flops(checkpoint.model.body.config, num_tokens_C) > 0
    if how == "padded":
        assert counts.num_padding > 0  # which is why there is something to count

    tokens = [checkpoint.tokenizer.tokenize([text]) for text in TEXTS]
    windows = [
        scorer.windows(each, prepare.content_fingerprints([text])) for each, text in zip(tokens, TEXTS, strict=True)
    ]
    covered = [[set(range(a, b)) for a, b in zip(each.start_C, each.stop_C, strict=True)] for each in windows]
    redundant = [sum(later <= earlier for earlier, later in itertools.pairwise(each)) for each in covered]
    assert counts.num_redundant_chunks == sum(redundant)
    assert (sum(redundant) > 0) == (name in ("length_weighted_mean", "random_k"))
    assert counts.num_tokens == sum(len(tokens[text].input_ids_T) for text in REPEATED)
    assert counts.num_tokens_scored == sum(len(set().union(*covered[text])) for text in REPEATED)
    assert (counts.num_documents, counts.num_documents_reused) == (len(REPEATED), len(REPEATED) - len(TEXTS))
    assert (counts.num_rejected, counts.rejected_by_reason) == (0, {})
    assert min(counts.read_s, counts.tokenize_s, counts.encode_s, counts.write_s) > 0


def test_counts_of_blocks_are_those_of_one_block(tmp_path, tiny_checkpoint, monkeypatch):
    shards = write(tmp_path / "corpus", [TEXTS[i] for i in REPEATED])
    seconds = dict.fromkeys(["read_s", "tokenize_s", "encode_s", "write_s"], 0.0)
    spec = CPU.model_copy(update={"batches": BatchSpec(max_batch_tokens=1)})

    (whole,) = score(shards, new_run(tmp_path), tiny_checkpoint, spec)
    monkeypatch.setattr(corpus, "BATCH_ROWS", 2)
    monkeypatch.setattr(prepare, "BLOCK_TOKENS", 1)
    (parts,) = score(shards, new_run(tmp_path), tiny_checkpoint, spec)

    assert parts.counts.model_copy(update=seconds) == whole.counts.model_copy(update=seconds)


@pytest.mark.parametrize(
    ("module", "name"), [(predictions, "build"), (storage, "write_bytes")], ids=["table", "receipt"]
)
def test_a_second_attempt_tells_of_no_more_shared_texts_than_there_are(
    tmp_path, tiny_checkpoint, monkeypatch, module, name
):
    """Writing failed, as it may where the output is far away; a retry in the same process counts as the first time."""
    texts = ["fox", "fox", *TEXTS[2:]]
    shards, run = write(tmp_path / "corpus", texts), new_run(tmp_path)

    def fail(*_, **__):
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(ConnectionError):
            score(shards, run, tiny_checkpoint)
    (receipt,) = score(shards, run, tiny_checkpoint)

    assert receipt.counts.num_documents == len(texts)
    assert receipt.counts.num_documents_reused == 1  # documents with the text of another one of the run
    assert receipt.counts.num_chunks == sum(chunks_of(set(texts), tiny_checkpoint).values())


# stages beside each other


@pytest.mark.usefixtures("many_blocks")
def test_reading_is_ahead_of_the_encoder_and_writing_behind_it(tmp_path, tiny_checkpoint, watch, monkeypatch):
    read_more, encoded_more, waited = threading.Event(), threading.Event(), []
    num_read, build = [0], predictions.build

    def on_report(stage, num_done, _):
        if stage == "tokenize":
            num_read[0] += num_done
            if num_read[0] >= 9:
                read_more.set()

    def do(number, _, outputs_BK):
        if number == 1:  # the first block is not through before the third is read
            waited.append(read_more.wait(PATIENCE_S))
        if number == 2:
            encoded_more.set()
        return outputs_BK

    def build_late(*arguments, **options):
        waited.append(encoded_more.wait(PATIENCE_S))  # the first block is not written before the second is encoded
        return build(*arguments, **options)

    watch.do = do
    monkeypatch.setattr(predictions, "build", build_late)
    shards, run = write(tmp_path / "corpus", [words(20, seed=i) for i in range(12)]), new_run(tmp_path)

    with progress.listen(on_report):
        receipts = score(shards, run, tiny_checkpoint)

    assert waited == [True] * 5
    assert total(receipts).num_documents == 12


# errors


def truncate(shard):
    path = Path(shard.uri)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_the_end(shard):
    """The last row group becomes unreadable; what comes before it is as it was."""
    path = Path(shard.uri)
    group = pq.read_metadata(path).row_group(pq.read_metadata(path).num_row_groups - 1)
    content = bytearray(path.read_bytes())
    for i in range(group.num_columns):
        column = group.column(i)
        first = column.dictionary_page_offset or column.data_page_offset
        content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize(("damage", "num_seen"), [(truncate, 0), (damage_the_end, 1)])
def test_an_error_in_reading_leaves_nothing_behind(tmp_path, tiny_checkpoint, watch, damage, num_seen):
    texts = [words(20, seed=i) for i in range(12)]
    (shard,), run = write(tmp_path / "corpus", texts, row_group_size=4), new_run(tmp_path)
    whole, times = Path(shard.uri).read_bytes(), Path(shard.uri).stat()
    damage(shard)

    with pytest.raises(ShardError, match="cannot be read"):
        score([shard], run, tiny_checkpoint)

    assert everything(run) == []
    assert publishing.finished_shard(run, shard) is None
    assert len(watch.batches) >= num_seen  # some of it had been read, and was encoded
    Path(shard.uri).write_bytes(whole)
    os.utime(shard.uri, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had only been read wrong
    assert table(run, score([shard], run, tiny_checkpoint))["doc_id"].to_list() == [f"doc-{i}" for i in range(12)]


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr
)
def test_an_error_in_encoding_leaves_nothing_behind(tmp_path, tiny_checkpoint, watch, number, error):
    def do(found, _, outputs_BK):
        if found == number:
            raise error
        return outputs_BK

    watch.do = do
    spec = CPU.model_copy(update={"batches": BatchSpec(max_batch_tokens=1)})  # a chunk at a time
    shards, run = write(tmp_path / "corpus", [f"fox {i}" for i in range(6)]), new_run(tmp_path)

    with pytest.raises(type(error)) as raised:
        score(shards, run, tiny_checkpoint, spec)

    assert raised.value is error
    assert len(watch.batches) == number  # and nothing more was encoded
    assert everything(run) == []
    assert publishing.finished_shard(run, shards[0]) is None
    watch.do = None
    assert len(table(run, score(shards, run, tiny_checkpoint, spec))) == 6


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("number", [1, 4])
def test_an_error_in_writing_leaves_nothing_behind(tmp_path, tiny_checkpoint, monkeypatch, number):
    build, calls = predictions.build, []

    def break_the_contract(*arguments, **options):
        good, bad = build(*arguments, **options)
        calls.append(good.num_rows)
        if len(calls) == number:
            column = good.schema.get_field_index("num_chunks")
            good = good.set_column(column, good.schema.field(column), pa.array([0] * good.num_rows, pa.int32()))
        return good, bad

    monkeypatch.setattr(predictions, "build", break_the_contract)
    shards, run = write(tmp_path / "corpus", [words(20, seed=i) for i in range(10)]), new_run(tmp_path)

    with pytest.raises(ContractError, match="num_chunks"):
        score(shards, run, tiny_checkpoint)

    assert len(calls) == number  # nothing was written after it
    assert everything(run) == []
    assert publishing.finished_shard(run, shards[0]) is None
    assert len(table(run, score(shards, run, tiny_checkpoint))) == 10


@pytest.mark.usefixtures("many_blocks")
def test_a_shard_that_fails_leaves_the_others_as_they_are(tmp_path, tiny_checkpoint):
    shards, run = write(tmp_path / "corpus", [words(20, seed=i) for i in range(9)], num_files=3), new_run(tmp_path)
    truncate(shards[1])

    finished = score(shards[:1], run, tiny_checkpoint)
    before = everything(run)
    with pytest.raises(ShardError):
        score(shards[1:2], run, tiny_checkpoint)
    assert everything(run) == before
    finished += score(shards[2:], run, tiny_checkpoint)

    assert len(before) == 4
    assert table(run, finished)["doc_id"].to_list() == [f"doc-{i}" for i in (0, 1, 2, 6, 7, 8)]


# stopped


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("stage", ["tokenize", "encode"])
def test_a_shard_that_is_stopped_ends_soon_and_leaves_nothing_behind(
    tmp_path, tiny_checkpoint, watch, stage, num_cores
):
    texts = [words(40, seed=i) for i in range(20)]
    shards, run = write(tmp_path / "corpus", texts), new_run(tmp_path)
    spec = CPU.model_copy(update={"batches": BatchSpec(max_batch_tokens=1)})  # a chunk at a time
    reports, seen_at_stop = Counter(), []

    def on_report(reported, num_done, _):
        reports[reported] += num_done > 0
        if reported == stage and reports[stage] == 3:
            progress.stop()
            seen_at_stop.append(len(watch.batches))

    before_cores = torch.get_num_threads()
    torch.set_num_threads(num_cores)
    try:
        with ThreadPoolExecutor(1) as pool, progress.listen(on_report):  # as a task runner does it
            future = pool.submit(score, shards, run, tiny_checkpoint, spec)
            with pytest.raises(progress.StoppedError):
                future.result(timeout=PATIENCE_S)
    finally:
        torch.set_num_threads(before_cores)

    # those under way when it was stopped, and one that a worker may have taken before its next report
    assert len(watch.batches) <= seen_at_stop[0] + 2 * num_cores < sum(chunks_of(texts, tiny_checkpoint).values()) / 2
    assert everything(run) == []
    progress.go_on()
    assert len(table(run, score(shards, run, tiny_checkpoint, spec))) == len(texts)


@pytest.mark.usefixtures("many_blocks")
def test_a_shard_in_the_main_thread_can_be_stopped_too(tmp_path, tiny_checkpoint):
    shards, run = write(tmp_path / "corpus", [words(20, seed=i) for i in range(20)]), new_run(tmp_path)

    def on_report(stage, num_done, _):
        if stage == "encode" and num_done > 0:
            progress.stop()

    with progress.listen(on_report), pytest.raises(progress.StoppedError):
        score(shards, run, tiny_checkpoint)

    assert everything(run) == []
