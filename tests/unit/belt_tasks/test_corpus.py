"""The corpus: shards and their keys, streaming, partitions, duplicates, and files that are wrong."""

import itertools
import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import corpus, inventory, storage
from belt_tasks.errors import ConfigError, ShardError, TransientError
from belt_tasks.inventory import Inventories
from belt_tasks.specs import CorpusSpec

NO_DUPLICATES = np.empty(0, dtype=np.int64)
REPOSITORY = Path(__file__).parents[3]


def rows(*doc_ids, **more):
    return pa.table({"doc_id": list(doc_ids), "text": [f"text of {doc_id}" for doc_id in doc_ids], **more})


def put(folder, name, table, *, rows_per_group=None, compression="snappy"):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group, compression=compression)
    return str(path)


def read(uri, spec=None, *, label_role="none", duplicates=None, **settings):
    """(file name, row_index, doc_id) of the good rows, and (file name, row_index, reason) of the others."""
    spec = spec or CorpusSpec()
    good, rejected = [], []
    for shard in corpus.plan_shards(uri, spec, label_role=label_role):
        name = shard.uri.rsplit("/", 1)[1]
        later = [] if duplicates is None else [row for file, row in duplicates if file == shard.uri]
        for batch in corpus.read_documents(
            shard, spec, duplicates=np.array(later, dtype=np.int64), label_role=label_role, **settings
        ):
            good += [(name, *row) for row in batch.good.select("row_index", "doc_id").rows()]
            rejected += [(name, *row) for row in batch.rejected.select("row_index", "reason").rows()]
    return good, rejected


def labels_of(uri, **settings):
    spec = CorpusSpec(**settings)
    return [
        label
        for shard in corpus.plan_shards(uri, spec, label_role="label")
        for batch in corpus.read_documents(shard, spec, duplicates=NO_DUPLICATES, label_role="label")
        for label in batch.good["label"]
    ]


def duplicates(uri, spec=None):
    spec = spec or CorpusSpec()
    table = corpus.duplicate_rows(corpus.plan_shards(uri, spec), spec)
    assert table.schema.names == ["source_uri", "row_index"]
    return list(zip(*table.to_pydict().values(), strict=True))


# shards


def test_a_small_file_is_one_shard(tmp_path):
    uri = put(tmp_path, "a.parquet", rows(*"abcdef"), rows_per_group=2)

    (shard,) = corpus.plan_shards(uri, CorpusSpec())

    assert (shard.uri, shard.row_groups, shard.first_row, shard.num_rows) == (uri, (0, 3), 0, 6)
    assert len(shard.key) == 16


def test_a_large_file_is_split_at_row_groups_by_bytes(tmp_path, monkeypatch):
    uri = put(tmp_path, "a.parquet", rows(*map(str, range(10))), rows_per_group=3)
    group_bytes = pq.ParquetFile(uri).metadata.row_group(0).total_byte_size
    monkeypatch.setattr(corpus, "SHARD_BYTES", group_bytes + 1)

    shards = corpus.plan_shards(uri, CorpusSpec())

    assert [(shard.row_groups, shard.first_row, shard.num_rows) for shard in shards] == [((0, 2), 0, 6), ((2, 4), 6, 4)]
    assert len({shard.key for shard in shards}) == 2
    assert read(uri)[0] == [("a.parquet", i, str(i)) for i in range(10)]


def test_keys_are_stable_and_change_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1)
    for name in ("a.parquet", "b.parquet"):
        put(tmp_path, name, rows(*"abcd"), rows_per_group=2)
    before = [shard.key for shard in corpus.plan_shards(str(tmp_path), CorpusSpec())]
    again = [shard.key for shard in corpus.plan_shards(str(tmp_path / "*.parquet"), CorpusSpec())]
    put(tmp_path, "b.parquet", rows(*"abcX"), rows_per_group=2)
    after = [shard.key for shard in corpus.plan_shards(str(tmp_path), CorpusSpec())]

    assert before == again
    assert len(set(before)) == 4
    assert before[:2] == after[:2]
    assert not set(before[2:]) & set(after[2:])


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b.parquet", "a/z.parquet", "c.parquet"):
        put(tmp_path, name, rows(name))
    put(tmp_path, "_hidden.parquet", rows("hidden"))

    assert [doc_id for _, _, doc_id in read(str(tmp_path))[0]] == ["a/z.parquet", "b.parquet", "c.parquet"]


