"""Models that belt-nlp saved: the checkpoint made of them scores the same, and nothing of their pickle runs."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from belt_nlp.bert import BertNN
from belt_nlp.bert_classifier_truncated import BertClassifierTruncated
from belt_nlp.bert_classifier_with_pooling import BertClassifierWithPooling
from belt_nlp.bert_regressor_truncated import BertRegressorTruncated
from belt_nlp.bert_regressor_with_pooling import BertRegressorWithPooling
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from belt_tasks import checkpoint as checkpoints
from belt_tasks import scoring
from belt_tasks.errors import ConfigError
from belt_tasks.import_belt_nlp import import_belt_nlp
from belt_tasks.notebook import ClassifierTruncated, ClassifierWithPooling, RegressorTruncated, RegressorWithPooling
from belt_tasks.specs import ChunkSpec, ScoreSpec
from flows import cli
from tests.conftest import save_tiny_encoder, words

TEXTS = [words(n, seed=n) for n in (900, 12, 1, 300)] + ["", "Crème brûlée!!! 漢字"]
WINDOWS = {"chunk_size": 100, "stride": 80, "minimal_chunk_length": 20, "maximal_text_length": 500}
TRAINING = {"batch_size": 2, "learning_rate": 1e-5, "epochs": 1, "device": "cpu"}
KINDS = {
    "classifier, mean": (BertClassifierWithPooling, {"num_labels": 3, "pooling_strategy": "mean", **WINDOWS}),
    "classifier, max": (BertClassifierWithPooling, {"num_labels": 2, "pooling_strategy": "max", **WINDOWS}),
    "classifier, truncated": (BertClassifierTruncated, {"num_labels": 2}),
    "regressor, mean": (BertRegressorWithPooling, {"pooling_strategy": "mean", **WINDOWS}),
    "regressor, truncated": (BertRegressorTruncated, {}),
}

NOTEBOOK = {
    BertClassifierWithPooling: ClassifierWithPooling,
    BertClassifierTruncated: ClassifierTruncated,
    BertRegressorWithPooling: RegressorWithPooling,
    BertRegressorTruncated: RegressorTruncated,
}


def saved(kind: str, encoder: Path, folder: Path):
    """belt-nlp's model, with a head as wide as the encoder, and the folder that it saved itself to."""
    torch.manual_seed(0)
    body = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    model_class, settings = KINDS[kind]
    network = BertNN(body, settings.get("num_labels", 1))
    network.linear = torch.nn.Linear(body.config.hidden_size, settings.get("num_labels", 1))
    model = model_class(
        **settings, **TRAINING, tokenizer=AutoTokenizer.from_pretrained(encoder), neural_network=network
    )
    model.save(str(folder))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_scores_as_belt_nlp_does(minilm, tmp_path, kind):
    theirs = saved(kind, minilm, tmp_path / "saved")

    imported = import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "checkpoint"))

    assert not imported.has_other_special_tokens
    checkpoint = checkpoints.load_checkpoint(str(tmp_path / "checkpoint"))
    ours = scoring.score_texts(TEXTS, checkpoint, ScoreSpec(chunks=checkpoint.chunks, pooling=checkpoint.pooling))
    np.testing.assert_allclose(ours.logits_DL, theirs._predict_logits(TEXTS), atol=1e-4)
    if kind.startswith("classifier"):
        np.testing.assert_allclose(ours.scores_DL, theirs.predict_scores(TEXTS), atol=1e-4)
        assert [checkpoint.head.labels[i] for i in ours.scores_DL.argmax(axis=1)] == [
            str(int(label)) for label in theirs.predict(TEXTS)
        ]
    else:
        assert (checkpoint.head.task, checkpoint.head.labels) == ("regression", ("target",))
    if "truncated" in kind:
        assert checkpoint.chunks == ChunkSpec(chunk_size=510, stride=510, selection="head")
    assert imported.card.training["belt_nlp"]["batch_size"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_goes_on_with_it(minilm, tmp_path, kind):
    theirs = saved(kind, minilm, tmp_path / "saved")
    import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "checkpoint"))
    model_class = NOTEBOOK[KINDS[kind][0]]

    ours = model_class.load(str(tmp_path / "checkpoint"), device="cpu")

    np.testing.assert_allclose(ours.predict(TEXTS), np.ravel(theirs.predict(TEXTS)), atol=1e-4)  # [D, 1] of regressors
    ours.fit(["a fox", "a window"], [0, 1], epochs=1)
    assert len(ours.predict(TEXTS)) == len(TEXTS)


