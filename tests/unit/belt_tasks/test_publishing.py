"""Publishing: names that follow from what goes in, objects that appear whole, and a manifest that comes last."""

import json
import uuid
from datetime import UTC, datetime

import fsspec
import polars as pl
import pyarrow as pa
import pytest

import data_contracts
from belt_tasks import corpus, publishing, storage
from belt_tasks.errors import ConfigError, ContractError
from belt_tasks.publishing import RunRef, ShardWriter, run_id_of
from belt_tasks.receipts import Counts, ShardReceipt
from belt_tasks.specs import ChunkSpec, CorpusSpec

STARTED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROW = {"flow": "chunk", "corpus_uri": "/corpus", "spec": "{}"}


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    """A run that has not begun, on disk and in memory."""
    if request.param == "local":
        yield RunRef(output_uri=str(tmp_path / "out"), run_id="0123456789abcdef")
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield RunRef(output_uri=uri, run_id="0123456789abcdef")
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def shard(key):
    return corpus.ShardRef(uri="/corpus/a.parquet", row_groups=(0, 1), first_row=0, num_rows=4, key=key)


def tokens(*doc_ids, num_tokens=2):
    values = {
        "doc_id": doc_ids,
        "input_ids": [[5, 6]] * len(doc_ids),
        "num_tokens": [num_tokens] * len(doc_ids),
        "content_fingerprint": ["0" * 64] * len(doc_ids),
        "label": ["a"] * len(doc_ids),
        "labels": [None] * len(doc_ids),
        "target": [None] * len(doc_ids),
        "weight": [None] * len(doc_ids),
    }
    return pa.table(values, schema=data_contracts.arrow_schema("tokens"))


def rejected(*reasons):
    return pl.DataFrame(
        {
            "source_uri": ["/corpus/a.parquet"] * len(reasons),
            "row_index": range(len(reasons)),
            "doc_id": [None] * len(reasons),
            "reason": reasons,
            "detail": ["in words"] * len(reasons),
        },
        schema={
            "source_uri": pl.String,
            "row_index": pl.Int64,
            "doc_id": pl.String,
            "reason": pl.String,
            "detail": pl.String,
        },
    )


def finish(run, key, *doc_ids, reasons=()):
    with ShardWriter.open(run, shard(key), table="tokens") as writer:
        writer.write(tokens(*doc_ids))
        writer.reject(rejected(*reasons))
    return writer.receipt(Counts(num_documents=len(doc_ids), num_tokens=2 * len(doc_ids)))


def publish(run, *receipts):
    return publishing.publish(run, list(receipts), row=ROW, labels=("a", "b"), started_at=STARTED_AT)


def everything(uri):
    filesystem, path = fsspec.core.url_to_fs(uri)
    return sorted(name.removeprefix(path).lstrip("/") for name in filesystem.find(path))


# the run's id


def test_a_run_id_is_stable_and_depends_on_all_that_decides_the_result(monkeypatch):
    def run_id(keys=("a", "b"), spec=None, **deciding):
        return run_id_of(keys, corpus=spec or CorpusSpec(), **{"flow": "score", **deciding})

    ids = [
        run_id(),
        run_id(keys=("b", "a")),
        run_id(keys=("a",)),
        run_id(spec=CorpusSpec(text_column="body")),
        run_id(spec=CorpusSpec(split_column="split", split="test")),
        run_id(flow="chunk"),
        run_id(chunks=ChunkSpec()),
        run_id(chunks=ChunkSpec(chunk_size=100, stride=100)),
        run_id(digest="0"),
    ]

    assert run_id() == ids[0]
    assert run_id(digest="0", chunks=ChunkSpec()) == run_id(chunks=ChunkSpec(), digest="0")
    assert len(set(ids)) == len(ids)
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in ids)
    monkeypatch.setattr(publishing, "version", lambda _: "another version")
    assert run_id() not in ids


# shards


