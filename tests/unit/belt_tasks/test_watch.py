"""Watching a corpus: a version is new once, and any change of its files makes another."""

import shutil

import pytest

from belt_tasks import storage, watch
from belt_tasks.errors import ConfigError
from belt_tasks.specs import CorpusSpec
from tests.conftest import labelled_rows


def test_a_version_is_new_until_it_is_remembered(write_corpus, output):
    corpus = write_corpus(labelled_rows(4), num_files=2)
    first = watch.look_at(corpus, output, CorpusSpec())
    again = watch.look_at(corpus, output, CorpusSpec())
    watch.remember(first)

    assert first == again
    assert (first.is_first, first.is_new, first.num_files) == (True, True, 2)
    assert watch.look_at(corpus, output, CorpusSpec()) == first.model_copy(update={"is_new": False})


def test_a_version_that_comes_back_is_new_again(write_corpus, output, tmp_path):
    """Somebody mended what had been delivered, byte for byte: whoever learned from it has to know."""
    corpus, seen = write_corpus(labelled_rows(4)), f"{output}/seen"
    shutil.copytree(corpus, tmp_path / "kept")
    numbers = []
    for source in (None, labelled_rows(4, seed=1), None, None):
        if source is not None:
            write_corpus(source)
        elif numbers:
            shutil.copytree(tmp_path / "kept", corpus, dirs_exist_ok=True)
        version = watch.look_at(corpus, seen, CorpusSpec())
        numbers.append((version.number, version.is_new))
        watch.remember(version)

    assert numbers == [(0, True), (1, True), (2, True), (2, False)]


def test_what_was_noted_and_cannot_be_read_is_told(write_corpus, output):
    corpus = write_corpus(labelled_rows(4))
    storage.write_bytes(watch.look_at(corpus, output, CorpusSpec()).seen_uri, b"{")

    with pytest.raises(ConfigError, match="what was seen of a corpus"):
        watch.look_at(corpus, output, CorpusSpec())


def test_other_labels_another_file_or_another_split_are_another_version(write_corpus, tmp_path):
    rows = labelled_rows(4)
    corpus = write_corpus(rows)
    seen = str(tmp_path / "seen")
    versions = [watch.look_at(corpus, seen, CorpusSpec())]
    versions.append(watch.look_at(corpus, seen, CorpusSpec(split_column="split", split="train")))
    write_corpus(rows.with_columns(label=rows["label"].reverse()))
    versions.append(watch.look_at(corpus, seen, CorpusSpec()))
    write_corpus(rows, num_files=2)
    versions.append(watch.look_at(corpus, seen, CorpusSpec()))

    assert len({version.data_version for version in versions}) == 4


def test_a_corpus_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file, directory or glob"):
        watch.look_at(str(tmp_path / "nowhere"), str(tmp_path / "seen"), CorpusSpec())
