"""Storage: what is listed, that objects appear whole or not at all, and what its errors say."""

import os
import resource
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from belt_tasks import sorted_files, storage
from belt_tasks.errors import ConfigError, TransientError

TABLE = pa.table({"number": [1, 2, 3], "word": ["one", "two", "three"]})


@pytest.fixture(params=["local", "memory", "s3"])
def root(request, tmp_path):
    """An empty place to write to, on disk, in memory and on a real S3 server."""
    if request.param == "local":
        yield str(tmp_path / "root")
        return
    if request.param == "s3":
        yield request.getfixturevalue("s3_root")
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@pytest.fixture
def broken():
    """A protocol whose every access fails with the exception that the test puts in."""

    class Broken(MemoryFileSystem):
        protocol = "broken"
        cachable = False
        error: Exception

        def info(self, *_, **__):
            raise type(self).error

        exists = isdir = cat_file = pipe_file = _open = open = info

    fsspec.register_implementation("broken", Broken, clobber=True)
    yield Broken
    _registry.pop("broken")


def names(files):
    return [file.uri.rsplit("/", 1)[1] for file in files]


def everything(uri):
    filesystem, path = storage._resolve(uri)
    return sorted(name.removeprefix(path).lstrip("/") for name in filesystem.find(path))


def test_join_puts_one_slash_between_the_parts():
    assert storage.join("a/b/", "c", "d.txt") == "a/b/c/d.txt"
    assert storage.join("memory://a", "b") == "memory://a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("memory://", "a") == "memory://a"


def test_list_files_searches_a_directory_through_in_order_without_hidden_and_foreign_files(root):
    for name in ("b.parquet", "a/z.parquet", "a/deep/er/y.parquet", "notes.txt", "_SUCCESS.parquet", ".b.parquet"):
        storage.write_bytes(storage.join(root, name), name.encode())
    for name in ("_temporary/c.parquet", ".hidden/c.parquet", "a/.tmp/c.parquet"):
        storage.write_bytes(storage.join(root, name), b"")

    files = storage.list_files(root, suffix=".parquet")

    assert names(files) == ["y.parquet", "z.parquet", "b.parquet"]
    assert [file.uri for file in files] == sorted(file.uri for file in files)
    assert [file.num_bytes for file in files] == [19, 11, 9]
    assert [storage.read_bytes(file.uri) for file in files] == [b"a/deep/er/y.parquet", b"a/z.parquet", b"b.parquet"]


def test_a_directory_that_is_itself_hidden_can_be_listed(tmp_path):
    storage.write_bytes(str(tmp_path / ".cache" / "_x" / "a.parquet"), b"")

    assert names(storage.list_files(str(tmp_path / ".cache" / "_x"), suffix=".parquet")) == ["a.parquet"]


def test_list_files_takes_one_file_whatever_its_name(root):
    storage.write_bytes(storage.join(root, "_data"), b"12345")

    (file,) = storage.list_files(storage.join(root, "_data"), suffix=".parquet")

    assert file.num_bytes == 5
    assert file.uri.endswith("/_data")


def test_list_files_takes_a_glob(root):
    for name in ("a-1.parquet", "a-2.parquet", "b-1.parquet", "deep/a-3.parquet"):
        storage.write_bytes(storage.join(root, name), b"")

    assert names(storage.list_files(storage.join(root, "a-*.parquet"), suffix=".parquet")) == [
        "a-1.parquet",
        "a-2.parquet",
    ]
    assert len(storage.list_files(storage.join(root, "**", "*.parquet"), suffix=".parquet")) == 4


def test_local_files_are_named_by_their_absolute_plain_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("corpus/a.parquet", b"")

    (file,) = storage.list_files("corpus", suffix=".parquet")

    assert file.uri == str(tmp_path / "corpus" / "a.parquet")
    assert storage.list_files(f"file://{tmp_path}/corpus", suffix=".parquet") == [file]
    assert storage.absolute("corpus") == str(tmp_path / "corpus")
    assert storage.absolute("memory://corpus") == storage.absolute("memory://corpus/") == "memory://corpus"


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    storage.write_bytes("~/a.txt", b"x")

    assert (tmp_path / "a.txt").read_bytes() == b"x"
    assert storage.absolute("~/a.txt") == str(tmp_path / "a.txt")


