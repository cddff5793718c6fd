"""The flow that watches a corpus: one event for each version, which whoever retrains waits for."""

import shutil

from prefect.client.orchestration import SyncPrefectClient

from flows import events
from flows import watch as watching
from flows.watch import watch
from tests.conftest import labelled_rows
from tests.flows.conftest import events_of


def told_of(client, corpus: str, *, at_least: int) -> list:
    return events_of(client, events.LABELS, events.corpus_resource_id(corpus), at_least=at_least)


def test_each_version_of_a_corpus_but_the_first_is_told_of_once(write_corpus, tmp_path, client):
    seen = str(tmp_path / "seen")
    other = write_corpus(labelled_rows(2), name="other")
    corpus = write_corpus(labelled_rows(4))
    versions = [watch(other, seen), watch(corpus, seen), watch(corpus, seen)]
    for seed in (1, 2):
        write_corpus(labelled_rows(4, seed=seed))
        versions += [watch(corpus, seen), watch(corpus, seen)]

    assert [version.number for version in versions] == [0, 0, 0, 1, 1, 2, 2]
    assert [version.is_new for version in versions] == [True, True, False, True, False, True, False]
    told = [event.payload["data_version"] for event in told_of(client, corpus, at_least=2)]
    assert sorted(told) == sorted([versions[3].data_version, versions[5].data_version])
    assert told_of(client, other, at_least=0) == []


def test_whoever_was_cut_off_before_it_was_noted_tells_again(write_corpus, tmp_path, client, monkeypatch):
    corpus, seen = write_corpus(labelled_rows(4)), str(tmp_path / "seen")
    watch(corpus, seen)
    write_corpus(labelled_rows(4, seed=1))

    def cut_off(_version: object) -> None:
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(watching.tasks, "remember", cut_off)
        assert watch(corpus, seen, return_state=True).is_failed()

    assert watch(corpus, seen).is_new
    assert len(told_of(client, corpus, at_least=1)) == 1  # the second has the id of the first


def test_a_version_that_the_server_was_not_told_of_is_not_noted(write_corpus, tmp_path, client, monkeypatch):
    """Prefect's own way to emit an event would lose it in silence."""
    corpus, seen = write_corpus(labelled_rows(4)), str(tmp_path / "seen")
    watch(corpus, seen)
    write_corpus(labelled_rows(4, seed=1))

    def unreachable(**_):
        return SyncPrefectClient("http://127.0.0.1:9/api")

    with monkeypatch.context() as patch:
        patch.setattr(events, "get_client", unreachable)
        state = watch(corpus, seen, return_state=True)
    assert state.is_failed()
    assert "the Prefect server was not told of belt.labels" in state.message
    assert told_of(client, corpus, at_least=0) == []

    assert watch(corpus, seen).is_new
    assert len(told_of(client, corpus, at_least=1)) == 1


def test_labels_that_are_put_back_are_told_of(write_corpus, tmp_path, client):
    corpus, seen = write_corpus(labelled_rows(4)), str(tmp_path / "seen")
    shutil.copytree(corpus, tmp_path / "kept")
    watch(corpus, seen)
    for _ in range(2):
        write_corpus(labelled_rows(4, seed=1))
        watch(corpus, seen)
        shutil.copytree(tmp_path / "kept", corpus, dirs_exist_ok=True)
        watch(corpus, seen)

    told = [event.payload["data_version"] for event in told_of(client, corpus, at_least=4)]
    assert len(told) == 4
    assert watch(corpus, seen).data_version in told