def test_memory_is_a_place_like_any_other():
    uri = f"memory://{uuid.uuid4().hex}"
    for name, ids in (("label=1/a.parquet", "ab"), ("label=2/b.parquet", "ca")):
        storage.write_parquet(storage.join(uri, name), rows(*ids))

    assert read(uri)[0] == [("a.parquet", 0, "a"), ("a.parquet", 1, "b"), ("b.parquet", 0, "c"), ("b.parquet", 1, "a")]
    assert labels_of(uri) == ["1", "1", "2", "2"]
    ((file, row),) = duplicates(uri)
    assert (file.rsplit("/", 1)[1], row) == ("b.parquet", 1)


# rows


def test_row_index_counts_the_rows_of_the_file_across_row_groups_batches_and_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_ROWS", 4)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1)
    part = ["train" if i % 3 else "test" for i in range(50)]
    uri = put(tmp_path, "a.parquet", rows(*map(str, range(50)), part=part), rows_per_group=7)

    for wanted in ("train", "test"):
        good, rejected = read(uri, CorpusSpec(split_column="part", split=wanted))
        assert [(row, doc_id) for _, row, doc_id in good] == [(i, str(i)) for i in range(50) if part[i] == wanted]
        assert rejected == []
    assert [row for _, row, _ in read(uri)[0]] == list(range(50))


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (pa.array(["b", "a", None]), "a"),
        (pa.array([b"b", b"a", b"\xff"]), "a"),
        (pa.array(["b", "a", "b"]).dictionary_encode(), "a"),
        (pa.array(["b", "a", "b"], pa.large_string()), "a"),
        (pa.array([1, 2, None]), "2"),
        (pa.array([False, True, None]), "true"),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_splits_of_every_type(tmp_path, part, wanted):
    uri = put(tmp_path, "a.parquet", rows("x", "y", "z", part=part))

    assert read(uri, CorpusSpec(split_column="part", split=wanted))[0] == [("a.parquet", 1, "y")]


def test_bad_rows_are_put_aside_in_their_place(tmp_path):
    table = pa.table({"doc_id": ["a", None, "c", "a"], "text": ["", "x", None, "x"]})
    uri = put(tmp_path, "a.parquet", table)

    good, rejected = read(uri, duplicates=duplicates(uri))

    assert good == [("a.parquet", 0, "a")]
    assert rejected == [
        ("a.parquet", 1, "doc_id_null"),
        ("a.parquet", 2, "text_null"),
        ("a.parquet", 3, "doc_id_duplicate"),
    ]


def test_labels_outside_the_vocabulary_are_put_aside(tmp_path):
    uri = put(tmp_path, "a.parquet", rows("a", "b", "c", label=["one", "two", None]))

    good, rejected = read(uri, label_role="label", vocabulary=frozenset({"one"}))

    assert good == [("a.parquet", 0, "a")]
    assert rejected == [("a.parquet", 1, "label_unknown"), ("a.parquet", 2, "label_null")]


def damage_column(uri, index):
    """Overwrite the pages of one column, so that reading it fails."""
    chunk = pq.ParquetFile(uri).metadata.row_group(0).column(index)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(Path(uri).read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    Path(uri).write_bytes(content)


def test_columns_that_are_not_needed_are_not_read(tmp_path):
    table = rows("a", "b", other=["x", "y"], label=["one", "two"])
    uri = put(tmp_path, "a.parquet", table)
    damage_column(uri, table.schema.get_field_index("other"))
    damage_column(uri, table.schema.get_field_index("label"))

    assert [doc_id for _, _, doc_id in read(uri)[0]] == ["a", "b"]
    with pytest.raises(ShardError, match=r"a\.parquet \(row groups \(0, 1\)\): cannot be read: "):
        read(uri, label_role="label")


def test_ids_and_labels_are_read_without_the_text(tmp_path):
    uri = put(tmp_path, "a.parquet", rows("a", "b", label=["one", "two"]))
    damage_column(uri, 1)

    assert duplicates(uri) == []
    assert len(read(uri, label_role="label", with_text=False)[0]) == 2
    with pytest.raises(ShardError, match="cannot be read"):
        read(uri)


def test_columns_may_have_any_name_and_the_others_may_share_theirs(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["x"]), pa.array([1]), pa.array([2]), pa.array([{"id": 3}])],
        names=["doc.id", "text [raw] *", "twice", "twice", "doc"],
    )
    uri = put(tmp_path, "a.parquet", table)

    assert read(uri, CorpusSpec(id_column="doc.id", text_column="text [raw] *"))[0] == [("a.parquet", 0, "a")]


