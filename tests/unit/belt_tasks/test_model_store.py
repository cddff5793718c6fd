"""The model store: what is copied is what was there, once, whole or not at all, whoever is killed meanwhile."""

import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from belt_tasks import checkpoint as checkpoints
from belt_tasks import model_store, registry, storage
from belt_tasks.errors import ConfigError
from tests.conftest import BERT_NAMES, SIZES, save_tiny_checkpoint, wordpiece_tokenizer

LABELS = ("ham", "other", "spam")


@pytest.fixture(scope="module")
def forks():
    """Processes that have imported everything already."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    yield processes
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture
def own(tiny_encoder, tmp_path) -> str:
    """A checkpoint that a test may break."""
    return save_tiny_checkpoint(tmp_path / "own", tiny_encoder, LABELS)


@pytest.fixture
def finished(tmp_path) -> str:
    """A finished Hugging Face classifier, with files beside it that are not part of it."""
    config = BertConfig(vocab_size=500, max_position_embeddings=64, id2label={0: "ham", 1: "spam"}, **SIZES)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "finished")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece_tokenizer(), **BERT_NAMES)
    tokenizer.save_pretrained(tmp_path / "finished")
    (tmp_path / "finished" / "onnx").mkdir()
    (tmp_path / "finished" / "onnx" / "model.onnx").write_bytes(b"another format")
    (tmp_path / "finished" / ".gitattributes").write_bytes(b"")
    return str(tmp_path / "finished")


def contents(folder: str) -> dict[str, bytes]:
    files = storage.list_files(folder, suffix="")
    return {file.uri.removeprefix(folder): storage.read_bytes(file.uri) for file in files}


def test_what_is_copied_is_what_was_there(tiny_checkpoint, output):
    record = model_store.add(output, tiny_checkpoint, who="ann")

    copy = registry.checkpoint_uri(output, record.digest)
    assert contents(copy) == contents(tiny_checkpoint)
    assert record.digest == checkpoints.checkpoint_digest(tiny_checkpoint)
    assert (record.who, record.source_uri, record.head.labels) == ("ann", tiny_checkpoint, LABELS)
    assert model_store.find(output, record.digest) == record
    assert checkpoints.load_checkpoint(copy).digest == record.digest


def test_a_finished_classifier_is_copied_without_what_is_not_part_of_it(finished, output):
    record = model_store.add(output, finished, who="ann")

    copy = registry.checkpoint_uri(output, record.digest)
    names = {name.strip("/") for name in contents(copy)}
    assert names == {path.name for path in Path(finished).iterdir() if path.is_file()} - {".gitattributes"}
    assert checkpoints.load_checkpoint(copy).digest == record.digest == checkpoints.checkpoint_digest(finished)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"])
def test_pickles_beside_the_weights_are_nobodys(own, output, name):
    record = model_store.add(output, own, who="ann")
    Path(own, name).write_bytes(b"\x80\x04N.")

    assert model_store.add(output, own, who="bob") == record
    copied = storage.list_files(registry.checkpoint_uri(output, record.digest), suffix="")
    assert name not in {file.uri.rpartition("/")[2] for file in copied}


def test_the_same_checkpoint_is_added_once(tiny_checkpoint, own, output, monkeypatch):
    first = model_store.add(output, tiny_checkpoint, who="ann")
    before = contents(output)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(storage, "create_bytes", lambda *_: pytest.fail("written again"))

    again = [model_store.add(output, uri, who="bob") for uri in (own, registry.checkpoint_uri(output, first.digest))]

    assert again == [first, first]
    assert contents(output) == before


def test_many_who_add_the_same_at_once_find_the_same(tiny_checkpoint, output):
    barrier = threading.Barrier(4)

    def add(who):
        barrier.wait()
        return model_store.add(output, tiny_checkpoint, who=who)

    with ThreadPoolExecutor(4) as threads:
        records = list(threads.map(add, "abcd"))

    assert records == [records[0]] * 4
    assert model_store.list_models(output).models == (records[0],)
    model_store.check(output, records[0].digest)


def test_the_card_goes_last_and_the_record_after_it(tiny_checkpoint, tmp_path, monkeypatch):
    written, write, create = [], storage.write_bytes, storage.create_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), write(uri, data))[1])
    monkeypatch.setattr(storage, "create_bytes", lambda uri, data: (written.append(uri), create(uri, data))[1])

    record = model_store.add(str(tmp_path / "registry"), tiny_checkpoint, who="ann")

    assert [Path(uri).name for uri in written[-2:]] == ["belt.json", f"{record.digest}.json"]
    assert len(written) == len(list(Path(tiny_checkpoint).iterdir())) + 1


def add_and_die(uri: str, checkpoint_uri: str, number: int, *, before: bool) -> None:
    """Add and make it the champion; kill oneself before or after a write."""
    made = 0

    def dying(write):
        def do(*arguments):
            nonlocal made
            made += 1
            chosen = made == number
            if chosen and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*arguments)
            if chosen:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return do

    storage.write_bytes = dying(storage.write_bytes)
    storage.create_bytes = dying(storage.create_bytes)
    os.link = dying(os.link)  # between the temporary file and its name
    Path.replace = dying(Path.replace)
    record = model_store.add(uri, checkpoint_uri, who="killed")
    registry.assign(uri, "champion", record.digest, expected=None, who="killed", why="x", decision="0" * 16)


@pytest.mark.parametrize("before", [True, False])
def test_kill_9_between_any_two_steps(forks, tiny_checkpoint, tmp_path, before):
    digest, number = checkpoints.checkpoint_digest(tiny_checkpoint), 0
    while True:
        number += 1
        uri = str(tmp_path / f"killed-{number}")
        process = forks.Process(target=add_and_die, args=(uri, tiny_checkpoint, number), kwargs={"before": before})
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        entries = registry.history(uri)  # whatever happened, it can be read
        if model_store.find(uri, digest) is None:
            assert entries == []
        else:
            model_store.check(uri, digest)

        record = model_store.add(uri, tiny_checkpoint, who="next")
        registry.assign(uri, "champion", digest, expected=None, who="next", why="x", decision="0" * 16)

        assert record.digest == digest
        model_store.check(uri, digest)
        (entry,) = registry.history(uri)
        assert entries in ([], [entry])
        assert contents(registry.checkpoint_uri(uri, digest)) == contents(tiny_checkpoint)
    assert number > 2 * (len(list(Path(tiny_checkpoint).iterdir())) + 2)


def test_a_damaged_checkpoint_is_not_taken_in(own, tmp_path):
    weights = Path(own) / "head.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")

    with pytest.raises(ConfigError, match=f"{own}: damaged checkpoint: digest of its files is .*belt.json says"):
        model_store.add(str(tmp_path / "registry"), own, who="ann")

    assert not (tmp_path / "registry").exists()


def test_what_was_copied_is_read_back(tiny_checkpoint, tmp_path):
    uri, digest = str(tmp_path / "registry"), checkpoints.checkpoint_digest(tiny_checkpoint)
    storage.write_bytes(f"{registry.checkpoint_uri(uri, digest)}/vocabulary.txt", b"from elsewhere")

    with pytest.raises(ConfigError, match=f"checkpoints/{digest}: damaged checkpoint"):
        model_store.add(uri, tiny_checkpoint, who="ann")

    assert model_store.find(uri, digest) is None
    with pytest.raises(ConfigError, match="add it first"):
        registry.assign(uri, "champion", digest, expected=None, who="ann", why="x")


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "tokenizer.json", "belt.json"])
def test_a_copy_that_was_damaged_since_is_not_loaded(tiny_checkpoint, tmp_path, name):
    uri = str(tmp_path / "registry")
    record = model_store.add(uri, tiny_checkpoint, who="ann")
    file = Path(registry.checkpoint_uri(uri, record.digest)) / name
    file.write_bytes(file.read_bytes().replace(b"spam", b"spim") + b" ")

    with pytest.raises(ConfigError, match="damaged checkpoint"):
        checkpoints.load_checkpoint(str(file.parent))


def test_a_copy_that_gave_way_to_another_whole_checkpoint_is_not_loaded(tiny_checkpoint, finished, tmp_path):
    """Its own card says that it is whole; its place in the registry says that it is another."""
    uri = str(tmp_path / "registry")
    record = model_store.add(uri, tiny_checkpoint, who="ann")
    target = registry.checkpoint_uri(uri, record.digest)
    storage.remove_files([file.uri for file in storage.list_files(target, suffix="")])
    storage.put_directory(Path(finished), target, last="config.json")

    with pytest.raises(ConfigError, match=f"damaged checkpoint: .*, its registry says {record.digest}"):
        checkpoints.load_checkpoint(target)


class _Explodes:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_no_pickle_is_taken_in_or_loaded(finished, tmp_path):
    (Path(finished) / "model.safetensors").unlink()
    (Path(finished) / "pytorch_model.bin").write_bytes(pickle.dumps(_Explodes()))

    with pytest.raises(ConfigError, match=f"{finished}: no weights as safetensors there; pickles are not taken in"):
        model_store.add(str(tmp_path / "registry"), finished, who="ann")


def test_what_is_no_checkpoint(tiny_encoder, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint there"):
        model_store.add(str(tmp_path / "registry"), str(tmp_path), who="ann")
    with pytest.raises(ConfigError, match="fine-tune it first"):
        model_store.add(str(tmp_path / "registry"), str(tiny_encoder), who="ann")


def test_the_list_says_everything(tiny_checkpoint, finished, output):
    first, second = (model_store.add(output, uri, who="ann") for uri in (tiny_checkpoint, finished))
    entries = [
        registry.put_alias(output, "champion", first.digest, who="ann", why="the first"),
        registry.put_alias(output, "champion", second.digest, who="bob", why="better"),
        registry.put_alias(output, "older", first.digest, who="bob", why="to compare with"),
    ]

    listed = model_store.list_models(output)

    assert listed.models == (second, first)
    assert listed.history == tuple(reversed(entries))
    assert listed.aliases == {"champion": entries[1], "older": entries[2]}


def test_a_list_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"no registry of models there \(no folder models\)"):
        model_store.list_models(str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{'0' * 64}.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the record of a model that this belt reads"):
        model_store.list_models(str(tmp_path))


def test_an_alias_is_resolved_where_a_checkpoint_is_wanted(tiny_checkpoint, finished, output):
    first, second = (model_store.add(output, uri, who="ann") for uri in (tiny_checkpoint, finished))
    registry.put_alias(output, "champion", first.digest, who="ann", why="x")

    assert checkpoints.resolve(f"{output}@champion") == registry.checkpoint_uri(output, first.digest)
    registry.put_alias(output, "champion", second.digest, who="ann", why="x")
    assert checkpoints.resolve(f"{output}@champion") == registry.checkpoint_uri(output, second.digest)
    assert model_store.add(f"{output}-2", f"{output}@champion", who="bob").digest == second.digest
    with pytest.raises(ConfigError, match="no alias 'absent' in this registry; it has champion"):
        checkpoints.resolve(f"{output}@absent")
    with pytest.raises(ConfigError, match=r"no checkpoint there .*; nor is there a registry at .* know 'champion'"):
        checkpoints.resolve(f"{output}/elsewhere@champion")


def test_a_directory_whose_name_looks_like_an_alias_is_a_directory(tiny_checkpoint, tmp_path):
    folder = str(tmp_path / "mail@home")
    storage.put_directory(Path(tiny_checkpoint), folder, last="belt.json")

    assert checkpoints.resolve(folder) == folder
