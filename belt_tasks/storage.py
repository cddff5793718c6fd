"""Storage: the only module that opens URLs. Whatever fsspec reads and writes, belt does.

An object appears whole or not at all: it is written to memory or a temporary file, then put in one step.
Nothing here knows what a table means.
"""

import glob
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from obstore.exceptions import BaseError

from belt_tasks import local_files, object_stores
from belt_tasks.errors import ConfigError, TransientError
from belt_tasks.object_stores import ObjectFileSystem
from belt_tasks.threads import Threads

NUM_THREADS = 8
READ_BUFFER_BYTES = 2**20
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One existing object. `version` changes when its content does: its entity tag, or size and time of change."""

    uri: str
    num_bytes: int
    version: str
    changed_at: datetime
    """By the store's clock."""


@contextmanager
def errors_of(action: str) -> Iterator[None]:
    """Say what failed, and whether a retry can help.

    Raises:
        ConfigError: a person has to mend it.
        TransientError: the same may succeed later.
    """
    try:
        yield
    except (ConnectionError, TimeoutError, object_stores.ChangedError) as error:
        raise TransientError(f"cannot {action}: {str(error) or type(error).__name__}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"cannot {action}: no such file or directory") from error
    except OSError as error:
        raise ConfigError(f"cannot {action}: {error.strerror or error}") from error
    except BaseError as error:
        raise object_stores.error_of(error, action) from None  # its own words are a page
    except pa.ArrowInvalid as error:
        raise ConfigError(f"cannot {action}: not a Parquet file ({error})") from error


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.removesuffix("/") if uri.endswith("://") else uri.rstrip("/"), *parts])


def list_files(uri: str, *, suffix: str, hidden: bool = False) -> list[StoredFile]:
    """The files that a path, a directory (searched through) or a glob stands for, sorted by URI.

    Names that begin with a dot or an underscore, as temporary files and markers do, are left out of directories unless
    they are asked for.

    Raises:
        ConfigError: there is nothing, or it cannot be read.
    """
    files = files_under(uri, suffix=suffix, hidden=hidden)
    if files is None:
        raise ConfigError(f"{uri}: no such file, directory or glob")
    if not files:
        raise ConfigError(f"{uri}: no {suffix} files there")
    return files


def files_under(uri: str, *, suffix: str = "", hidden: bool = False) -> list[StoredFile] | None:
    """As `list_files`, but nothing is no error: None where there is no such place.

    Raises:
        ConfigError: it cannot be read.
    """
    with errors_of(f"list {uri}"):
        filesystem, path = _resolve(uri)
        if glob.has_magic(path) and not filesystem.exists(path):
            found = filesystem.glob(path, detail=True)
        elif filesystem.isdir(path):
            found = {
                name: info
                for name, info in filesystem.find(path, detail=True).items()
                if name.endswith(suffix) and (hidden or not _is_hidden(name.removeprefix(path)))
            }
        elif filesystem.exists(path):
            found = {path: filesystem.info(path)}
        else:
            return None
    return [_stored_file(name, info, filesystem) for name, info in sorted(found.items()) if info["type"] != "directory"]


def stored_file(uri: str) -> StoredFile | None:
    """An object as it is now, in the words of a listing; None where it is gone.

    None of other stores than local disks and S3 too: whether they word it as in a listing has not been seen.
    """
    filesystem, path = _resolve(uri)
    protocol, _ = fsspec.core.split_protocol(uri)
    if not isinstance(filesystem, LocalFileSystem) and object_stores.FAMILIES.get(protocol) != "s3":
        return None
    with errors_of(f"look for {uri}"), suppress(FileNotFoundError):
        return _stored_file(path, filesystem.info(path), filesystem)
    return None


def exists(uri: str) -> bool:
    """Whether an object is there."""
    with errors_of(f"look for {uri}"):
        filesystem, path = _resolve(uri)
        return bool(filesystem.exists(path))


def num_bytes(uri: str) -> int:
    """The size of an object."""
    with errors_of(f"look for {uri}"):
        filesystem, path = _resolve(uri)
        return int(filesystem.size(path))