def test_one_column_may_be_id_and_text(tmp_path):
    uri = put(tmp_path, "a.parquet", pa.table({"text": ["a", "b", "a"]}))
    spec = CorpusSpec(id_column="text")

    assert duplicates(uri, spec) == [(uri, 2)]
    assert [doc_id for _, _, doc_id in read(uri, spec)[0]] == ["a", "b", "a"]


# partitions


def test_directories_stand_for_columns(tmp_path):
    for label, part, ids in (("01", "train", "ab"), ("x%2Fy z", "train", "c"), ("01", "test", "d")):
        put(tmp_path, f"part={part}/label={label}/a.parquet", rows(*ids))

    assert labels_of(str(tmp_path)) == ["01", "01", "01", "x/y z"]
    assert labels_of(str(tmp_path), split_column="part", split="test") == ["01"]
    assert corpus.label_column_type(str(tmp_path), CorpusSpec()) == pa.string()


def test_a_file_s_own_column_goes_before_that_of_its_directory(tmp_path):
    put(tmp_path, "doc_id=7/label=1/a.parquet", rows("a", "b", label=[5, 6]))

    assert labels_of(str(tmp_path)) == ["5", "6"]
    assert [doc_id for _, _, doc_id in read(str(tmp_path))[0]] == ["a", "b"]


def test_rows_of_the_null_partition_have_no_label(tmp_path):
    put(tmp_path, "label=__HIVE_DEFAULT_PARTITION__/a.parquet", rows("a"))

    assert read(str(tmp_path), label_role="label") == ([], [("a.parquet", 0, "label_null")])


# duplicates