def test_the_command_line_names_the_classes_and_needs_no_belt_nlp(minilm, tmp_path):
    saved("classifier, max", minilm, tmp_path / "saved")
    arguments = ["import-belt-nlp", tmp_path / "saved", "--output", tmp_path / "out", "--label", "no", "--label", "yes"]

    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("## imported: multiclass (no, yes)\n\n- windows: chunk_size 100, stride 80")
    code = (
        "import sys; sys.modules['belt_nlp'] = None\n"
        "from belt_tasks.import_belt_nlp import import_belt_nlp\n"
        "import_belt_nlp(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved", tmp_path / "again"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_other_special_tokens_than_berts_are_told(tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder", "bert", dropout=0.0, max_position_embeddings=512)
    saved("classifier, mean", encoder, tmp_path / "saved")

    assert import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out")).has_other_special_tokens


def test_a_module_is_not_always_called_as_its_model(tmp_path):
    """xlm_roberta has the configs of xlm-roberta."""
    encoder = save_tiny_encoder(tmp_path / "encoder", "xlm-roberta", dropout=0.0, max_position_embeddings=514)
    theirs = saved("classifier, mean", encoder, tmp_path / "saved")

    imported = import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"))

    assert imported.has_other_special_tokens
    body = checkpoints.load_checkpoint(str(tmp_path / "out")).model.body
    assert type(body) is type(theirs.neural_network.model)
    for name, weight in theirs.neural_network.model.state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(body.state_dict()[name], weight)


class Evil:
    """Runs a command when it is unpickled by whoever trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["alone", "attribute", "config"])
def test_nothing_that_is_pickled_runs(minilm, tmp_path, where):
    model, marker = saved("classifier, mean", minilm, tmp_path / "saved"), tmp_path / "ran"
    network = model.neural_network
    if where == "alone":
        network = Evil(marker)
    elif where == "attribute":
        network.linear.evil = Evil(marker)
    else:
        network.model.config.evil = Evil(marker)
    torch.save(network, tmp_path / "saved" / "model.bin")

    with pytest.raises(ConfigError, match=r"model\.bin: names posix\.system, which no network of belt-nlp is made of"):
        import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"))

    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "saved" / "model.bin", weights_only=False)  # as belt-nlp does: it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.bin").unlink(), r"saved: no model\.bin there, which belt-nlp's `save` writes"),
        (lambda folder: (folder / "params.json").write_text("{"), r"params\.json: not JSON"),
        (lambda folder: (folder / "params.json").write_text("[]"), r"params\.json: must be a JSON object, got list"),
        (lambda folder: (folder / "model.bin").write_bytes(pickle.dumps(1)), r"model\.bin: not a file of torch\.save"),
        (lambda folder: torch.save({"a": 1}, folder / "model.bin"), r"model\.bin: must hold a belt_nlp.* got dict"),
        (
            lambda folder: torch.save(torch.nn.Linear(2, 2), folder / "model.bin"),
            r"model\.bin: must hold a belt_nlp.* got torch\.nn\.modules\.linear\.Linear",
        ),
        (lambda folder: changed(folder, stride=900), r"params\.json: .*stride"),
        (lambda folder: changed(folder, pooling_strategy="sum"), r"params\.json: pooling_strategy: .*, got 'sum'"),
        (lambda folder: changed(folder, num_labels=5), "its weights make no bert model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: torn(folder / "model.bin"), r"model\.bin: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(minilm, tmp_path, change, words):
    saved("classifier, mean", minilm, tmp_path / "saved")
    change(tmp_path / "saved")

    with pytest.raises(ConfigError, match=words):
        import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"))

    assert not (tmp_path / "out").exists()


def changed(folder: Path, **params) -> None:
    told = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(told | params))


def torn(path: Path) -> None:
    """Without the object that the pickle is in."""
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist() if not name.endswith("data.pkl")}
    with zipfile.ZipFile(path, "w") as left:
        for name, data in parts.items():
            left.writestr(name, data)


def test_labels_and_places_are_checked(minilm, tmp_path):
    saved("classifier, max", minilm, tmp_path / "saved")

    with pytest.raises(ConfigError, match="labels must be 2 for this model, got 1: yes"):
        import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"), ("yes",))
    import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="holds a model already; choose another output"):
        import_belt_nlp(str(tmp_path / "saved"), str(tmp_path / "out"))