def test_a_shards_objects_have_names_that_follow_from_run_and_shard(run):
    receipt = finish(run, "k1", "a", "b", reasons=["text_null"])

    assert everything(run.output_uri) == [
        f"runs/{run.run_id}/receipts/k1.json",
        f"runs/{run.run_id}/rejected/k1.parquet",
        f"runs/{run.run_id}/tokens/k1.parquet",
    ]
    assert [(file.table, file.path, file.num_rows) for file in receipt.files] == [
        ("tokens", run.path_of("tokens", "k1"), 2),
        ("rejected", run.path_of("rejected", "k1"), 1),
    ]
    stored = storage.read_parquet(storage.join(run.output_uri, run.path_of("rejected", "k1")))
    assert stored.schema.equals(data_contracts.arrow_schema("rejected"))
    assert stored["run_id"].to_pylist() == [run.run_id]


def test_rejected_rows_are_counted_by_reason_over_all_writes(run):
    with ShardWriter.open(run, shard("k1"), table="tokens") as writer:
        writer.reject(rejected("text_null", "doc_id_null", "text_null"))
        writer.reject(rejected())
        writer.reject(rejected("text_null"))
    counts = writer.receipt(Counts(num_documents=7)).counts

    assert counts.num_documents == 7
    assert counts.num_rejected == 4
    assert counts.rejected_by_reason == {"text_null": 3, "doc_id_null": 1}


def test_nothing_of_a_shard_is_visible_before_it_is_whole(run):
    with ShardWriter.open(run, shard("k1"), table="tokens") as writer:
        writer.write(tokens("a"))
        assert [name for name in everything(run.output_uri) if name.endswith(".parquet")] == []


def test_a_shard_that_fails_leaves_no_object(run):
    def fail_half_way():
        with ShardWriter.open(run, shard("k1"), table="tokens") as writer:
            writer.write(tokens("a"))
            writer.reject(rejected("text_null"))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()

    assert everything(run.output_uri) == []
    assert publishing.finished_shard(run, shard("k1")) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (tokens("a", num_tokens=3), "num_tokens_is_length"),
        (tokens("a", None), "doc_id"),
        (tokens("a", "b", "a"), "doc_id"),
        (tokens("a").drop_columns(["target"]), "target"),
    ],
)
def test_rows_that_break_the_contract_are_refused_with_its_message(run, table, message):
    with (
        pytest.raises(ContractError, match=message) as caught,
        ShardWriter.open(run, shard("k1"), table="tokens") as writer,
    ):
        writer.write(table)

    found = data_contracts.violations(table, "tokens")
    assert str(caught.value) == data_contracts.message(found, "tokens", "shard k1")
    assert everything(run.output_uri) == []


def test_rejected_rows_have_a_contract_too(run):
    with pytest.raises(ContractError, match="reason"), ShardWriter.open(run, shard("k1"), table="tokens") as writer:
        writer.reject(rejected("no such reason"))


@pytest.mark.parametrize(("parts", "whole"), [((), 0), ((3,), 3), ((3, 0, 4), 7), ((3, None), None), ((None,), None)])
def test_unknown_tokens_of_a_run_are_known_where_those_of_each_shard_are(run, parts, whole):
    counts = [Counts(num_tokens=9, num_unknown_tokens=part) for part in parts]
    receipts = [ShardReceipt(shard_key=f"k{i}", files=(), counts=each) for i, each in enumerate(counts)]

    assert (
        publishing.publish(run, receipts, row=ROW, labels=(), started_at=STARTED_AT).run["num_unknown_tokens"] == whole
    )


def test_a_finished_shard_is_found_again(run):
    assert publishing.finished_shard(run, shard("k1")) is None

    receipt = finish(run, "k1", "a", reasons=["text_null"])

    assert not receipt.reused
    assert publishing.finished_shard(run, shard("k1")) == receipt.model_copy(update={"reused": True})
    assert publishing.finished_shard(run, shard("k2")) is None
    assert publishing.finished_shard(run.model_copy(update={"run_id": "f" * 16}), shard("k1")) is None


