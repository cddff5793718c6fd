"""The engine: whichever way encodes, the outputs are those of the model's own forward in fp32."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from belt_tasks import attention_cpu, engine, packed_cpu, packed_gpu
from belt_tasks.batches import MiniBatch
from belt_tasks.encoder import ChunkModel, FinishedClassifier, load_body, load_finished_classifier
from belt_tasks.engine import PackedEncoder, PlainEncoder, build_encoder, choose_precision
from belt_tasks.errors import ConfigError
from belt_tasks.families import body_and_head, read_weights
from belt_tasks.specs import PoolingSpec
from tests.conftest import FAMILIES, NUM_POSITIONS, save_tiny_encoder

CPU = torch.device("cpu")
PACKED_FAMILIES = FAMILIES
LENGTHS = [2, 3, 17, NUM_POSITIONS - 1, NUM_POSITIONS]


def chunk_model(encoder, *, seed=0):
    torch.manual_seed(seed)
    return ChunkModel(load_body(encoder), num_logits=3, pooling=PoolingSpec(pooling_strategy="attention")).eval()


def finished_model(folder, encoder):
    config = AutoConfig.from_pretrained(encoder, num_labels=4)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return load_finished_classifier(folder)[0].eval()


def random_batch(lengths, *, seed=0, pad_id=1, first_id=5, last_id=200):
    num_tokens_B = np.array(lengths)
    ids = np.random.default_rng(seed).integers(first_id, last_id, num_tokens_B.sum())
    return MiniBatch(
        rows_B=np.arange(len(lengths)), input_ids_T=torch.from_numpy(ids), num_tokens_B=num_tokens_B, pad_id=pad_id
    )


def forward_of(model):
    body, head = body_and_head(model)
    return PackedEncoder(packed_cpu.PackedCpuForward(read_weights(body), torch.float32), head, device=CPU)


def difference(model, batch, precision="fp32"):
    with torch.inference_mode():
        found = build_encoder(model, device=CPU, precision=precision).encode(batch)
        expected = PlainEncoder(model, device=CPU, dtype=torch.float32).encode(batch)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.fixture(params=["compiled", "operators"])
def either_attention(request, monkeypatch):
    """The compiled kernel where there is one, and PyTorch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(attention_cpu, "uses_kernel", lambda *_: False)


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_its_own_forward(tiny_encoders, family):
    model = chunk_model(tiny_encoders(family))

    assert difference(model, random_batch(LENGTHS)) < 1e-5
    assert difference(model, random_batch([5])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_way_is_the_one_that_runs(tiny_encoders, family):
    chosen = build_encoder(chunk_model(tiny_encoders(family)), device=CPU, precision="fp32")

    assert isinstance(chosen, PackedEncoder if family in PACKED_FAMILIES else PlainEncoder)
    assert chosen.pads == (family not in PACKED_FAMILIES)


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_finished_classifiers_keep_their_own_head(tiny_encoders, tmp_path, family):
    model = finished_model(tmp_path, tiny_encoders(family))

    chosen = build_encoder(model, device=CPU, precision="fp32")

    assert isinstance(chosen, PackedEncoder if family in PACKED_FAMILIES else PlainEncoder)
    assert isinstance(model, FinishedClassifier)
    assert difference(model, random_batch(LENGTHS)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_products_have_few_different_numbers_of_rows(tiny_encoders, monkeypatch, family):
    """A kernel is kept for each of them: hundreds of them would be hundreds of megabytes."""
    encode, seen = build_encoder(chunk_model(tiny_encoders(family)), device=CPU, precision="fp32").encode, set()
    call, add_to = packed_cpu.PackedLinear.__call__, packed_cpu.PackedLinear.add_to
    monkeypatch.setattr(packed_cpu.PackedLinear, "__call__", lambda self, x: seen.add(len(x)) or call(self, x))
    monkeypatch.setattr(packed_cpu.PackedLinear, "add_to", lambda self, y, x: seen.add(len(x)) or add_to(self, y, x))

    with torch.inference_mode():
        for length in range(2, NUM_POSITIONS):
            encode(random_batch([length, 2]))

    assert seen <= set(range(16, NUM_POSITIONS + 18, 16))
    assert len(seen) > 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    lengths=st.lists(st.integers(2, NUM_POSITIONS), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    family=st.sampled_from(PACKED_FAMILIES),
)
def test_any_chunks_agree(tiny_encoders, lengths, seed, family):
    assert difference(chunk_model(tiny_encoders(family), seed=seed), random_batch(lengths, seed=seed)) < 1e-5


@pytest.mark.usefixtures("either_attention")
def test_windowed_layers_agree(tmp_path):
    encoder = save_tiny_encoder(tmp_path / "modernbert", "modernbert", num_hidden_layers=5)

    assert difference(chunk_model(encoder), random_batch([*LENGTHS, 16, 17, 32, 33, 40, 41])) < 1e-5


def test_a_head_that_reads_more_than_the_first_token_runs_by_the_models_own_forward(tmp_path, tiny_encoders):
    config = AutoConfig.from_pretrained(tiny_encoders("modernbert"), num_labels=4, classifier_pooling="mean")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load_finished_classifier(tmp_path)[0].eval()

    assert isinstance(build_encoder(model, device=CPU, precision="fp32"), PlainEncoder)


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("lengths", [[512, 511, 3, 200], [256], [255, 2]])
def test_real_weights_agree(minilm, lengths):
    batch = random_batch(lengths, pad_id=0, first_id=1000, last_id=30_000)

    assert difference(chunk_model(minilm), batch) < 1e-5


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_near(tiny_encoders, minilm, family):
    assert difference(chunk_model(tiny_encoders(family)), random_batch(LENGTHS), "bf16") < 0.2
    if family == "bert":
        batch = random_batch([512, 300, 40], pad_id=0, first_id=1000, last_id=30_000)
        assert difference(chunk_model(minilm), batch, "bf16") < 0.02


@pytest.mark.usefixtures("either_attention")
def test_scores_too_large_for_an_exponent_are_shifted(tiny_encoder):
    model = chunk_model(tiny_encoder)
    with torch.no_grad():
        for layer in model.body.encoder.layer:
            layer.attention.self.query.weight.mul_(200.0)

    batch = random_batch(LENGTHS)
    with torch.inference_mode():
        found = forward_of(model).encode(batch)
        expected = PlainEncoder(model, device=CPU, dtype=torch.float32).encode(batch)

    assert torch.isfinite(found).all()
    # with scores this large softmax picks one token, and float noise in a score counts for more
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_an_encoder_of_another_form_runs_by_its_own_forward(tmp_path):
    relu = save_tiny_encoder(tmp_path / "relu", "bert", hidden_act="relu")

    assert isinstance(build_encoder(chunk_model(relu), device=CPU, precision="fp32"), PlainEncoder)


def test_a_pytorch_without_the_operators_runs_the_models_own_forward(tiny_encoder, monkeypatch):
    monkeypatch.setattr(packed_cpu, "supported", lambda _: False)

    assert isinstance(build_encoder(chunk_model(tiny_encoder), device=CPU, precision="fp32"), PlainEncoder)


def test_a_fast_way_that_is_wrong_is_not_taken_and_says_so(tiny_encoder, monkeypatch, caplog):
    right = packed_cpu.PackedCpuForward.first_tokens
    monkeypatch.setattr(packed_cpu.PackedCpuForward, "first_tokens", lambda self, batch: right(self, batch) + 0.1)

    with caplog.at_level(logging.WARNING):
        chosen = build_encoder(chunk_model(tiny_encoder), device=CPU, precision="fp32")

    assert isinstance(chosen, PlainEncoder)
    assert "the packed forward differs from the model's own by" in caplog.text


def test_bf16_is_refused_where_it_would_be_slow(monkeypatch):
    monkeypatch.setattr(packed_cpu, "has_bf16", lambda: False)

    with pytest.raises(ConfigError, match="precision bf16 needs a processor with avx512_bf16 or AMX"):
        choose_precision("bf16", CPU)
    with pytest.raises(ConfigError, match="precision must be fp32 or bf16 on a CPU, got 'fp16'"):
        choose_precision("fp16", CPU)
    assert choose_precision(None, CPU) == choose_precision("fp32", CPU) == "fp32"


GPU_FAMILIES = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize("family", GPU_FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_the_forward_of_gpus_agrees_on_a_cpu(tiny_encoders, family, dtype, bound):
    model = chunk_model(tiny_encoders(family))
    weights, batch = read_weights(model.body), random_batch(LENGTHS)

    with torch.inference_mode():
        forward = packed_gpu.PackedGpuForward(weights, device=CPU, dtype=dtype)
        found = PackedEncoder(forward, model.head, device=CPU).encode(batch)
        expected = PlainEncoder(model, device=CPU, dtype=torch.float32).encode(batch)

    assert float((found - expected).abs().max()) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_agrees_with_the_models_own_forward(tiny_encoders, family, precision):
    device = torch.device("cuda")
    model, batch = chunk_model(tiny_encoders(family)), random_batch(LENGTHS)

    chosen = build_encoder(model, device=device, precision=precision)
    with torch.inference_mode():
        found = chosen.encode(batch).cpu()
        expected = PlainEncoder(model, device=CPU, dtype=torch.float32).encode(batch)

    assert isinstance(chosen, PackedEncoder if family in GPU_FAMILIES else PlainEncoder)
    assert float((found - expected).abs().max()) < 0.2
    assert NUM_POSITIONS <= chosen.batch_tokens <= engine.MOST_GPU_TOKENS


def test_scores_with_a_bias_are_not_for_variable_length_attention(tiny_encoders):
    with_bias, without = (read_weights(chunk_model(tiny_encoders(family)).body) for family in ("mpnet", "bert"))

    assert not packed_gpu.supported(with_bias, CPU, torch.bfloat16)
    assert not packed_gpu.supported(without, CPU, torch.float32)
    assert packed_gpu.supported(without, CPU, torch.bfloat16)


def test_a_budget_lies_on_the_line_of_what_was_measured():
    # 1000 bytes and 10 per token
    sizes, peaks = [4096, 8192], [41_960, 82_920]

    assert engine.budget_of_memory(sizes, peaks, free=500_000, longest=512) == 39_900
    assert engine.budget_of_memory(sizes, peaks, free=10**12, longest=512) == engine.MOST_GPU_TOKENS
    assert engine.budget_of_memory(sizes, peaks, free=100, longest=512) == 512