def read_bytes(uri: str) -> bytes:
    """A whole object; for small ones."""
    with errors_of(f"read {uri}"):
        filesystem, path = _resolve(uri)
        return bytes(filesystem.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Put a whole object, replacing what was there; readers see the old one or the new one."""
    with errors_of(f"write {uri}"):
        filesystem, path = _resolve(uri)
        if isinstance(filesystem, LocalFileSystem):
            with local_files.replacement(Path(path)) as temporary:
                temporary.write_bytes(data)
        else:
            filesystem.pipe_file(path, data)


def signed_url(uri: str, valid_for: timedelta) -> str | None:
    """An address under which a browser gets an object without credentials; None of what is not in an object store.

    Raises:
        ConfigError: the store's configuration has nothing to sign with.
    """
    with errors_of(f"sign an address of {uri}"):
        filesystem, path = _resolve(uri)
        return filesystem.signed_url(path, valid_for) if isinstance(filesystem, ObjectFileSystem) else None


def create_bytes(uri: str, data: bytes) -> bool:
    """Put a whole object where none is; of many who try at once, one succeeds.

    Returns:
        Whether the object that is there now is this one. It is also where it holds these very bytes: the answer to an
        earlier put may have been lost. Whoever has to tell writers apart says in the bytes who writes.

    Raises:
        ConfigError: the store does not promise that one succeeds; local disks and belt's object stores do.
        TransientError: the store did not answer, and the object is not there; it may appear later.
    """
    try:
        with errors_of(f"write {uri}"):
            filesystem, path = _resolve(uri)
            if isinstance(filesystem, LocalFileSystem):
                created = local_files.create(Path(path), data)
            else:
                created = _create_remote(filesystem, path, data)
    except TransientError:
        if not exists(uri):
            raise
        created = False
    return created or read_bytes(uri) == data


@contextmanager
def parquet_writer(
    uri: str, schema: pa.Schema, *, sorting: Sequence[pq.SortingColumn] = ()
) -> Iterator[pq.ParquetWriter]:
    """A writer whose object appears when the block ends well, and never when it raises.

    Args:
        uri: the object.
        schema: of its rows.
        sorting: what the rows are sorted by, for readers to know.

    Raises:
        ConfigError: it cannot be written there.
    """
    filesystem, path = _resolve(uri)
    local = isinstance(filesystem, LocalFileSystem)
    action = f"write {uri}" if local else f"write {uri}, by a temporary file in {tempfile.gettempdir()}"
    with ExitStack() as outer:
        with errors_of(action):
            folder = "" if local else outer.enter_context(tempfile.TemporaryDirectory())
            target = Path(path) if local else Path(folder) / "table.parquet"
            inner = outer.enter_context(ExitStack())
            temporary = inner.enter_context(local_files.replacement(target))
            writer = inner.enter_context(
                _Writer(temporary, schema, action=action, sorting_columns=list(sorting) or None)
            )
        yield writer
        with errors_of(action):
            inner.close()
        if not local:
            with errors_of(f"write {uri}"):
                filesystem.put_file(str(target), path)


@contextmanager
def scratch_writer(schema: pa.Schema) -> Iterator[tuple[pq.ParquetWriter, Path]]:
    """A writer to a local file, and the file, to be read after the writer is closed; it goes when the block ends.

    Raises:
        ConfigError: there is no room.
    """
    action = f"write a temporary file in {tempfile.gettempdir()}"
    with ExitStack() as stack:
        with errors_of(action):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "table.parquet"
            writer = stack.enter_context(_Writer(path, schema, action=action, compression="none"))
        yield writer, path


class _Writer(pq.ParquetWriter):  # type: ignore[misc]
    """Says what failed where there is no room."""

    def __init__(self, path: Path, schema: pa.Schema, *, action: str, compression: str = "zstd", **more: Any) -> None:  # noqa: ANN401 - pyarrow's
        self._action = action
        super().__init__(path, schema, compression=compression, **more)

    def write_table(self, table: pa.Table, row_group_size: int | None = None) -> None:
        with self._errors():
            super().write_table(table, row_group_size)

    def close(self) -> None:
        with self._errors():
            super().close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_open = False  # what cannot be written need not be ended
            raise ConfigError(f"cannot {self._action}: {os.strerror(error.errno) if error.errno else error}") from error


@contextmanager
def staged_file(folder_uri: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A local file to write, and what gives it a name in a directory when it is whole; it goes when the block ends.

    Raises:
        ConfigError: there is no room, or it cannot be written there.
    """
    filesystem, path = _resolve(folder_uri)
    is_local = isinstance(filesystem, LocalFileSystem)
    place = folder_uri if is_local else f"a temporary file in {tempfile.gettempdir()}"
    with ExitStack() as stack:
        with errors_of(f"write {place}"):
            folder = Path(path) if is_local else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            temporary = stack.enter_context(local_files.temporary_beside(folder / "staged"))

        def put(name: str) -> None:
            with errors_of(f"write {join(folder_uri, name)}"):
                if is_local:
                    local_files.sync(temporary)
                    temporary.replace(folder / name)
                else:
                    filesystem.put_file(str(temporary), f"{path.rstrip('/')}/{name}")

        with errors_of(f"write {place}"):
            yield temporary, put


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """An object as a local file: itself where it is local, otherwise a copy that goes when the block ends.

    Raises:
        ConfigError: there is no such object.
    """
    filesystem, path = _resolve(uri)
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        with errors_of(f"read {uri}"):
            filesystem.get_file(path, str(target))
        yield target


def write_parquet(uri: str, table: pa.Table) -> None:
    """Put a table as one Parquet object."""
    with parquet_writer(uri, table.schema) as writer:
        writer.write_table(table)


def read_parquet(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet object; for tables that belt wrote and whose size it chose."""
    with errors_of(f"read {uri}"):
        filesystem, path = _resolve(uri)
        with filesystem.open(path, "rb") as file:
            return pq.ParquetFile(file).read(columns=columns)


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from, page by page: a row group is never whole in memory.

    Raises:
        ConfigError: it is not a Parquet file, or cannot be opened.
    """
    with ExitStack() as stack:
        with errors_of(f"read {uri}"):
            filesystem, path = _resolve(uri)
            local = isinstance(filesystem, LocalFileSystem)
            source = stack.enter_context(pa.OSFile(path) if local else filesystem.open(path, "rb"))
            file = stack.enter_context(pq.ParquetFile(source, buffer_size=READ_BUFFER_BYTES, pre_buffer=False))
        yield file


def hive_partitions(uri: str) -> dict[str, str | None]:
    """The columns that a file's directories stand for (`.../key=value/...`), as strings: 01 stays 01."""
    parts = [folder.partition("=") for folder in uri.split("/")[:-1] if "=" in folder]
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, _, value in parts}


def remove_files(uris: Sequence[str]) -> None:
    """Remove objects; those that are gone already are no error."""
    with Threads(NUM_THREADS) as threads:
        list(threads.map(_remove, uris))


def _remove(uri: str) -> None:
    with errors_of(f"remove {uri}"), suppress(FileNotFoundError):
        filesystem, path = _resolve(uri)
        filesystem.rm_file(path)


def remove_empty_directories(uris: Sequence[str]) -> None:
    """Remove local directories in order, those that are there and empty; stores have none."""
    for uri in uris:
        filesystem, path = _resolve(uri)
        if isinstance(filesystem, LocalFileSystem):
            with suppress(OSError):
                Path(path).rmdir()


def put_directory(local: Path, uri: str, *, last: str, names: Sequence[str] | None = None) -> None:
    """Copy a local directory; the file named `last` goes last, so that its presence means that all is there.

    Args:
        local: the directory.
        uri: where to.
        last: the file that goes last, if there is one of that name.
        names: of the files to copy; None is all of them, with those of folders.
    """
    chosen = local.rglob("*") if names is None else (local / name for name in names)
    files = sorted(path for path in chosen if path.is_file())
    files.sort(key=lambda path: path.relative_to(local).as_posix() == last)
    for path in files:
        write_bytes(join(uri, path.relative_to(local).as_posix()), path.read_bytes())


@contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """A directory as local files: itself where it is local, otherwise a copy that goes when the block ends.

    Raises:
        ConfigError: there is no such directory.
    """
    with errors_of(f"read {uri}"):
        filesystem, path = _resolve(uri)
        if not filesystem.isdir(path):
            raise ConfigError(f"{uri}: no such directory")
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        with errors_of(f"read {uri}"):
            for name in filesystem.find(path):
                target = Path(folder) / name.removeprefix(path).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(target))
        yield Path(folder)