@pytest.mark.parametrize("table", ["tokens", "rejected"])
def test_a_shard_that_lost_an_object_is_not_finished(run, table):
    receipt = finish(run, "k1", "a")
    filesystem, path = fsspec.core.url_to_fs(storage.join(run.output_uri, run.path_of(table, "k1")))
    filesystem.rm_file(path)

    assert publishing.finished_shard(run, shard("k1")) is None
    assert finish(run, "k1", "a") == receipt
    assert publishing.finished_shard(run, shard("k1")) is not None


def test_writing_a_shard_again_replaces_it(run):
    finish(run, "k1", "a", "b")
    before = everything(run.output_uri)
    finish(run, "k1", "c")

    assert everything(run.output_uri) == before
    stored = storage.read_parquet(storage.join(run.output_uri, run.path_of("tokens", "k1")))
    assert stored["doc_id"].to_pylist() == ["c"]


# the manifest


def test_the_manifest_is_written_after_all_else_and_the_pointer_to_it_last(run, monkeypatch):
    written = []
    write_bytes, parquet_writer = storage.write_bytes, storage.parquet_writer

    def recorded_bytes(uri, data):
        write_bytes(uri, data)
        written.append(uri.removeprefix(run.output_uri))

    def recorded_writer(uri, schema):
        written.append(uri.removeprefix(run.output_uri))
        return parquet_writer(uri, schema)

    monkeypatch.setattr(storage, "write_bytes", recorded_bytes)
    monkeypatch.setattr(storage, "parquet_writer", recorded_writer)

    publish(run, finish(run, "k1", "a"), finish(run, "k2", "b"))

    folder = f"/runs/{run.run_id}"
    shards = [
        [f"{folder}/tokens/{key}.parquet", f"{folder}/rejected/{key}.parquet", f"{folder}/receipts/{key}.json"]
        for key in ("k1", "k2")
    ]
    assert written == [*shards[0], *shards[1], f"{folder}/manifest.json", "/published.json"]


def test_a_manifest_tells_the_run_its_files_and_its_counts(run):
    receipts = [finish(run, "k1", "a", "b", reasons=["text_null"]), finish(run, "k2", "c", reasons=["text_null"])]

    manifest = publish(run, *receipts)

    told = {name: manifest.run[name] for name in ("run_id", "flow", "num_shards", "num_documents", "num_rejected")}
    assert told == {
        "run_id": run.run_id,
        "flow": "chunk",
        "num_shards": 2,
        "num_documents": 3,
        "num_rejected": 2,
    }
    assert manifest.run["started_at"] == "2026-01-02T03:04:05+00:00"
    assert manifest.run["tokens_per_s"] is None
    assert list(manifest.run) == data_contracts.arrow_schema("runs").names
    assert manifest.rejected_by_reason == {"text_null": 2}
    assert manifest.labels == ("a", "b")
    assert manifest.files == tuple(file for receipt in receipts for file in receipt.files)
    assert publishing.read_manifest(run.output_uri) == manifest
    assert storage.read_bytes(run.manifest_uri) == storage.read_bytes(storage.join(run.output_uri, "published.json"))


def test_a_run_whose_row_breaks_its_contract_is_not_published(run):
    receipt = finish(run, "k1", "a")

    with pytest.raises(ContractError, match=f"run {run.run_id}.*flow"):
        publishing.publish(run, [receipt], row={**ROW, "flow": "guess"}, labels=(), started_at=STARTED_AT)

    assert not storage.exists(run.manifest_uri)
    assert not storage.exists(storage.join(run.output_uri, "published.json"))


def test_readers_see_nothing_before_and_everything_after(run):
    receipts = [finish(run, "k1", "a", "b"), finish(run, "k2", "c")]
    with pytest.raises(ConfigError, match=r"nothing is published there \(no published\.json\)"):
        publishing.read_table(run.output_uri, "tokens")

    publish(run, *receipts)

    assert publishing.read_table(run.output_uri, "tokens")["doc_id"].to_list() == ["a", "b", "c"]
    assert publishing.read_table(run.output_uri, "tokens", columns=["label"]).columns == ["label"]
    assert len(publishing.read_table(run.output_uri, "rejected")) == 0


COST = ("padding_share", "redundant_chunk_share", "flops_per_s", "peak_share", "tokens_per_s", "num_documents_reused")


