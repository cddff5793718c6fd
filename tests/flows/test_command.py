"""`belt` with real flows: what it says when all is well, and when a user's paths or parameters are wrong."""

import os
import re
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
import torch
import transformers
from typer.testing import CliRunner

from belt_tasks import publishing, score_tables
from belt_tasks.demo import write_demo_corpus
from belt_tasks.demo_corpus import DemoCorpusSpec
from belt_tasks.specs import ChunkSpec, PoolingSpec, ScoreSpec, TrainSpec
from flows import cli


@pytest.fixture(autouse=True)
def environment():
    with mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        yield


def belt(*arguments):
    """(exit code, stdout, stderr) of a command."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def spec_of(output) -> ScoreSpec:
    return ScoreSpec.model_validate_json(score_tables.shown(str(output)).manifest.run["spec"])


def test_fine_tune_evaluate_score(labelled_corpus, tiny_encoder, tmp_path):
    model = tmp_path / "model"

    options = ["--chunk-size", 30, "--stride", 15, "--epochs", 1, "--pooling-strategy", "max", "--seed", 3]
    code, tuned, said = belt("fine-tune", labelled_corpus, "--encoder", tiny_encoder, "--output", model, *options)
    assert (code, said) == (0, "")
    assert "## fine-tune: 35 documents" in tuned
    assert "## fine-tuning: binary (fox, window)" in tuned
    spec = TrainSpec.model_validate_json(publishing.read_manifest(str(model)).run["spec"])
    assert spec == TrainSpec(
        chunks=ChunkSpec(chunk_size=30, stride=15), pooling=PoolingSpec(pooling_strategy="max"), epochs=1, seed=3
    )

    code, measured, said = belt("evaluate", labelled_corpus, "--checkpoint", model, "--output", tmp_path / "measured")
    assert (code, said) == (0, "")
    assert "## evaluation: 35 documents" in measured
    assert "| accuracy |" in measured

    # an option changes the checkpoint's own parameters, not belt's defaults
    arguments = ["score", labelled_corpus, "--checkpoint", model, "--output", tmp_path / "scored", "--stride", 10]
    code, scored, said = belt(*arguments)
    assert (code, said) == (0, "")
    assert f"- output: `{tmp_path / 'scored'}`" in scored
    assert "nothing was scored" not in scored
    assert "This run is what later ones are compared with." in scored
    assert spec_of(tmp_path / "scored").chunks == ChunkSpec(chunk_size=30, stride=10)
    assert spec_of(tmp_path / "scored").pooling == PoolingSpec(pooling_strategy="max")

    code, planned, _ = belt(*arguments, "--dry-run")
    assert code == 0
    assert "| unchanged documents | 35 |" in planned
    code, again, _ = belt(*arguments)
    assert code == 0
    assert "so nothing was scored. What that run did:" in again

    before = score_tables.shown(str(tmp_path / "scored")).run_id
    code, _, _ = belt(*arguments[:-1], 20)
    assert code == 0
    code, said, _ = belt("rollback", tmp_path / "scored")
    assert (code, said.splitlines()[0].split(" again ")[0]) == (0, f"Readers see run {before}")
    code, listed, _ = belt("runs", tmp_path / "scored")
    assert code == 0
    assert f"| {before} | shown | score |" in listed
    page = tmp_path / "scored" / "runs" / before / "report" / "index.html"
    where = f"- report: `{page}` ([open](file://{page}))"
    assert where in again
    page.unlink()
    code, reported, _ = belt("report", tmp_path / "scored")  # of the one that is shown
    assert code == 0
    assert where in reported.splitlines()
    assert page.is_file()
    code, _, said = belt("report", tmp_path / "scored", "--run", "other")
    assert (code, "run must be a complete one" in said) == (1, True)
    code, cleaned, _ = belt("runs", "clean", tmp_path / "scored", "--older-than", 0, "--dry-run")
    assert code == 0
    assert cleaned.startswith("Would remove ")
    assert "among them 0 runs that were never shown.\n\n- run " in cleaned
    code, _, said = belt("rollback", tmp_path / "nowhere")
    assert (code, said) == (1, f"Error: {tmp_path / 'nowhere'}: nothing was published there\n")


def test_config_alone_and_overridden(labelled_corpus, tiny_checkpoint, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "corpus: {split_column: split, split: test}\nspec: {chunks: {chunk_size: 20, stride: 20}, threshold: 0.7,"
        " max_rejected_share: 0.2}\n"
    )
    arguments = ["score", labelled_corpus, "--checkpoint", tiny_checkpoint, "--config", config]

    assert belt(*arguments, "--output", tmp_path / "a")[0] == 0
    assert belt(*arguments, "--output", tmp_path / "b", "--stride", 10, "--split", "train")[0] == 0

    assert spec_of(tmp_path / "a").chunks == ChunkSpec(chunk_size=20, stride=20)
    assert spec_of(tmp_path / "a").threshold == spec_of(tmp_path / "b").threshold == 0.7
    assert spec_of(tmp_path / "b").chunks == ChunkSpec(chunk_size=20, stride=10)
    of_split = pl.read_parquet(f"{labelled_corpus}/*.parquet").drop_nulls("text").group_by("split").len()
    assert dict(of_split.iter_rows()) == {
        "test": score_tables.shown(str(tmp_path / "a")).manifest.run["num_documents"],
        "train": score_tables.shown(str(tmp_path / "b")).manifest.run["num_documents"],
    }


def test_chunk(labelled_corpus, tiny_encoder, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("chunks: {chunk_size: 20, stride: 20}\n")

    arguments = ["--encoder", tiny_encoder, "--output", tmp_path / "out", "--config", config]
    code, shown, said = belt("chunk", labelled_corpus, *arguments)

    assert (code, said) == (0, "")
    assert "## chunk: 35 documents" in shown
    assert publishing.read_table(str(tmp_path / "out"), "chunks")["num_tokens"].max() == 20


def test_a_finished_hugging_face_classifier(labelled_corpus, tiny_encoder, tmp_path):
    torch.manual_seed(0)
    names = dict(enumerate(["bad", "fair", "good"]))
    config = transformers.AutoConfig.from_pretrained(
        tiny_encoder, id2label=names, label2id={name: i for i, name in names.items()}
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    transformers.AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "classifier")
    arguments = ["score", labelled_corpus, "--checkpoint", tmp_path / "classifier", "--output", tmp_path / "out"]

    code, _, said = belt(*arguments)
    assert code == 1
    assert re.fullmatch(r"Error: chunk_size must be at most 62 for .*classifier .*, got 510\n", said)

    assert belt(*arguments, "--chunk-size", 62, "--stride", 62)[0] == 0
    assert score_tables.shown(str(tmp_path / "out")).manifest.labels == ("bad", "fair", "good")
    table = score_tables.read_table(str(tmp_path / "out"), "predictions")
    assert set(table["label"]) <= {"bad", "fair", "good"}
    assert [score["label"] for score in table["scores"][0]] == ["bad", "fair", "good"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "{tmp}/none"}, "{tmp}/none: no such file, directory or glob"),
        ({"corpus": "{tmp}/*.parquet"}, r".*\*\.parquet.*"),
        (
            {"--text-column": "txt"},
            r"(.*part-\d.parquet: no column 'txt'; it has 'doc_id', .*--text-column, .*\)\n?){{3}}",
        ),
        ({"--checkpoint": "{encoder}"}, ".*: an encoder without a head .*fine-tune it first"),
        ({"--output": "{tmp}/file/out"}, r"{tmp}/file/out: cannot be written to \(.*\)"),
        ({"--chunk-size": "63"}, r"chunk_size must be at most 62 for .*\(it reads 64 tokens, 2 .*special\), got 63"),
        ({"--pooling-strategy": "attention"}, "pooling_strategy must not be 'attention' for .*, got 'attention'"),
        ({"--device": "cuda:99"}, r"device 'cuda:99': this machine has \d+ CUDA devices"),
        ({"--device": "cpu", "--precision": "fp16"}, "precision must be fp32 or bf16 on a CPU, got 'fp16'"),
    ],
)
def test_mistakes_that_the_flow_finds(changes, message, labelled_corpus, tiny_encoder, tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    given = {"corpus": labelled_corpus, "--checkpoint": tiny_checkpoint, "--output": "{tmp}/out"} | changes
    given = {name: value.format(tmp=tmp_path, encoder=tiny_encoder) for name, value in given.items()}
    corpus = given.pop("corpus")

    code, shown, said = belt("score", corpus, *[word for pair in given.items() for word in pair])

    assert (code, shown) == (1, "")
    assert re.fullmatch(f"Error: {message.format(tmp=re.escape(str(tmp_path)))}\n", said), said
    assert not Path(tmp_path, "out", "published.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--label-column": "class"}, ".*no column 'class'.*--label-column.*"),
        ({"--encoder": "{tmp}"}, ".*{tmp}.*"),
        ({"--task": "regression"}, "task must be binary or multiclass for a label column of .*, got 'regression'"),
        ({"--chunk-size": "63"}, "chunk_size must be at most 62 for .*, got 63"),
    ],
)
def test_mistakes_in_fine_tuning(changes, message, labelled_corpus, tiny_encoder, tmp_path):
    given = {"--encoder": "{encoder}", "--output": "{tmp}/out", "--chunk-size": "30", "--stride": "30"} | changes
    words = [word.format(tmp=tmp_path, encoder=tiny_encoder) for pair in given.items() for word in pair]

    code, _, said = belt("fine-tune", labelled_corpus, *words)

    assert code == 1
    assert re.fullmatch(f"Error: {message.format(tmp=re.escape(str(tmp_path)))}\n", said), said


def test_a_config_file_changes_the_checkpoints_windows_field_by_field(labelled_corpus, tiny_checkpoint, tmp_path):
    (tmp_path / "c.yaml").write_text("spec: {chunks: {stride: 11}}\n")

    arguments = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", "--config", tmp_path / "c.yaml"]
    code, _, said = belt("score", labelled_corpus, *arguments)

    assert (code, said) == (0, "")
    assert spec_of(tmp_path / "out").chunks == ChunkSpec(chunk_size=30, stride=11)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "nonsense", "http://localhost:abc/api"])
def test_a_prefect_server_that_does_not_answer_is_named(labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch, url):
    monkeypatch.setenv("PREFECT_API_URL", url)

    code, _, said = belt("score", labelled_corpus, "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out")

    assert code == 1
    assert said.startswith(f"Error: PREFECT_API_URL: no Prefect server answers at {url} (")
    assert "unset the variable" in said


def test_the_demo_corpus_is_written_once(tmp_path):
    spec = DemoCorpusSpec(libraries=("polars",), documents_per_library=4, num_long=1)
    write_demo_corpus(str(tmp_path), spec)
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]

    write_demo_corpus(str(tmp_path), spec)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == before
    write_demo_corpus(str(tmp_path), spec.model_copy(update={"seed": 5}))
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] != before


def test_a_password_in_the_address_of_a_server_is_not_told(labelled_corpus, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://user:hush@127.0.0.1:9/api")

    code, _, said = belt("score", labelled_corpus, "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out")

    assert code == 1
    assert "no Prefect server answers at http://127.0.0.1:9/api" in said
    assert "hush" not in said