def test_the_first_of_equal_ids_stays_in_a_batch_a_file_and_across_files(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_ROWS", 2)
    first = put(tmp_path, "a.parquet", rows("1", "1", "2", "3", "2"), rows_per_group=3)
    second = put(tmp_path, "b.parquet", rows(4, 3, 4))  # integers and strings alike

    assert duplicates(str(tmp_path)) == [(first, 1), (first, 4), (second, 1), (second, 2)]


def test_ids_that_are_missing_or_unreadable_are_not_duplicates(tmp_path):
    ids = pa.array([None, None, b"\xff", b"\xff", b"a"], pa.binary())
    uri = put(tmp_path, "a.parquet", pa.table({"doc_id": ids, "text": ["x"] * 5}))

    assert duplicates(uri) == []


def test_equal_ids_in_different_splits_are_not_duplicates(tmp_path):
    uri = put(tmp_path, "a.parquet", rows("a", "a", "a", part=["train", "test", "train"]))

    assert duplicates(uri, CorpusSpec(split_column="part", split="train")) == [(uri, 2)]
    assert duplicates(uri) == [(uri, 1), (uri, 2)]


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.none() | st.sampled_from("abcdef"), min_size=1, max_size=20),
    cuts=st.sets(st.integers(1, 19), max_size=4),
    rows_per_group=st.integers(1, 5),
    shard_bytes=st.sampled_from([1, 10**9]),
)
def test_duplicates_do_not_depend_on_how_rows_are_cut_into_files(
    tmp_path_factory, ids, cuts, rows_per_group, shard_bytes
):
    folder = tmp_path_factory.mktemp("cut")
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        table = pa.table({"doc_id": pa.array(ids[start:stop], pa.string()), "text": ["x"] * (stop - start)})
        put(folder, f"{i}.parquet", table, rows_per_group=rows_per_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", shard_bytes)
        found = duplicates(str(folder))

    positions = [bounds[int(Path(uri).stem)] + row for uri, row in found]
    assert positions == [i for i, doc_id in enumerate(ids) if doc_id is not None and doc_id in ids[:i]]


# what is wrong is said before any work


def test_the_problems_of_all_files_are_told_at_once(tmp_path):
    put(tmp_path, "a.parquet", pa.table({"doc_id": ["a"], "body": ["x"]}))
    put(tmp_path, "b.parquet", rows("b"))
    put(tmp_path, "c.parquet", pa.table({"doc_id": [1.5], "text": [1]}))
    (tmp_path / "d.parquet").write_bytes(b"not Parquet")

    with pytest.raises(ConfigError) as caught:
        corpus.plan_shards(str(tmp_path), CorpusSpec())

    lines = str(caught.value).split("\n")
    has = "it has 'doc_id', 'body' (choose with --text-column, or text_column of corpus)"
    assert lines[0] == f"{tmp_path}/a.parquet: no column 'text'; {has}"
    assert "c.parquet: column 'doc_id' must hold strings or integers, got double" in lines[1]
    assert "c.parquet: column 'text' must hold strings, or binary holding UTF-8, got int64" in lines[2]
    assert "d.parquet: not a Parquet file" in lines[3]
    assert len(lines) == 4


def test_of_many_wrong_files_the_first_are_told_and_the_rest_counted(tmp_path):
    for i in range(25):
        put(tmp_path, f"{i:02}.parquet", pa.table({"doc_id": ["a"]}))

    with pytest.raises(ConfigError, match=r"09\.parquet: no column 'text'.*\n\.\.\. and 15 more files$"):
        corpus.plan_shards(str(tmp_path), CorpusSpec())


@pytest.mark.parametrize("table", [rows()[:0], pa.table({"doc_id": pa.nulls(0, pa.string()), "text": [""][:0]})])
def test_a_corpus_without_rows_is_refused(tmp_path, table):
    schema = pa.schema([("doc_id", pa.string()), ("text", pa.string())])
    for name in ("a.parquet", "b.parquet"):
        put(tmp_path, name, table.cast(schema))

    with pytest.raises(ConfigError, match="no rows in its 2 files"):
        corpus.plan_shards(str(tmp_path), CorpusSpec())


def test_a_file_without_rows_beside_others_is_none_the_worse(tmp_path):
    put(tmp_path, "a.parquet", rows("a")[:0])
    put(tmp_path, "b.parquet", rows("b"))

    assert read(str(tmp_path)) == ([("b.parquet", 0, "b")], [])


def test_a_split_without_rows_is_refused(tmp_path):
    uri = put(tmp_path, "a.parquet", rows("a", part=["train"]))

    with pytest.raises(ConfigError, match=r"no row has 'trian' in column 'part' \(choose with --split, or"):
        corpus.plan_shards(uri, CorpusSpec(split_column="part", split="trian"))


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file, directory or glob"):
        corpus.plan_shards(str(tmp_path / "nowhere"), CorpusSpec())


def test_label_column_type_is_that_of_the_first_file(tmp_path):
    put(tmp_path, "a.parquet", rows("a", label=[1.5]))

    assert corpus.label_column_type(str(tmp_path), CorpusSpec()) == pa.float64()
    with pytest.raises(ConfigError, match=r"no column 'klass'; it has .* \(choose with --label-column, or"):
        corpus.label_column_type(str(tmp_path), CorpusSpec(label_column="klass"))


# what goes wrong after planning


@pytest.mark.parametrize(
    "change", ["truncated", "removed", "fewer rows", "other rows", "fewer groups", "other columns"]
)
def test_a_file_that_changed_after_planning_is_an_error_of_its_shard(tmp_path, change):
    uri = put(tmp_path, "a.parquet", rows(*map(str, range(100))), rows_per_group=50)
    (shard,) = corpus.plan_shards(uri, CorpusSpec())
    match change:
        case "truncated":
            os.truncate(uri, Path(uri).stat().st_size // 2)
        case "removed":
            Path(uri).unlink()
        case "fewer rows":
            put(tmp_path, "a.parquet", rows(*map(str, range(80))), rows_per_group=50)
        case "other rows":
            put(tmp_path, "a.parquet", rows(*map(str, range(1, 101))), rows_per_group=50)
        case "fewer groups":
            put(tmp_path, "a.parquet", rows(*map(str, range(100))), rows_per_group=100)
        case "other columns":
            put(tmp_path, "a.parquet", rows(*map(str, range(100))).drop_columns(["text"]), rows_per_group=50)

    with pytest.raises(ShardError, match=r"a\.parquet.*(cannot be read|changed since it was planned)"):
        list(corpus.read_documents(shard, CorpusSpec(), duplicates=NO_DUPLICATES))


def put_rows(folder_uri, *doc_ids):
    storage.write_parquet(f"{folder_uri}/a.parquet", rows(*doc_ids))
    return storage.list_files(folder_uri, suffix=".parquet")[0]


def test_rows_of_a_file_that_is_replaced_while_it_is_read_are_not_used(output):
    """On a local disk and in S3: its length stays, its rows do not."""
    put_rows(output, "a", "b", "c")
    (shard,) = corpus.plan_shards(output, CorpusSpec())
    reading = corpus.read_documents(shard, CorpusSpec(), duplicates=NO_DUPLICATES, batch_rows=1)
    assert next(reading).good["doc_id"].to_list() == ["a"]
    put_rows(output, "a", "x", "b")

    with pytest.raises(ShardError, match="changed"):
        list(reading)


def test_rows_are_not_looked_for_in_another_version_of_a_file(output):
    file = put_rows(output, "a", "b", "c")
    assert len(corpus.shards_with_rows(file, np.array([2]))) == 1
    put_rows(output, "c", "a")

    with pytest.raises(ShardError, match=r"a\.parquet: changed since it was planned"):
        corpus.shards_with_rows(file, np.array([2]))


def test_an_inventory_is_of_the_version_that_it_is_named_by(output):
    file, spec, inventories = put_rows(f"{output}/corpus", "a", "b"), CorpusSpec(), Inventories(root_uri=f"{output}/of")
    put_rows(f"{output}/corpus", "a", "x")

    with pytest.raises(ConfigError, match=r"a\.parquet: changed since it was planned"):
        inventory.take([file], spec, inventories)

    assert not inventories.exists(inventory.key_of(file, spec))


@pytest.mark.parametrize("error", [ConnectionResetError("peer went away"), TimeoutError()])
@pytest.mark.parametrize("safe_bytes", [10**9, 100_000], ids=["on opening", "on reading"])
def test_a_connection_that_drops_is_worth_a_retry(error, safe_bytes):
    class Flaky(MemoryFileSystem):
        protocol = "flaky"
        cachable = False
        fails_before = 0

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("flaky:/"))

        def _open(self, path, *args, **kwargs):
            file = super()._open(path, *args, **kwargs)
            whole_read = file.read

            def read(*size):
                if file.tell() < type(self).fails_before:
                    raise error
                return whole_read(*size)

            file.read = read
            return file

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    try:
        name = uuid.uuid4().hex
        noise = np.random.default_rng(0).bytes(300_000).hex()  # so long that the footer is read apart from the pages
        storage.write_parquet(f"memory://{name}/a.parquet", pa.table({"doc_id": ["a"], "text": [noise]}))
        (shard,) = corpus.plan_shards(f"flaky://{name}", CorpusSpec())
        Flaky.fails_before = safe_bytes
        with pytest.raises(TransientError, match=str(error) or "TimeoutError"):
            list(corpus.read_documents(shard, CorpusSpec(), duplicates=NO_DUPLICATES))
    finally:
        _registry.pop("flaky")


# memory


MEASURE = """
import sys
import numpy as np
import pandas  # where it is installed, pyarrow imports it at its first use, which is not what is measured
import psutil
from belt_tasks import corpus
from belt_tasks.specs import CorpusSpec

(shard,) = [shard for shard in corpus.plan_shards(sys.argv[1], CorpusSpec())]
process, num_documents = psutil.Process(), 0
before = most = process.memory_info().rss
corpus.duplicate_rows([shard], CorpusSpec())
for batch in corpus.read_documents(shard, CorpusSpec(), duplicates=np.empty(0, dtype=np.int64)):
    most = max(most, process.memory_info().rss)
    num_documents += len(batch.good)
print(num_documents, most - before)
"""


def test_memory_does_not_grow_with_the_corpus_even_in_one_row_group(tmp_path):
    num_documents, num_characters = 30_000, 10_000
    alphabet = np.random.default_rng(0).integers(97, 123, 1_000_000, dtype=np.uint8).tobytes().decode()
    texts = [alphabet[i * 31 % 990_000 :][:num_characters] for i in range(num_documents)]
    table = pa.table({"doc_id": range(num_documents), "text": texts})
    uri = put(tmp_path, "a.parquet", table, compression="none")
    del texts, table
    assert Path(uri).stat().st_size > 250e6
    assert pq.ParquetFile(uri).num_row_groups == 1

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, uri], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )

    documents_read, growth_bytes = map(int, done.stdout.split())
    assert documents_read == num_documents
    assert growth_bytes < 120e6


def test_batches_of_long_documents_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 10_000)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 1000)) for _ in range(50)]
    uri = put(tmp_path, "a.parquet", pa.table({"doc_id": range(50), "text": texts}))
    (shard,) = corpus.plan_shards(uri, CorpusSpec())

    batches = list(corpus.read_documents(shard, CorpusSpec(), duplicates=NO_DUPLICATES))

    assert sum(len(batch.good) for batch in batches) == 50
    assert max(len(batch.good) for batch in batches) <= 10