def cost_of(run, *counts, **row):
    """What the manifest of a run says of its cost, given the counts of its shards and more columns of its row."""
    receipts = [ShardReceipt(shard_key=f"k{i}", files=(), counts=each) for i, each in enumerate(counts)]
    manifest = publishing.publish(run, receipts, row={**ROW, **row}, labels=(), started_at=STARTED_AT)
    assert publishing.read_manifest(run.output_uri) == manifest
    return {name: manifest.run[name] for name in COST}


SMALL_SHARD = Counts(
    num_documents=10,
    num_documents_reused=2,
    num_chunks=20,
    num_redundant_chunks=10,
    num_tokens_encoded=90,
    num_positions=100,
    num_padding=50,
    needed_flops=1e12,
    encode_s=1.0,
)
LARGE_SHARD = Counts(
    num_documents=100,
    num_documents_reused=3,
    num_chunks=180,
    num_redundant_chunks=0,
    num_tokens_encoded=710,
    num_positions=900,
    num_padding=0,
    needed_flops=97.9e12,
    encode_s=3.0,
)


def test_shares_and_speeds_are_those_of_all_shards_together(run):
    told = cost_of(run, SMALL_SHARD, LARGE_SHARD, device="NVIDIA H100 80GB HBM3", precision="bf16")

    assert told == {
        "padding_share": 50 / 1000,
        "redundant_chunk_share": 10 / 200,
        "flops_per_s": pytest.approx(98.9e12 / 4),
        "peak_share": pytest.approx(0.1 / 4),
        "tokens_per_s": 800 / 4,
        "num_documents_reused": 5,
    }


def test_no_padding_and_no_redundant_chunk_are_zero_and_not_unknown(run):
    told = cost_of(run, LARGE_SHARD.model_copy(update={"num_documents_reused": 0}))

    assert (told["padding_share"], told["redundant_chunk_share"], told["num_documents_reused"]) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    "counts", [(), (Counts(),), (Counts(num_rejected=3, read_s=1.0, write_s=1.0), Counts())], ids=["none", "one", "two"]
)
def test_a_run_that_encodes_nothing_has_no_shares_and_no_speed(run, counts):
    told = cost_of(run, *counts, device="NVIDIA H100 80GB HBM3", precision="bf16")

    assert told == {**dict.fromkeys(COST), "num_documents_reused": 0}


def test_chunks_that_were_not_encoded_have_a_share_too(run):
    told = cost_of(run, Counts(num_chunks=8, num_redundant_chunks=2))  # as `belt chunk` counts them

    assert told == {**dict.fromkeys(COST), "redundant_chunk_share": 0.25, "num_documents_reused": 0}


def test_an_encoder_whose_cost_is_unknown_has_no_speed_in_flops(run):
    unknown = SMALL_SHARD.model_copy(update={"needed_flops": 0.0})

    told = cost_of(run, unknown, device="NVIDIA H100 80GB HBM3", precision="bf16")

    assert (told["flops_per_s"], told["peak_share"], told["tokens_per_s"]) == (None, None, 90.0)


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"device": "NVIDIA H100 PCIe", "precision": "bf16"}, 1e12 / 756e12),
        ({"device": "NVIDIA H100 PCIe", "precision": "fp16"}, 1e12 / 756e12),
        ({"device": "NVIDIA H100 PCIe", "precision": "fp32"}, None),
        ({"device": "NVIDIA H100 PCIe"}, None),
        ({"device": "cpu", "precision": "bf16"}, None),
        ({"device": "NVIDIA GeForce RTX 4090", "precision": "bf16"}, None),
        ({"precision": "bf16"}, None),
        ({}, None),
    ],
)
def test_the_share_of_the_peak_needs_a_device_that_belt_knows_and_16_bits(run, row, share):
    told = cost_of(run, SMALL_SHARD, **row)

    assert told["peak_share"] == (None if share is None else pytest.approx(share))
    assert told["flops_per_s"] == 1e12