def test_symbolic_links_to_files_are_files(tmp_path):
    storage.write_bytes(str(tmp_path / "blobs" / "3f2a"), b"12345")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.parquet").symlink_to(tmp_path / "blobs" / "3f2a")

    (file,) = storage.list_files(str(tmp_path / "snapshot"), suffix=".parquet")

    assert file.uri == str(tmp_path / "snapshot" / "a.parquet")
    assert file.num_bytes == 5


@pytest.mark.parametrize("name", ["with space", "brackets [1]", "star * and ?", "percent %20", "hash #1", "ünïcödé"])
def test_a_directory_may_have_any_name(tmp_path, name):
    folder = str(tmp_path / name)
    uri = storage.join(folder, "a b.parquet")

    storage.write_parquet(uri, TABLE)

    assert [file.uri for file in storage.list_files(folder, suffix=".parquet")] == [uri]
    assert [file.uri for file in storage.list_files(uri, suffix=".parquet")] == [uri]
    assert storage.read_parquet(uri).equals(TABLE)
    with storage.open_parquet(uri) as parquet:
        assert parquet.read().equals(TABLE)


def test_a_version_changes_with_the_content_and_not_without(root):
    uri = storage.join(root, "a.parquet")
    storage.write_bytes(uri, b"one")
    (first,) = storage.list_files(uri, suffix=".parquet")
    (again,) = storage.list_files(root, suffix=".parquet")
    storage.write_bytes(uri, b"two")
    (same_size,) = storage.list_files(uri, suffix=".parquet")
    storage.write_bytes(uri, b"three")
    (longer,) = storage.list_files(uri, suffix=".parquet")

    assert first == again
    assert len({first.version, same_size.version, longer.version}) == 3


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"size": 3, "ETag": '"abc"', "LastModified": "now"}, "abc"),
        ({"size": 3, "md5Hash": "xyz=="}, "xyz=="),
        ({"size": 3, "LastModified": "2026-01-01"}, "3-2026-01-01"),
        ({"size": 3, "ETag": None, "mtime": 1.5}, "3-1.5"),
    ],
)
def test_a_version_is_the_entity_tag_where_there_is_one(info, expected):
    assert storage._version(info) == expected


def test_list_files_of_nothing(root):
    with pytest.raises(ConfigError, match="no such file, directory or glob"):
        storage.list_files(storage.join(root, "nowhere"), suffix=".parquet")
    with pytest.raises(ConfigError, match=r"no \.parquet files there"):
        storage.list_files(storage.join(root, "*.parquet"), suffix=".parquet")
    storage.write_bytes(storage.join(root, "a.txt"), b"")
    with pytest.raises(ConfigError, match=r": no \.parquet files there"):
        storage.list_files(root, suffix=".parquet")


def test_write_bytes_replaces_what_was_there_and_leaves_nothing_else(root):
    uri = storage.join(root, "deep", "a.bin")

    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new")

    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"new"
    assert everything(root) == ["deep/a.bin"]


def test_a_reader_of_the_old_object_keeps_it_while_it_is_replaced(tmp_path):
    uri = str(tmp_path / "a.bin")
    storage.write_bytes(uri, b"old and long")

    with open(uri, "rb") as reader:  # noqa: PTH123 - the same call as any reader's
        storage.write_bytes(uri, b"new")
        assert reader.read() == b"old and long"


def test_a_failed_write_leaves_the_old_object(tmp_path, monkeypatch):
    uri = str(tmp_path / "a.bin")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(ConfigError, match=r"cannot write .*a\.bin: No space left on device"):
        storage.write_bytes(uri, b"new")

    assert everything(str(tmp_path)) == ["a.bin"]
    assert storage.read_bytes(uri) == b"old"


def test_a_parquet_object_appears_when_the_block_ends(root):
    uri = storage.join(root, "deep", "t.parquet")

    with storage.parquet_writer(uri, TABLE.schema) as writer:
        writer.write_table(TABLE)
        writer.write_table(TABLE)
        assert not storage.exists(uri)
        assert [name for name in everything(root) if name.endswith(".parquet")] == []

    assert everything(root) == ["deep/t.parquet"]
    assert storage.read_parquet(uri).equals(pa.concat_tables([TABLE, TABLE]))
    assert storage.read_parquet(uri, columns=["word"]).column_names == ["word"]


@pytest.mark.parametrize("before", [None, b"an older object"])
def test_a_parquet_writer_that_raises_leaves_things_as_they_were(root, before):
    uri = storage.join(root, "t.parquet")
    if before is not None:
        storage.write_bytes(uri, before)

    def fail_half_way():
        with storage.parquet_writer(uri, TABLE.schema) as writer:
            writer.write_table(TABLE)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()

    assert everything(root) == ([] if before is None else ["t.parquet"])
    assert before is None or storage.read_bytes(uri) == before


