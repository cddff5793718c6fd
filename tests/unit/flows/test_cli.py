"""The command line up to the flow: help, options, config files, exit codes. What needs a server is in tests/flows."""

import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from belt_tasks import specs
from belt_tasks.tokens import load_tokenizer
from belt_tasks.windows import chunk_windows
from flows import cli, cli_models
from flows.options import WrongUsageError, build, read_config
from tests.conftest import words

COMMANDS = typer.main.get_command(cli.app).commands
METHOD = ("chunk_size", "stride", "minimal_chunk_length", "maximal_text_length", "pooling_strategy")


@pytest.fixture(autouse=True)
def environment():
    """`belt` sets variables for Prefect; they end with the test."""
    with mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        yield


def belt(*arguments):
    """(exit code, stdout, stderr) of a command."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def options_of(command: str) -> set[str]:
    return {parameter.name for parameter in COMMANDS[command].params}


def test_commands():
    assert set(COMMANDS) == {
        "score",
        "fine-tune",
        "import-belt-nlp",
        "evaluate",
        "demo",
        "deploy",
        "windows",
        "chunk",
        "runs",
        "report",
        "rollback",
        "promote",
        "models",
        "doctor",
    }


def test_a_config_file_of_a_scoring_has_a_section_on_drift(tmp_path):
    (tmp_path / "c.yaml").write_text("drift: {max_psi: 0}")

    code, _, said = belt("score", "corpus", "--checkpoint", "c", "--output", "o", "--config", tmp_path / "c.yaml")

    assert code == 2
    assert "--config, drift.max_psi: input should be greater than 0, got 0" in said
    (tmp_path / "c.yaml").write_text("limits: {}")
    _, _, said = belt("evaluate", "corpus", "--checkpoint", "c", "--output", "o", "--config", tmp_path / "c.yaml")
    assert "its sections must be corpus, spec, drift and length, got limits" in said


def test_a_report_of_what_is_not_there_is_a_plain_error(tmp_path):
    code, _, said = belt("report", tmp_path)

    assert code == 1
    assert f"{tmp_path}: nothing was published there by `belt score`" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    code, shown, _ = belt(command, "--help")

    assert code == 0
    for parameter in COMMANDS[command].params:
        assert parameter.help or parameter.name == "help", parameter.name
        name = f"--{parameter.name.replace('_', '-')}" if parameter.param_type_name == "option" else parameter.name
        assert name in shown


@pytest.mark.parametrize("command", ["score", "evaluate", "fine-tune", "chunk", "windows"])
def test_help_explains_the_method_with_the_specs_own_sentences(command):
    _, shown, _ = belt(command, "--help")

    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    for name in METHOD:
        spec = specs.PoolingSpec if name == "pooling_strategy" else specs.ChunkSpec
        if name == "pooling_strategy" and command in ("chunk", "windows"):
            continue
        assert spec.model_fields[name].description.split(";")[0].split(":")[0] in text


def test_help_shows_defaults_and_whose_they_are():
    assert "(default: 510)" in belt("chunk", "--help")[1]
    assert "(default: the checkpoint's)" in belt("score", "--help")[1]
    assert "(default: 510)" not in belt("score", "--help")[1]


# of a promotion, whose scores nobody reads but the gate; a config file may set them
OF_OUTPUTS = {"evidence", "num_evidence_chunks", "evidence_text", "export", "full", "removed", "publish_every"}
OF_LABELS = {"label_column", "weight_column"}
CHUNKS, POOLING, BATCHES = specs.ChunkSpec, specs.PoolingSpec, specs.BatchSpec


@pytest.mark.parametrize(
    ("command", "specifications", "left_out"),
    [
        ("score", [specs.CorpusSpec, specs.ScoreSpec, CHUNKS, POOLING, BATCHES, specs.RaySpec], OF_LABELS),
        (
            "evaluate",
            [specs.CorpusSpec, specs.ScoreSpec, CHUNKS, POOLING, BATCHES, specs.LengthSpec],
            {"weight_column"},
        ),
        ("fine-tune", [specs.CorpusSpec, specs.TrainSpec, CHUNKS, POOLING, BATCHES], set()),
        ("chunk", [specs.CorpusSpec, CHUNKS], OF_LABELS),
        ("windows", [CHUNKS], set()),
        ("promote", [specs.CorpusSpec, specs.ScoreSpec, specs.GateSpec, BATCHES], {*OF_OUTPUTS, "weight_column"}),
    ],
)
def test_every_field_has_an_option_and_every_option_a_field(command, specifications, left_out):
    nested = {"chunks", "pooling", "batches"}
    fields = {name for spec in specifications for name in spec.model_fields} - nested
    paths = {
        "challenger",
        "registry",
        "who",
        "corpus",
        "file",
        "checkpoint",
        "encoder",
        "output",
        "config",
        "storage_block",
        "dry_run",
        "runner",
        "length_report",
        "head_checkpoint",
        "head_tail_checkpoint",
    }

    assert options_of(command) - paths == fields - left_out


@pytest.mark.parametrize(
    ("section", "got"),
    [("foo", "'foo'"), ("{fox: -1}", "{'fox': -1}"), ("{fox: heavy}", "{'fox': 'heavy'}"), ("[1.0]", "[1.0]")],
)
def test_label_weights_that_are_none_are_refused_in_one_sentence(tmp_path, section, got):
    (tmp_path / "c.yaml").write_text(f"spec: {{label_weights: {section}}}")

    code, _, said = belt("fine-tune", "c", "--encoder", "e", "--output", "o", "--config", str(tmp_path / "c.yaml"))

    assert (code, said) == (
        2,
        (
            "Error: --config, spec.label_weights: input should be balanced, or by label a number above 0 (such weights "
            f"go into --config), got {got}\n"
        ),
    )


def test_options_of_a_cluster_go_with_its_runner(tmp_path):
    arguments = ["score", "corpus", "--checkpoint", "model", "--output", str(tmp_path / "out")]

    code, _, said = belt(*arguments, "--num-workers", "2")
    assert (code, said) == (2, "Error: --num-workers goes with --runner ray, got --runner threads\n")
    code, _, said = belt(*arguments, "--runner", "ray", "--num-gpus", "2")
    assert (code, said) == (2, "Error: --num-gpus: input should be less than or equal to 1, got '2'\n")
    code, _, said = belt(*arguments, "--runner", "ray", "--address", "head")
    assert code == 2
    assert said.startswith("Error: --address: string should match pattern")
    code, _, said = belt(*arguments, "--runner", "spark")
    assert code == 2
    assert "'threads', 'ray'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--head-checkpoint", "m"], "--head-checkpoint goes with --length-report, which was not given"),
        (["--head-tail-checkpoint", "m"], "--head-tail-checkpoint goes with --length-report, which was not given"),
        (["--num-resamples", "200"], "--num-resamples goes with --length-report, which was not given"),
        (["--length-report", "--confidence", "1"], "--confidence: input should be less than 1, got '1'"),
        (["--length-report", "--min-bucket-documents", "x"], "--min-bucket-documents: input should be a valid integer"),
    ],
)
def test_options_of_a_length_report(option, message, tmp_path):
    code, _, said = belt("evaluate", "corpus", "--checkpoint", "m", "--output", tmp_path / "out", *option)

    assert code == 2
    assert said.startswith(f"Error: {message}")
    assert not (tmp_path / "out").exists()


def test_options_win_over_the_config_file_and_the_config_file_over_the_base():
    config = {"spec": {"chunks": {"chunk_size": 40, "stride": 20}, "threshold": 0.7}}
    base = {"chunks": {"chunk_size": 30, "stride": 30}, "pooling": {"pooling_space": "probabilities"}}
    options = {"stride": "10", "pooling_strategy": "max"}

    spec = build(specs.ScoreSpec, options, config, section="spec", base=base)

    assert spec == specs.ScoreSpec(
        chunks=CHUNKS(chunk_size=40, stride=10),
        pooling=POOLING(pooling_strategy="max", pooling_space="probabilities"),
        threshold=0.7,
    )


def test_without_options_the_checkpoint_decides():
    base = {"chunks": {"chunk_size": 30, "stride": 30}}

    assert build(specs.ScoreSpec, {"chunk_size": None}, {}, section="spec", base=base) == specs.ScoreSpec()


def test_a_training_seed_is_not_the_seed_of_the_chunks():
    spec = build(specs.TrainSpec, {"seed": "7"}, {}, section="spec")

    assert (spec.seed, spec.chunks.seed) == (7, 0)


def test_none_lifts_a_limit_and_zero_is_a_value():
    base = {"chunks": {"chunk_size": 30, "stride": 30, "maximal_text_length": 100}}

    spec = build(specs.ScoreSpec, {"maximal_text_length": "none"}, {}, section="spec", base=base)
    train = build(specs.TrainSpec, {"max_grad_norm": "none", "dropout": "0", "seed": "0"}, {}, section="spec")

    assert spec.chunks == CHUNKS(chunk_size=30, stride=30, maximal_text_length=None)
    assert (train.max_grad_norm, train.dropout, train.seed) == (None, 0.0, 0)


def test_an_empty_config_file_changes_nothing(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("spec:\n")

    assert read_config(path, sections=("corpus", "spec")) == {"spec": {}}
    assert read_config(None, sections=("corpus", "spec")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("spec: [1,", r"not YAML: .*line 1"),
        ("- spec", r"its sections must be corpus and spec, got \['spec'\]"),
        ("chunks: {}", "its sections must be corpus and spec, got chunks"),
        ("{1: 2, spec: {}}", "its sections must be corpus and spec, got 1, spec"),
        ("spec: 5", "section spec must hold `field: value` pairs, got 5"),
        ("spec: {chunk_size: 5}", "--config, spec.chunk_size: no such field; allowed are task, chunks,.* got 5"),
        ("spec: {chunks: {foo: 5}}", "--config, spec.chunks.foo: no such field; allowed are chunk_size, .*; got 5"),
        ("spec: {chunks: 5}", "--config, spec.chunks: .* got 5"),
        ("spec: {chunks: {chunk_size: x}}", "--config, spec.chunks.chunk_size: .*integer.* got 'x'"),
        ("corpus: {text_column: 5}", "--config, corpus.text_column: .*string, got 5"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--stride", "7"]])
def test_wrong_config_files(content, message, more, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)

    code, _, said = belt("fine-tune", "corpus", "--encoder", "e", "--output", "o", "--config", path, *more)

    assert code == 2
    assert re.match(f"Error: .*{message}", said), said


def test_a_config_file_that_is_not_there(tmp_path):
    code, _, said = belt("chunk", "c", "--encoder", "e", "--output", "o", "--config", tmp_path / "none.yaml")

    assert (code, said) == (2, f"Error: --config {tmp_path / 'none.yaml'}: No such file or directory\n")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--chunk-size", "x"], ["--chunk-size: input should be a valid integer, .*, got 'x'"]),
        (["--device", "tpu"], [r"--device: string should match pattern '\^\(auto\|cpu\|cuda.*, got 'tpu'"]),
        (["--chunk-size", "0"], ["--chunk-size: input should be greater than or equal to 1, got '0'"]),
        (["--stride", "40", "--chunk-size", "30"], [r"stride must be at most chunk_size \(30\), got 40: .*"]),
        (["--chunk-size", "30"], [r"stride must be at most .*, got 510: .* \(--stride was left out, .*default\)"]),
        (["--pooling-strategy", "[/x]"], [r"--pooling-strategy: .*'mean', 'max'.*, got '\[/x\]'"]),
        (["--dropout", "1"], ["--dropout: input should be less than 1, got '1'"]),
        (["--split", "train"], ["split and split_column go together, .*split='train'"]),
        (["--epochs", "0", "--schedule", "x"], ["--epochs: .*1, got '0'", "--schedule: .*'linear' or 'constant'.*'x'"]),
    ],
)
def test_wrong_values_name_the_option_what_was_given_and_what_is_allowed(options, messages):
    code, _, said = belt("fine-tune", "corpus", "--encoder", "e", "--output", "o", *options)

    assert code == 2
    lines = said.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.fullmatch(f"Error: {message}", line), line


@pytest.mark.parametrize("command", ["score", "evaluate"])
@pytest.mark.parametrize("precision", ["nonsense", "FP16", "16", ""])
def test_a_precision_that_there_is_not_is_wrong_usage_and_those_that_there_are_are_named(
    command, precision, tiny_checkpoint, tmp_path
):
    arguments = ["corpus", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out", "--precision", precision]

    code, shown, said = belt(command, *arguments)

    assert (code, shown) == (2, "")
    assert said == f"Error: --precision: input should be 'fp32', 'bf16' or 'fp16', got {precision!r}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "corpus"], "Missing option"),
        (["scor"], "No such command 'scor'"),
        (["chunk", "c", "--encoder", "e", "--output", "o", "--threshold", "1"], "No such option"),
    ],
)
def test_wrong_commands(arguments, message):
    code, _, said = belt(*arguments)

    assert code == 2
    assert message in said


def test_no_checkpoint(tmp_path):
    code, _, said = belt("score", "corpus", "--checkpoint", tmp_path, "--output", "o")

    assert code == 1
    assert said == (
        f"Error: {tmp_path}: no checkpoint there (looked for belt.json, config.json, and the published.json of a "
        "fine-tuning)\n"
    )


def test_windows_shows_the_windows_of_a_text(tiny_encoder, tmp_path):
    text, spec = words(80), CHUNKS(chunk_size=30, stride=20, drop_contained_tail=True)
    (tmp_path / "t.txt").write_text(text)

    code, shown, _ = belt(
        "windows", tmp_path / "t.txt", "--encoder", tiny_encoder, "--chunk-size", 30, "--stride", 20,
        "--drop-contained-tail",
    )  # fmt: skip

    assert code == 0
    tokens = load_tokenizer(tiny_encoder).tokenize([text])
    windows = chunk_windows(tokens.num_tokens_D, spec)
    found = re.findall(r"^ *(\d+) +\[(\d+), (\d+)\) +\[(\d+), (\d+)\)", shown, re.MULTILINE)
    assert [tuple(map(int, row)) for row in found] == [
        (index, start, stop, tokens.start_char_T[start], tokens.stop_char_T[stop - 1])
        for index, start, stop in zip(windows.chunk_index_C, windows.start_C, windows.stop_C, strict=True)
    ]
    overlap = int(np.sum(windows.stop_C - windows.start_C)) - len(tokens.input_ids_T)
    assert (
        f"{len(tokens.input_ids_T)} content tokens in {windows.num_chunks} chunks; {len(tokens.input_ids_T)} are read, "
        f"{overlap} of them more than once; each chunk gets 2 special tokens."
    ) in shown


def test_windows_of_an_empty_text(tiny_encoder, tmp_path):
    (tmp_path / "t.txt").write_text("")

    code, shown, _ = belt("windows", tmp_path / "t.txt", "--encoder", tiny_encoder, "--chunk-size", 30, "--stride", 30)

    assert code == 0
    assert "0 content tokens in 1 chunks; 0 are read" in shown


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "No such file or directory"),
        (b"\xff\xfe", [], "must be UTF-8, but byte 0 is not"),
        (b"text", ["--chunk-size", "63"], r"chunk_size must be at most 62 for .*2 of them special\), got 63"),
    ],
)
def test_windows_that_cannot_be_shown(content, options, message, tiny_encoder, tmp_path):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)

    options = ["--encoder", tiny_encoder, "--chunk-size", "30", "--stride", "30", *options]
    code, _, said = belt("windows", tmp_path / "t.txt", *options)

    assert code == 1
    assert re.fullmatch(f"Error: .*{message}\n", said), said


@pytest.mark.parametrize("verbose", [False, True])
def test_a_bug_shows_its_traceback_only_when_asked(verbose, monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError("first [line]\nsecond")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["belt", *(["--verbose"] if verbose else []), "score"])

    with pytest.raises(RuntimeError if verbose else SystemExit) as raised:
        cli.main()

    if not verbose:
        assert raised.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("Error: unexpected RuntimeError: first [line] second (run `belt --verbose")


def test_wrong_usage_is_one_line_per_mistake():
    with pytest.raises(WrongUsageError) as raised:
        build(specs.ChunkSpec, {"chunk_size": "x", "stride": "y"}, {}, section="chunks")

    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "f1"], "--metric: input should be 'accuracy', .*, got 'f1'"),
        (["--confidence", "1"], "--confidence: input should be less than 1, got '1'"),
        (["--max-recall-drop", "x"], "--max-recall-drop: input should be a valid number.*, got 'x'"),
        (["--min-documents", "0"], "--min-documents: input should be greater than or equal to 1, got '0'"),
    ],
)
def test_a_gate_that_cannot_be(options, message):
    arguments = ["corpus", "--challenger", "c", "--registry", "r", "--output", "o"]

    code, _, said = belt("promote", *arguments, *options)

    assert code == 2
    assert re.fullmatch(f"Error: {message}\n", said), said


def test_windows_of_two_checkpoints_are_said_whole_or_not_at_all(tmp_path):
    """What is left out would be the default's, and neither checkpoint's own."""
    (tmp_path / "c.yaml").write_text("spec: {chunks: {stride: 100}}")
    arguments = ["corpus", "--challenger", "c", "--registry", "r", "--output", "o", "--config", tmp_path / "c.yaml"]

    code, _, said = belt("promote", *arguments)

    assert code == 2
    assert re.match("Error: spec.chunks: two checkpoints are compared, so .* lacks chunk_size, ", said), said


def test_a_limit_of_the_gate_may_be_lifted():
    gate = build(specs.GateSpec, {"max_recall_drop": "none", "min_gain": "0.01"}, {}, section="gate")

    assert (gate.max_recall_drop, gate.min_gain, gate.max_ece) == (None, 0.01, None)


def test_models_of_nothing(tmp_path):
    code, _, said = belt("models", tmp_path)
    assert (code, said) == (1, f"Error: {tmp_path}: no registry of models there (no folder models)\n")
    code, _, said = belt("models", "rollback", tmp_path)
    words = "no alias 'champion' in this registry; nobody has named a checkpoint there yet"
    assert (code, said) == (1, f"Error: {tmp_path}: {words}\n")


def test_who_moves_an_alias(monkeypatch):
    monkeypatch.setenv("BELT_USER", "ann")
    assert cli_models.name_of("bob") == "bob"
    assert cli_models.name_of(None) == "ann"
    monkeypatch.delenv("BELT_USER")
    monkeypatch.setenv("LOGNAME", "carol")
    assert cli_models.name_of(None) == "carol"
