"""Watching a corpus: whether its files are those of the last look, without reading them.

SEEN_URI/CORPUS/CORPUS_VERSION.json    this version has been told of, or was the first
"""

import json

from belt_tasks import inventory, publishing, storage
from belt_tasks.specs import CorpusSpec, Spec


class CorpusVersion(Spec):
    """What a corpus consists of at a moment."""

    corpus_uri: str
    data_version: str
    """16 hex digits: the same files in the same versions have the same."""
    num_files: int
    is_first: bool
    """Whether no version of the corpus was seen before it: there is nothing that it could differ from."""
    is_new: bool
    """Whether nobody was told of it yet."""
    seen_uri: str
    """Whose presence means that somebody was."""


def look_at(corpus_uri: str, seen_uri: str, corpus: CorpusSpec) -> CorpusVersion:
    """List a corpus.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        seen_uri: directory for what was seen.
        corpus: columns and split.

    Raises:
        ConfigError: there is no such corpus, or it has no files.
    """
    files = storage.list_files(corpus_uri, suffix=".parquet")
    keys = sorted(inventory.key_of(file, corpus) for file in files)
    data_version = publishing.digest_of(corpus_uri=corpus_uri, keys=keys)
    folder_uri = storage.join(seen_uri, publishing.digest_of(corpus_uri=corpus_uri))
    marker_uri = storage.join(folder_uri, f"{data_version}.json")
    return CorpusVersion(
        corpus_uri=corpus_uri,
        data_version=data_version,
        num_files=len(files),
        is_first=not storage.is_directory(folder_uri),
        is_new=not storage.exists(marker_uri),
        seen_uri=marker_uri,
    )


def remember(version: CorpusVersion) -> None:
    """Note that somebody was told of a version."""
    told = {"corpus_uri": version.corpus_uri, "num_files": version.num_files}
    storage.write_bytes(version.seen_uri, (json.dumps(told) + "\n").encode())
