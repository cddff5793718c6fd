"""Watching a corpus: whether its files are those of the last look, without reading them.

SEEN_URI/CORPUS.json    the last version that somebody was told of, or the first
"""

from belt_tasks import inventory, publishing, storage
from belt_tasks.specs import CorpusSpec, Spec
from belt_tasks.stored import read_json


class CorpusVersion(Spec):
    """What a corpus consists of at a moment."""

    corpus_uri: str
    data_version: str
    """16 hex digits: the same files in the same versions have the same."""
    num_files: int
    number: int
    """How many versions were seen before it, one that came back as often as it did."""
    is_new: bool
    """Whether it differs from the last one that was seen."""
    seen_uri: str
    """Where the last one is noted."""

    @property
    def is_first(self) -> bool:
        """Whether there is nothing that it could differ from."""
        return self.number == 0


class _Seen(Spec):
    """The last version that was seen."""

    corpus_uri: str
    data_version: str
    number: int


def look_at(corpus_uri: str, seen_uri: str, corpus: CorpusSpec) -> CorpusVersion:
    """List a corpus.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        seen_uri: directory for what was seen.
        corpus: columns and split.

    Raises:
        ConfigError: there is no such corpus, or it has no files; or what was noted of it cannot be read.
    """
    files = storage.list_files(corpus_uri, suffix=".parquet")
    keys = sorted(inventory.key_of(file, corpus) for file in files)
    data_version = publishing.digest_of(corpus_uri=corpus_uri, keys=keys)
    noted_uri = storage.join(seen_uri, f"{publishing.digest_of(corpus_uri=corpus_uri)}.json")
    last = read_json(noted_uri, _Seen, "what was seen of a corpus") if storage.exists(noted_uri) else None
    is_new = last is None or last.data_version != data_version
    number = 0 if last is None else last.number + is_new
    return CorpusVersion(
        corpus_uri=corpus_uri,
        data_version=data_version,
        num_files=len(files),
        number=number,
        is_new=is_new,
        seen_uri=noted_uri,
    )


def remember(version: CorpusVersion) -> None:
    """Note that somebody was told of a version."""
    seen = _Seen(corpus_uri=version.corpus_uri, data_version=version.data_version, number=version.number)
    storage.write_bytes(version.seen_uri, (seen.model_dump_json() + "\n").encode())