def is_directory(uri: str) -> bool:
    """Whether a URI is an existing directory (or prefix)."""
    with errors_of(f"look for {uri}"):
        filesystem, path = _resolve(uri)
        return bool(filesystem.isdir(path))


def absolute(uri: str) -> str:
    """The same place by its one name, independent of the working directory of whoever reads it later."""
    filesystem, path = _resolve(uri)
    return path if isinstance(filesystem, LocalFileSystem) else join(uri)


def is_local(uri: str) -> bool:
    """Whether a place is a path of this machine."""
    return fsspec.core.split_protocol(uri)[0] in (None, "file")


def delta_options(uri: str) -> dict[str, str]:
    """The configuration of a URI's store as Delta Lake takes it; the environment it reads itself.

    Raises:
        ConfigError: Delta Lake has no such store.
    """
    protocol, _ = fsspec.core.split_protocol(uri)
    if is_local(uri):
        return {}
    if protocol not in object_stores.FAMILIES:
        known = ", ".join(sorted(set(object_stores.FAMILIES.values())))
        raise ConfigError(f"{uri}: tables are published to local paths and to {known}, got {protocol}://")
    return object_stores.delta_options(protocol)


def check_writable(uri: str) -> None:
    """Put and remove a small object under a prefix, so that a wrong output is known before work starts.

    Raises:
        ConfigError: it cannot be written.
    """
    _resolve(uri)  # before a name is added to what may be none
    probe = join(uri, f".belt-probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
    except ConfigError as error:
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__ or error
        raise ConfigError(f"{uri}: cannot be written to ({reason})") from error
    with errors_of(f"write to {uri}"):
        filesystem, path = _resolve(probe)
        filesystem.rm_file(path)


def sha256_of_files(folder: Path, names: list[str]) -> str:
    """One digest over the names and contents of local files."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{sha256_of_file(folder / name)}\n".encode())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """64 hex digits over a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    protocol, path = fsspec.core.split_protocol(uri)
    if not path.strip() or (protocol in object_stores.FAMILIES and not path.strip("/")):
        raise ConfigError(f"{uri!r}: names no place; give a path, or a URL with a bucket")
    if protocol in object_stores.FAMILIES:
        if {".", ".."} & set(path.split("/")):
            raise ConfigError(f"{uri}: '.' and '..' lead nowhere in an object store; write the path without them")
        if "//" in path.strip("/"):
            raise ConfigError(f"{uri}: two slashes in a row lead nowhere in an object store; write one")
        return object_stores.filesystem(protocol), path.rstrip("/")
    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(uri))  # noqa: PTH111 - a URI, not yet a path
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{uri}: {error}") from error
    # one spelling of a local path, so that it is one shard and one run
    return filesystem, os.path.normpath(path) if isinstance(filesystem, LocalFileSystem) else str(path)


