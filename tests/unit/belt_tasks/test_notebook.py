"""Notebook use: it learns, keeps what it learned, goes on from there, and says what is wrong with its lists."""

import numpy as np
import pytest

from belt_tasks import checkpoint as checkpoints
from belt_tasks import scoring
from belt_tasks.errors import ConfigError
from belt_tasks.notebook import ClassifierTruncated, ClassifierWithPooling, RegressorTruncated, RegressorWithPooling
from belt_tasks.specs import ChunkSpec, PoolingSpec, ScoreSpec
from tests.conftest import labelled_rows, save_tiny_encoder, words

ROWS = labelled_rows(40, most_words=60)
TEXTS, LABELS = ROWS["text"].to_list(), (ROWS["label"] == "window").cast(int).to_list()
TRAINING = {"batch_size": 4, "learning_rate": 2e-3, "epochs": 4, "device": "cpu"}
WINDOWS = {"chunk_size": 24, "stride": 18, "minimal_chunk_length": 1}


@pytest.fixture
def encoder(tmp_path) -> str:
    return str(save_tiny_encoder(tmp_path / "encoder", "bert", dropout=0.0, max_position_embeddings=512))


def classifier(encoder: str, **changes) -> ClassifierWithPooling:
    parameters = TRAINING | WINDOWS | {"pretrained_model_name_or_path": encoder} | changes
    return ClassifierWithPooling(parameters.pop("num_labels", 2), **parameters)


def test_a_classifier_learns_and_a_saved_one_is_the_same(encoder, tmp_path):
    model = classifier(encoder)

    model.fit(TEXTS, LABELS)
    scores = model.predict_scores(TEXTS)
    model.save(str(tmp_path / "model"))
    loaded = ClassifierWithPooling.load(str(tmp_path / "model"), device="cpu")

    assert scores.shape == (40, 2)
    assert scores.sum(axis=1) == pytest.approx(1.0)
    assert model.predict(TEXTS).tolist() == scores.argmax(axis=1).tolist()
    assert np.mean(model.predict(TEXTS) == LABELS) > 0.9
    np.testing.assert_array_equal(loaded.predict_scores(TEXTS), scores)
    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "model"))  # also for `belt score`
    spec = ScoreSpec(device="cpu", chunks=checkpoint.chunks, pooling=checkpoint.pooling)
    np.testing.assert_allclose(scoring.score_texts(TEXTS, checkpoint, spec).scores_DL, scores, atol=1e-6)
    assert (checkpoint.chunks, checkpoint.pooling) == (ChunkSpec(**WINDOWS), PoolingSpec())


def test_fitting_goes_on_from_where_it_was_also_after_loading(encoder, tmp_path):
    twice, stored = classifier(encoder, epochs=1), classifier(encoder, epochs=1)
    for model in (twice, stored):
        model.fit(TEXTS, LABELS)
    first = twice.predict_scores(TEXTS)
    stored.save(str(tmp_path / "model"))
    loaded = ClassifierWithPooling.load(str(tmp_path / "model"), device="cpu")

    for model in (twice, loaded):
        model.fit(TEXTS, LABELS, epochs=3)

    np.testing.assert_allclose(twice.predict_scores(TEXTS), loaded.predict_scores(TEXTS), atol=1e-6)
    right = np.arange(40), LABELS
    assert np.log(twice.predict_scores(TEXTS)[right]).mean() > np.log(first[right]).mean()


def test_the_seed_decides_and_how_many_are_scored_at_once_does_not(encoder):
    models = [classifier(encoder, epochs=1, seed=seed) for seed in (1, 1, 2)]
    for model in models:
        model.fit(TEXTS, LABELS)

    first, same, other = (model.predict_scores(TEXTS) for model in models)

    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-4
    np.testing.assert_allclose(models[0].predict_scores(TEXTS, batch_size=1), first, atol=1e-5)


def test_regressors_learn_numbers(encoder):
    for model in (
        RegressorWithPooling(**TRAINING, **WINDOWS, pretrained_model_name_or_path=encoder),
        RegressorTruncated(**TRAINING, pretrained_model_name_or_path=encoder),
    ):
        target = [2.0 * label - 1 for label in LABELS]
        model.fit(TEXTS, target)
        assert model.predict(TEXTS).shape == (40,)
        assert np.mean((model.predict(TEXTS) - target) ** 2) < 0.5


def test_what_is_truncated_does_not_read_the_rest(encoder):
    truncated = ClassifierTruncated(2, **TRAINING, pretrained_model_name_or_path=encoder)
    pooled = classifier(encoder)
    long = words(900, seed=1)
    longer = f"{long} {words(300, seed=2)}"
    for model in (truncated, pooled):
        model.fit(TEXTS, LABELS, epochs=1)

    scores = {model: model.predict_scores([long, longer]) for model in (truncated, pooled)}

    assert scores[truncated][0] == pytest.approx(scores[truncated][1], abs=1e-7)
    assert np.abs(scores[pooled][0] - scores[pooled][1]).max() > 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.predict(TEXTS), "knows nothing yet: call fit, or load one that was saved"),
        (lambda model: model.save("x"), "knows nothing yet"),
        (lambda model: model.fit("a text", [0]), "x_train must be a list of texts, got one text"),
        (lambda model: model.fit([], []), "x_train must hold at least one text, got none"),
        (lambda model: model.fit(["a", None], [0, 1]), "x_train must hold texts, got None at position 1"),
        (lambda model: model.fit(["a", "b"], [0]), "must be equally long, got 2 texts and 1 labels"),
        (lambda model: model.fit(["a", "b"], [0, 2]), "y_train must hold integers from 0 to 1, got 2 and such in 1"),
        (lambda model: model.fit(["a", "b"], [0.5, "x"]), "y_train must hold integers from 0 to 1, got 0.5, 'x'"),
        (lambda model: model.fit(["a"], [0], epochs=0), "epochs must be 1 or more, got 0"),
    ],
)
def test_what_is_wrong_with_lists_is_said(encoder, call, words):
    with pytest.raises(ConfigError, match=words):
        call(classifier(encoder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 1}, "num_labels must be 2 or more, got 1"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1, got 0"),
        ({"pooling_strategy": "sum"}, "pooling_strategy: .*, got 'sum'"),
        ({"stride": 0}, "stride: .*, got 0"),
        ({"many_gpus": True}, "many_gpus: Extra inputs are not permitted, got True"),
        ({"device": "tpu"}, "device: .*, got 'tpu'"),
    ],
)
def test_what_is_wrong_with_parameters_is_said_at_once(encoder, changes, words):
    with pytest.raises(ConfigError, match=words):
        classifier(encoder, **changes)


@pytest.mark.parametrize("target", [[1.0, float("nan")], [[1.0], [2.0]], ["a", "b"]])
def test_a_regressor_takes_finite_numbers(encoder, target):
    model = RegressorTruncated(**TRAINING, pretrained_model_name_or_path=encoder)

    with pytest.raises(ConfigError, match="y_train must hold"):
        model.fit(["a", "b"], target)


def test_only_a_checkpoint_of_the_same_kind_is_loaded(encoder, tmp_path):
    model = classifier(encoder, epochs=1)
    model.fit(TEXTS, LABELS)
    model.save(str(tmp_path / "model"))

    with pytest.raises(ConfigError, match="a multiclass model, which RegressorWithPooling is not"):
        RegressorWithPooling.load(str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="nowhere"):
        ClassifierWithPooling.load(str(tmp_path / "nowhere"))
