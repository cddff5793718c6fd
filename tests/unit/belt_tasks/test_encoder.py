"""Encoders: what is asked of the model is what the model is."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from belt_tasks import encoder
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec
from belt_tasks.tokens import load_tokenizer
from tests.conftest import FAMILIES, NUM_POSITIONS, SIZES, save_tiny_encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_reads_exactly_as_many_tokens_as_belt_says(tiny_encoders, family):
    body = encoder.load_body(tiny_encoders(family)).eval()
    readable = encoder.num_positions(body)
    ids = torch.full((1, readable), 5)

    assert readable == NUM_POSITIONS
    assert encoder.num_positions_of_source(tiny_encoders(family)) == readable
    body(input_ids=ids, attention_mask=torch.ones_like(ids))
    if family != "modernbert":  # its positions are rotations, which have no table to run out of
        with pytest.raises((IndexError, RuntimeError)):
            body(input_ids=torch.full((1, readable + 1), 5), attention_mask=torch.ones(1, readable + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_are_too_long_are_refused_with_the_number_that_is_allowed(tiny_encoders, family):
    special = load_tokenizer(tiny_encoders(family)).special

    encoder.check_chunk_size(ChunkSpec(chunk_size=62, stride=62), special, NUM_POSITIONS, source="here")
    with pytest.raises(ConfigError, match=r"chunk_size must be at most 62 for here .* got 63"):
        encoder.check_chunk_size(ChunkSpec(chunk_size=63, stride=62), special, NUM_POSITIONS, source="here")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunks_output_does_not_depend_on_its_padding(tiny_encoders, family):
    torch.manual_seed(0)
    model = encoder.ChunkModel(
        encoder.load_body(tiny_encoders(family)), num_logits=3, pooling=PoolingSpec(pooling_strategy="attention")
    ).eval()
    special = load_tokenizer(tiny_encoders(family)).special
    ids = torch.tensor([[*special.prefix_ids, *range(10, 30), *special.suffix_ids]])
    padded = torch.cat([ids, torch.full((1, 17), special.pad_id)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 17, dtype=torch.int64)], dim=1)

    with torch.inference_mode():
        alone, among = model(ids, torch.ones_like(ids)), model(padded, mask)

    assert alone.shape == (1, 4)
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)


def test_dropout_can_be_taken_from_every_family(tiny_encoders):
    for family in FAMILIES:
        body = encoder.load_body(tiny_encoders(family), dropout=0.0).train()
        ids = torch.arange(10, 40)[None]
        outputs = [body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state for _ in range(2)]
        assert torch.equal(*outputs), family


def test_weights_that_are_pickled_are_refused(tmp_path, tiny_encoder):
    for file in tiny_encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(encoder.load_body(tiny_encoder).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=f"cannot load a model from {tmp_path}.*safetensors"):
        encoder.load_body(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_labels": 1}, Head(task="regression", labels=("LABEL_0",))),
        ({"id2label": {0: "ham", 1: "spam"}}, Head(task="multiclass", labels=("ham", "spam"))),
        (
            {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"},
            Head(task="multilabel", labels=("a", "b")),
        ),
    ],
)
def test_a_finished_classifier_keeps_its_head_and_label_names(tmp_path, config, expected):
    built = BertConfig(vocab_size=100, max_position_embeddings=16, **SIZES, **config)
    AutoModelForSequenceClassification.from_config(built).save_pretrained(tmp_path)

    model, head = encoder.load_finished_classifier(tmp_path)

    assert head == expected
    ids = torch.arange(5, 10)[None]
    assert model.eval()(ids, torch.ones_like(ids)).shape == (1, expected.num_logits)


def test_an_encoder_without_a_head_is_not_a_classifier(tiny_encoder):
    with pytest.raises(ConfigError, match="an encoder without a head"):
        encoder.load_finished_classifier(tiny_encoder)


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=device):
        encoder.choose_device(device)


def test_another_encoder_has_another_fingerprint(tmp_path, tiny_encoder):
    other = save_tiny_encoder(tmp_path / "other", "bert", seed=1)

    assert encoder.source_fingerprint(tiny_encoder) == encoder.source_fingerprint(tiny_encoder)
    assert encoder.source_fingerprint(tiny_encoder) != encoder.source_fingerprint(other)
