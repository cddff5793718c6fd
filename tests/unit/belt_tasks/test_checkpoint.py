"""Checkpoints: what was saved is what is loaded; what is damaged is noticed."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from belt_tasks import checkpoint as checkpoints
from belt_tasks import storage
from belt_tasks.encoder import ChunkModel, load_body
from belt_tasks.errors import ConfigError
from belt_tasks.scoring import score_texts
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec, ScoreSpec
from tests.conftest import BERT_NAMES, FAMILIES, SIZES, wordpiece_tokenizer, words

HEAD = Head(task="multiclass", labels=("a", "b", "c"))
CHUNKS = ChunkSpec(chunk_size=20, stride=10, minimal_chunk_length=3)


def save(encoder, uri, *, strategy="attention", seed=0):
    pooling = PoolingSpec(pooling_strategy=strategy)
    torch.manual_seed(seed)
    model = ChunkModel(load_body(encoder), num_logits=3, pooling=pooling)
    card = checkpoints.save_checkpoint(
        model,
        uri,
        tokenizer_source=str(encoder),
        head=HEAD,
        chunks=CHUNKS,
        pooling=pooling,
        data_fingerprint="d" * 64,
        metrics={"loss": 0.5},
        training={"epochs": 1},
    )
    return model.eval(), card


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_gives_the_outputs_of_the_saved_one(tiny_encoders, tmp_path, family):
    model, card = save(tiny_encoders(family), str(tmp_path / "made"))

    loaded = checkpoints.load_checkpoint(str(tmp_path / "made"))

    ids = torch.arange(10, 40)[None]
    with torch.inference_mode():
        expected = model(ids, torch.ones_like(ids))
        assert torch.equal(loaded.model(ids, torch.ones_like(ids)), expected)
    assert (loaded.head, loaded.chunks, loaded.digest) == (HEAD, CHUNKS, card.digest)
    assert loaded.tokenizer.tokenize([words(30)]).input_ids_T.size > 0
    assert not loaded.model.training


def test_a_checkpoint_lives_in_any_store(tiny_encoder):
    _, card = save(tiny_encoder, "memory://models/one")

    loaded = checkpoints.load_checkpoint("memory://models/one")

    assert loaded.digest == card.digest == checkpoints.checkpoint_digest("memory://models/one")
    assert score_texts([words(50)], loaded, ScoreSpec()).scores_DL.shape == (1, 3)


def test_nothing_in_a_checkpoint_is_a_pickle(tiny_encoder, tmp_path):
    save(tiny_encoder, str(tmp_path / "made"))

    names = {path.suffix for path in (tmp_path / "made").iterdir()}
    assert names <= {".json", ".safetensors", ".jinja", ".txt"}


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_file_is_noticed(tiny_encoder, tmp_path, name):
    save(tiny_encoder, str(tmp_path / "made"))
    file = tmp_path / "made" / name
    file.write_bytes(file.read_bytes() + b" ")

    with pytest.raises(ConfigError, match="damaged checkpoint"):
        checkpoints.load_checkpoint(str(tmp_path / "made"))


def test_renamed_labels_are_noticed(tiny_encoder, tmp_path):
    save(tiny_encoder, str(tmp_path / "made"))
    card = tmp_path / "made" / "belt.json"
    card.write_text(card.read_text().replace('"a"', '"renamed"'))

    with pytest.raises(ConfigError, match="damaged checkpoint"):
        checkpoints.load_checkpoint(str(tmp_path / "made"))


def test_other_weights_have_another_digest(tiny_encoder, tmp_path):
    digests = {save(tiny_encoder, str(tmp_path / str(seed)), seed=seed)[1].digest for seed in (0, 1)}
    again = save(tiny_encoder, str(tmp_path / "again"), seed=0)[1].digest

    assert len(digests) == 2
    assert again in digests


def test_the_card_is_written_last(tiny_encoder, tmp_path, monkeypatch):
    written = []
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), write(uri, data)))

    save(tiny_encoder, str(tmp_path / "made"))

    assert written[-1].endswith("belt.json")
    assert len(written) > 4


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint there"):
        checkpoints.resolve(str(tmp_path))


def test_a_bare_encoder_is_not_a_checkpoint(tiny_encoder):
    with pytest.raises(ConfigError, match="fine-tune it first"):
        checkpoints.load_checkpoint(str(tiny_encoder))


def test_a_finished_classifier_is_a_checkpoint(tmp_path):
    config = BertConfig(
        vocab_size=500, max_position_embeddings=512, id2label={0: "ham", 1: "spam"}, pad_token_id=0, **SIZES
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=wordpiece_tokenizer(), **BERT_NAMES).save_pretrained(tmp_path)

    loaded = checkpoints.load_checkpoint(str(tmp_path))

    assert loaded.head == Head(task="multiclass", labels=("ham", "spam")) == checkpoints.read_head(str(tmp_path))
    assert loaded.chunks == ChunkSpec()
    assert score_texts([words(900)], loaded, ScoreSpec()).scores_DL.sum() == pytest.approx(1)


def test_the_cache_loads_once_and_notices_a_change(tiny_encoder, tmp_path):
    uri = str(tmp_path / "made")
    digest = save(tiny_encoder, uri)[1].digest
    cache = checkpoints.CheckpointCache()

    first = cache.get(uri, digest)

    assert cache.get(uri, digest) is first
    with pytest.raises(ConfigError, match="changed during the run"):
        cache.get(uri, "0" * 64)