def test_what_a_run_did_cost_satisfies_its_contract(run):
    cost_of(run, SMALL_SHARD, LARGE_SHARD, device="NVIDIA H200", precision="bf16")

    row = json.loads(storage.read_bytes(run.manifest_uri))["run"]
    times = {name: datetime.fromisoformat(row[name]) for name in ("started_at", "finished_at")}
    table = pa.Table.from_pylist([{**row, **times}], schema=data_contracts.arrow_schema("runs"))
    assert data_contracts.violations(table, "runs") == []
    assert list(row) == data_contracts.arrow_schema("runs").names


@pytest.mark.parametrize("precision", ["fp64", "int8", ""])
def test_a_precision_that_the_contract_does_not_know_is_refused(run, precision):
    with pytest.raises(ContractError, match="precision"):
        cost_of(run, SMALL_SHARD, precision=precision)

    assert everything(run.output_uri) == []


def test_readers_keep_to_the_last_complete_run_while_another_is_under_way(run):
    publish(run, finish(run, "k1", "old"))
    newer = run.model_copy(update={"run_id": "f" * 16})

    first = finish(newer, "k1", "new-1")
    assert publishing.read_table(run.output_uri, "tokens")["doc_id"].to_list() == ["old"]
    publish(newer, first, finish(newer, "k2", "new-2"))
    assert publishing.read_table(run.output_uri, "tokens")["doc_id"].to_list() == ["new-1", "new-2"]


def test_an_object_that_no_manifest_names_is_not_read(run):
    publish(run, finish(run, "k1", "a"))
    finish(run, "stray", "b")

    assert publishing.read_table(run.output_uri, "tokens")["doc_id"].to_list() == ["a"]


def test_a_table_that_the_run_has_not_is_named(run):
    publish(run, finish(run, "k1", "a"))

    with pytest.raises(ConfigError, match="table must be one of rejected, tokens, got 'predictions'"):
        publishing.read_table(run.output_uri, "predictions")


def test_a_damaged_manifest_is_named(run):
    storage.write_bytes(storage.join(run.output_uri, "published.json"), b'{"run": ')

    with pytest.raises(ConfigError, match=r"published\.json: not a manifest that this belt reads"):
        publishing.read_manifest(run.output_uri)


def test_republish_points_readers_back_to_a_complete_run(run):
    assert publishing.republish(run) is None
    older = publish(run, finish(run, "k1", "old"))
    newer = run.model_copy(update={"run_id": "f" * 16})
    publish(newer, finish(newer, "k1", "new"))

    assert publishing.republish(run) == older
    assert publishing.read_manifest(run.output_uri) == older
    assert publishing.read_table(run.output_uri, "tokens")["doc_id"].to_list() == ["old"]


def test_a_run_that_lost_a_file_is_not_complete(run):
    manifest = publish(run, finish(run, "a", "1"))
    filesystem, path = fsspec.core.url_to_fs(manifest.uris(run.output_uri, "tokens")[0])
    filesystem.rm_file(path)

    assert publishing.republish(run) is None


def test_republishing_what_is_published_writes_nothing(run, monkeypatch):
    manifest = publish(run, finish(run, "k1", "a"))
    monkeypatch.setattr(storage, "write_bytes", lambda *_: pytest.fail("written"))

    assert publishing.republish(run) == manifest


def test_republish_mends_an_interrupted_publication(run):
    manifest = publish(run, finish(run, "k1", "a"))
    filesystem, path = fsspec.core.url_to_fs(storage.join(run.output_uri, "published.json"))
    filesystem.rm_file(path)

    assert publishing.republish(run) == manifest
    assert publishing.read_manifest(run.output_uri) == manifest


def test_an_output_may_be_moved(tmp_path):
    run = RunRef(output_uri=str(tmp_path / "out"), run_id="0123456789abcdef")
    publish(run, finish(run, "k1", "a"))

    (tmp_path / "out").rename(tmp_path / "moved")

    assert publishing.read_table(str(tmp_path / "moved"), "tokens")["doc_id"].to_list() == ["a"]
    assert json.loads((tmp_path / "moved" / "published.json").read_text())["run"]["run_id"] == run.run_id