def _version(info: dict[str, Any]) -> str:
    for key in ("e_tag", "ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')  # some stores quote it in one answer and not in the other
    changed = _changed(info)
    # one store may say the same time as a number or a date
    return f"{info['size']}-{changed.timestamp() if isinstance(changed, datetime) else changed}"


def _changed(info: dict[str, Any]) -> Any:  # noqa: ANN401 - as the store says it
    return next((info[key] for key in ("mtime", "LastModified", "last_modified", "created") if info.get(key)), None)


def _changed_at(info: dict[str, Any]) -> datetime:
    """Now, where the store does not say when."""
    changed = _changed(info)
    if isinstance(changed, datetime):
        return changed
    return datetime.fromtimestamp(changed, UTC) if isinstance(changed, (int, float)) else datetime.now(UTC)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def _stored_file(name: str, info: dict[str, Any], filesystem: fsspec.AbstractFileSystem) -> StoredFile:
    uri = filesystem.unstrip_protocol(name)
    if isinstance(filesystem, LocalFileSystem):  # by its plain path, which every Parquet reader takes
        uri = uri.removeprefix("file://")
    return StoredFile(uri=uri, num_bytes=info["size"], version=_version(info), changed_at=_changed_at(info))


def _create_remote(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> bool:
    if not isinstance(filesystem, ObjectFileSystem):  # fsspec's own looks first and then writes
        families = ", ".join(sorted(set(object_stores.FAMILIES.values())))
        raise ConfigError(
            f"{filesystem.unstrip_protocol(path)}: where two may write at once, one has to win: choose a local path or "
            f"one of {families}"
        )
    try:
        filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True