def test_open_parquet_reads_the_columns_that_are_asked_for(root):
    uri = storage.join(root, "t.parquet")
    storage.write_parquet(uri, TABLE)

    with storage.open_parquet(uri) as parquet:
        assert parquet.schema_arrow.equals(TABLE.schema)
        assert parquet.read(columns=["number"]).to_pydict() == {"number": [1, 2, 3]}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text, not Parquet" * 100])
def test_what_is_not_parquet_is_named(root, content):
    uri = storage.join(root, "t.parquet")
    storage.write_bytes(uri, content)

    with pytest.raises(ConfigError, match=r"cannot read .*t\.parquet: not a Parquet file"), storage.open_parquet(uri):
        pass
    with pytest.raises(ConfigError, match=r"cannot read .*t\.parquet: not a Parquet file"):
        storage.read_parquet(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/data/a.parquet", {}),
        ("/data/label=01/split=a%20b/x.parquet", {"label": "01", "split": "a b"}),
        ("memory:///label=x=y/a=b.parquet", {"label": "x=y"}),
        ("/label=__HIVE_DEFAULT_PARTITION__/x.parquet", {"label": None}),
        ("/k=1/k=2/x.parquet", {"k": "2"}),
    ],
)
def test_hive_partitions_are_strings(uri, expected):
    assert storage.hive_partitions(uri) == expected


def test_put_directory_puts_the_named_file_last(root, tmp_path, monkeypatch):
    local = tmp_path / "local"
    for name in ("z.bin", "a/b.bin", "card.json", "a/card.json"):
        storage.write_bytes(str(local / name), name.encode())
    written = []
    write_bytes = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), write_bytes(uri, data)))

    storage.put_directory(local, root, last="card.json")

    assert written[-1] == storage.join(root, "card.json")
    assert everything(root) == ["a/b.bin", "a/card.json", "card.json", "z.bin"]
    assert storage.read_bytes(storage.join(root, "a", "b.bin")) == b"a/b.bin"


def test_local_directory_holds_the_same_files(root):
    for name in ("a.bin", "deep/b.bin"):
        storage.write_bytes(storage.join(root, name), name.encode())

    with storage.local_directory(root) as folder:
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.bin")}

    assert found == {"a.bin": b"a.bin", "deep/b.bin": b"deep/b.bin"}
    assert folder.exists() == ("://" not in root)
    assert storage.is_directory(root)
    assert not storage.is_directory(storage.join(root, "a.bin"))


def test_local_directory_that_is_not_there(root):
    with pytest.raises(ConfigError, match="no such directory"), storage.local_directory(root):
        pass


def test_check_writable_leaves_no_trace(root):
    storage.check_writable(storage.join(root, "out"))

    assert everything(root) == []


@pytest.mark.parametrize("root", ["local", "memory"], indirect=True)  # an object store has no folders
def test_an_output_below_a_file_cannot_be_written(root):
    storage.write_bytes(storage.join(root, "file"), b"")
    below = storage.join(root, "file", "out")

    with pytest.raises(ConfigError, match=r"out: cannot be written to"):
        storage.check_writable(below)
    with pytest.raises(ConfigError, match=r"cannot write .*t\.parquet"):
        storage.write_parquet(storage.join(below, "t.parquet"), TABLE)


def test_an_output_that_is_a_file_is_told_without_numbers_of_the_system(tmp_path):
    (tmp_path / "out").write_bytes(b"")

    with pytest.raises(ConfigError, match=r"out: cannot be written to \(File exists\)$"):
        storage.check_writable(str(tmp_path / "out"))


def test_missing_objects_are_named(root):
    uri = storage.join(root, "gone.bin")

    for read in (storage.read_bytes, storage.read_parquet):
        with pytest.raises(ConfigError, match=r"cannot read .*gone\.bin: no such file or directory"):
            read(uri)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ConfigError, match="nope://bucket/x: Protocol not known: nope"):
        storage.list_files("nope://bucket/x", suffix=".parquet")
    with pytest.raises(ConfigError, match="Protocol not known"):
        storage.check_writable("nope://bucket/x")
    with pytest.raises(ConfigError, match="Protocol not known"):
        storage.absolute("nope://bucket/x")


