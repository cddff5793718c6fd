"""Watching a corpus: a version is new once, and any change of its files makes another."""

import pytest

from belt_tasks import watch
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
    known = first.model_copy(update={"is_first": False, "is_new": False})
    assert watch.look_at(corpus, output, CorpusSpec()) == known


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