@pytest.mark.parametrize("uri", ["", " ", "s3://", "s3:///", "file://"])
def test_an_address_of_no_place_is_refused(uri):
    for call in (storage.absolute, storage.exists, storage.check_writable, storage.read_bytes):
        with pytest.raises(ConfigError, match=f"^{uri!r}: names no place; give a path, or a URL with a bucket$"):
            call(uri)
    with pytest.raises(ConfigError, match="names no place"):
        storage.list_files(uri, suffix=".parquet")


@pytest.mark.parametrize("path", ["corpus/../x", "..", "a/./b", "../../x"])
def test_a_path_of_an_object_store_goes_nowhere_else(path):
    for call in (storage.absolute, storage.exists, storage.check_writable, storage.read_bytes):
        with pytest.raises(ConfigError, match=r"^s3://bucket/.*: '\.' and '\.\.' lead nowhere in an object store"):
            call(f"s3://bucket/{path}")


def test_slashes_at_the_end_of_a_place_are_no_part_of_its_name():
    assert storage.absolute("s3://bucket/a/b//") == "s3://bucket/a/b"


@pytest.mark.parametrize("path", ["a//b", "//a"])
def test_a_name_of_an_object_store_is_not_empty(path):
    for call in (storage.absolute, storage.exists, storage.check_writable, storage.read_bytes):
        with pytest.raises(ConfigError, match=r"^s3://bucket/.*: two slashes in a row lead nowhere in an object store"):
            call(f"s3://bucket/{path}")


def test_a_protocol_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(known_implementations, "absent", {"class": "absent_fs.Fs", "err": "Install absent_fs"})

    with pytest.raises(ConfigError, match="absent://bucket/x: Install absent_fs"):
        storage.exists("absent://bucket/x")


@pytest.mark.parametrize("error", [ConnectionResetError("peer went away"), TimeoutError()])
def test_a_dropped_connection_is_worth_a_retry(broken, error):
    broken.error = error
    message = str(error) or "TimeoutError"

    for call in (
        lambda: storage.exists("broken://x"),
        lambda: storage.read_bytes("broken://x"),
        lambda: storage.write_bytes("broken://x", b""),
        lambda: storage.list_files("broken://x", suffix=".parquet"),
        lambda: storage.read_parquet("broken://x"),
    ):
        with pytest.raises(TransientError, match=f"cannot .*broken://x: {message}"):
            call()


def test_other_failures_of_a_store_are_not_retried(broken):
    broken.error = PermissionError(13, "Permission denied")

    with pytest.raises(ConfigError, match="cannot read broken://x: Permission denied"):
        storage.read_bytes("broken://x")


def test_digests_depend_on_names_and_contents(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    digest = storage.sha256_of_files(tmp_path, ["a", "b"])

    assert digest == storage.sha256_of_files(tmp_path, ["b", "a"])
    assert digest != storage.sha256_of_files(tmp_path, ["c", "b"])
    (tmp_path / "b").write_bytes(b"3")
    assert digest != storage.sha256_of_files(tmp_path, ["a", "b"])
    assert storage.sha256_of_file(tmp_path / "a") == (
        "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    )


def test_written_parquet_is_plain_parquet(tmp_path):
    storage.write_parquet(str(tmp_path / "t.parquet"), TABLE)

    assert pq.read_table(tmp_path / "t.parquet").equals(TABLE)


@contextmanager
def no_room() -> Iterator[None]:
    """This process's files cannot grow beyond some bytes, as on a disk that is full; its log's neither."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NOISE = pa.table({"key": [os.urandom(16).hex() for _ in range(10_000)]})


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    uri = str(tmp_path / "out" / "a.parquet")

    with no_room(), pytest.raises(ConfigError, match=f"cannot write {uri}: File too large"):
        storage.write_parquet(uri, NOISE)

    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: storage.write_parquet("s3://bucket/a", NOISE), "write s3://bucket/a, by a temporary file"),
        (lambda: write_unsorted("s3://bucket/a"), "write a temporary file"),
    ],
)
def test_a_full_temporary_directory_is_named(tmp_path, monkeypatch, write, words):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with no_room(), pytest.raises(ConfigError, match=f"cannot {words} in {tmp_path}: File too large"):
        write()

    assert list(tmp_path.iterdir()) == []


def write_unsorted(uri: str) -> None:
    with sorted_files.sorted_writer(uri, NOISE.schema, by=["key"]) as writer:
        writer.write_table(NOISE)
