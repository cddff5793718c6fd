"""Promotion as a deployment runs it: real Prefect, two tiny checkpoints, one of them better, held-out documents."""

import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.exceptions import ParameterTypeError
from typer.testing import CliRunner

from belt_tasks import checkpoint as checkpoints
from belt_tasks import promotion, registry, score_tables, scoring, storage
from belt_tasks.errors import ConfigError, ConflictError, TransientError
from belt_tasks.specs import ChunkSpec, CorpusSpec, GateSpec, ScoreSpec, TrainSpec
from flows import cli, tasks
from flows.fine_tune import fine_tune
from flows.promote import promote
from tests.conftest import labelled_rows
from tests.flows.conftest import write_files

GATE = GateSpec(num_resamples=200, min_documents=40)
SPEC = ScoreSpec(device="cpu")
TRAIN = TrainSpec(task="multiclass", chunks=ChunkSpec(chunk_size=30, stride=30), dropout=0.0, device="cpu")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> str:
    return write_files(
        tmp_path_factory.mktemp("held-out") / "corpus", labelled_rows(60, seed=7, most_words=30), num_files=2
    )


@pytest.fixture(scope="module")
def models(tiny_encoder, tmp_path_factory) -> dict[str, str]:
    """Outputs of fine-tunings: one that learned, one that did not, and another that did not."""
    folder = tmp_path_factory.mktemp("models")
    corpus = write_files(folder / "corpus", labelled_rows(120, seed=1, most_words=30), num_files=1)
    for name, spec in (
        ("good", TRAIN.model_copy(update={"epochs": 4, "learning_rate": 2e-3})),
        ("poor", TRAIN.model_copy(update={"epochs": 1, "learning_rate": 1e-9})),
        ("other", TRAIN.model_copy(update={"epochs": 1, "learning_rate": 1e-9, "seed": 1})),
    ):
        fine_tune(corpus, str(tiny_encoder), str(folder / name), CorpusSpec(), spec)
    return {name: str(folder / name) for name in ("good", "poor", "other")}


@pytest.fixture
def run(held_out, models, tmp_path):
    """Promote one of the models, by name."""

    def run(name, *, gate=GATE, **more):
        registry_uri = more.pop("registry_uri", str(tmp_path / "registry"))
        output_uri = str(tmp_path / "out")
        return promote(models[name], registry_uri, held_out, output_uri, CorpusSpec(), SPEC, gate, **more)

    return run


@pytest.fixture
def models_uri(tmp_path) -> str:
    return str(tmp_path / "registry")


def digest(uri: str) -> str:
    return checkpoints.checkpoint_digest(checkpoints.resolve(uri))


def test_the_first_model_is_the_champion_and_a_better_one_takes_its_place(run, models, models_uri, client):
    first = run("poor")
    second = run("good", who="ann")

    assert (first.outcome, second.outcome) == ("promoted", "promoted")
    entries = registry.history(models_uri)
    poor, good = digest(models["poor"]), digest(models["good"])
    moves = [("challenger", None, poor), ("champion", None, poor), ("challenger", poor, good), ("champion", poor, good)]
    assert [(entry.alias, entry.from_digest, entry.to_digest) for entry in entries] == moves
    assert [entry.who for entry in entries] == ["the gate", "the gate", "ann", "ann"]
    assert entries[-1] == second.entry
    assert entries[-1].why == second.record.why
    assert promotion.read_decision(models_uri, entries[-1].decision) == second.record
    assert second.record.gain_lower > 0
    assert second.record.num_documents == 60
    assert (second.record.champion_digest, second.record.challenger_digest) == (poor, good)
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["promote-decision"]))
    (shown,) = [it for it in client.read_artifacts(artifact_filter=wanted) if second.record.id in it.data]
    assert shown.data.startswith("## promote: 60 held-out documents")
    assert f"| accuracy | {second.record.champion_metrics['accuracy']:.4f} |" in shown.data


def test_what_is_not_better_is_held_and_what_is_worse_rejected(run, models, models_uri):
    run("good")
    worse = run("poor")
    run_again = run("good")

    assert worse.outcome == "rejected"
    assert worse.record.decision == "reject"
    assert run_again.outcome == "champion already"
    there = registry.aliases(registry.history(models_uri))
    assert there["champion"].to_digest == digest(models["good"])
    assert there["challenger"].to_digest == digest(models["poor"])

    poor = f"{models_uri}-2"
    run("poor", registry_uri=poor)
    held = run("other", registry_uri=poor, gate=GATE.model_copy(update={"max_recall_drop": None}))
    assert held.outcome == "held"
    assert registry.find(poor, "champion").to_digest == digest(models["poor"])


def test_what_a_person_took_back_stays_so_whatever_is_measured_then(run, models, models_uri):
    run("poor")
    first = run("good")
    registry.roll_back(models_uri, "champion", who="bob", why="too slow")

    again = run("good")

    assert (again.outcome, again.entry, again.decision) == ("taken back", None, first.decision)
    assert registry.find(models_uri, "champion").to_digest == digest(models["poor"])
    other = run("good", gate=GATE.model_copy(update={"resampling_seed": 1}))
    assert (other.outcome, other.record.decision, other.entry) == ("taken back", "promote", None)
    run("other")
    registry.put_alias(models_uri, "champion", digest(models["other"]), who="bob", why="quicker")
    assert run("good", gate=GATE.model_copy(update={"min_recall": 0.0})).outcome == "taken back"
    registry.put_alias(models_uri, "champion", digest(models["good"]), who="bob", why="after all")
    assert run("good").outcome == "champion already"


def test_a_person_may_approve_of_what_was_taken_back(run, held_out, models, models_uri, tmp_path):
    run("poor")
    run("good")
    registry.roll_back(models_uri, "champion", who="bob", why="too slow")
    record = run("good", gate=GATE.model_copy(update={"resampling_seed": 1})).record
    plan = promotion.plan_promotion(models["good"], models_uri, held_out, str(tmp_path / "out"), GATE, "x")

    told = promotion.promote(plan, record, who="eve", why="quick enough", is_approved=True)

    assert told.outcome == "promoted"
    assert registry.find(models_uri, "champion").to_digest == digest(models["good"])


def test_the_speed_of_a_model_is_that_of_all_documents_that_it_read(held_out, models, tmp_path):
    registry_uri, corpus = str(tmp_path / "registry"), tmp_path / "held-out"
    shutil.copytree(held_out, corpus)
    gate = GATE.model_copy(update={"max_slowdown": 1000.0})

    def measured(name):
        arguments = (registry_uri, str(corpus), str(tmp_path / "out"), CorpusSpec(), SPEC, gate)
        return promote(models[name], *arguments).record

    measured("good")
    (file, *_) = sorted(corpus.glob("*.parquet"))
    rows = pl.read_parquet(file)
    rows.with_columns(text=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("a fox")).otherwise("text")).write_parquet(
        file
    )
    measured("poor")  # of the champion one document is scored, of the challenger all

    runs = score_tables.read_table(f"{tmp_path}/out/scores/{digest(models['good'])}", "runs").sort("started_at")
    assert runs["num_documents"].to_list() == [60, 1]
    scored = [promotion._encode_s(run) for run in runs.to_dicts()]
    assert scored == pytest.approx([runs["encode_s"].sum() / 61] * 2)


def test_finished_work_is_found_again(run, held_out, models, models_uri, tmp_path, monkeypatch):
    run("poor")
    with monkeypatch.context() as patch:  # killed before the champion moves
        patch.setattr(tasks, "promote", tasks.bind(lambda *_, **__: pytest.fail("killed")))
        with pytest.raises(BaseException, match="killed"):
            run("good")
    assert registry.find(models_uri, "champion").to_digest == digest(models["poor"])

    monkeypatch.setattr(scoring, "encode_windows", lambda *_, **__: pytest.fail("encoded again"))
    before = decisions(models_uri)
    done = run("good")
    assert done.outcome == "promoted"
    assert decisions(models_uri) == before
    again = run("good")  # killed after the champion moved, say
    assert (again.outcome, again.record, again.entry) == ("champion already", done.record, done.entry)
    assert len(registry.history(models_uri)) == 4
    assert {path.name for path in (tmp_path / "out" / "scores").iterdir()} == {
        digest(models[name]) for name in ("poor", "good")
    }
    assert not storage.is_directory(f"{held_out}/scores")


def decisions(models_uri: str) -> set[str]:
    return {path.name for path in (Path(models_uri) / "decisions").glob("*.json")}


def test_a_champion_that_changed_meanwhile_stays(run, models, models_uri, monkeypatch):
    run("poor")
    decide = promotion.decide_promotion

    def decide_late(plan, *arguments):
        record = decide(plan, *arguments)
        run_other()
        return record

    def run_other():
        model = tasks.promotion.model_store.add(models_uri, models["other"], who="bob")
        registry.put_alias(models_uri, "champion", model.digest, who="bob", why="by hand")

    monkeypatch.setattr(tasks, "decide_promotion", tasks.bind(decide_late))
    with pytest.raises(ConflictError, match=f"champion is {digest(models['other'])} by now .entry 4, bob"):
        run("good")
    assert registry.find(models_uri, "champion").who == "bob"

    monkeypatch.undo()
    assert run("good").record.champion_digest == digest(models["other"])


def test_of_two_promotions_at_once_one_wins(models, models_uri, held_out, tmp_path):
    """Both were measured against the same champion."""
    plans, corpus = [], CorpusSpec()
    for name in ("good", "other"):
        plan = promotion.plan_promotion(models[name], models_uri, held_out, str(tmp_path / "out"), GATE, "x")
        manifests = [
            tasks.score_corpus.score_corpus(held_out, each.checkpoint_uri, each.output_uri, corpus, SPEC)
            for each in plan.scorings
        ]
        plans.append((plan, promotion.decide_promotion(plan, manifests, held_out, corpus, SPEC, GATE)))
    barrier = threading.Barrier(2)

    def carry_out(plan_and_record):
        barrier.wait()
        try:
            return promotion.promote(*plan_and_record, who="x", why="y").challenger_digest
        except ConflictError:
            return None

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(carry_out, plans))

    assert outcomes.count(None) == 1
    assert registry.find(models_uri, "champion").to_digest in outcomes
    assert sum(entry.alias == "champion" for entry in registry.history(models_uri)) == 1


def test_a_corpus_that_changed_between_the_scorings_is_no_comparison(models, models_uri, tmp_path):
    rows = labelled_rows(50, seed=3, most_words=20)
    corpus_uri = write_files(tmp_path / "corpus", rows, num_files=1)
    promote(models["poor"], models_uri, corpus_uri, str(tmp_path / "out"), CorpusSpec(), SPEC, GATE)
    plan = promotion.plan_promotion(models["good"], models_uri, corpus_uri, str(tmp_path / "out"), GATE, "x")
    manifests = []
    for each in plan.scorings:
        manifests.append(tasks.score_corpus.score_corpus(corpus_uri, each.checkpoint_uri, each.output_uri, spec=SPEC))
        other = rows.with_columns(text=pl.when(pl.col("doc_id") == "doc-0007").then(pl.lit("x")).otherwise("text"))
        other.write_parquet(f"{corpus_uri}/part-0.parquet")

    with pytest.raises(ConfigError, match="0 only by the champion, 0 only by the challenger, 1 with another text"):
        promotion.decide_promotion(plan, manifests, corpus_uri, CorpusSpec(), SPEC, GATE)


def test_a_registry_and_documents_on_s3(models, held_out, s3_root):
    storage.put_directory(Path(held_out), f"{s3_root}/held-out", last="")
    arguments = (f"{s3_root}/registry", f"{s3_root}/held-out", f"{s3_root}/out", CorpusSpec(), SPEC, GATE)

    outcomes = [promote(models[name], *arguments).outcome for name in ("poor", "good", "poor")]

    assert outcomes == ["promoted", "promoted", "rejected"]
    pinned = checkpoints.resolve(f"{s3_root}/registry@champion")
    assert checkpoints.load_checkpoint(pinned).digest == digest(models["good"])


def test_a_dropped_connection_is_retried(run, monkeypatch):
    monkeypatch.setattr(tasks, "RETRY_DELAYS_S", [0.0, 0.0, 0.0])
    calls, plan = [], promotion.plan_promotion

    def plan_third_time_lucky(*arguments):
        calls.append(1)
        if len(calls) < 3:
            raise TransientError("dropped connection")
        return plan(*arguments)

    monkeypatch.setattr(tasks, "plan_promotion", tasks.bind(plan_third_time_lucky))
    assert run("poor").outcome == "promoted"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gate": {"confidence": 2}}, ParameterTypeError, "gate.confidence"),
        ({"gate": {"metric": "f1"}}, ParameterTypeError, "gate.metric"),
        ({"approval": "nobody"}, ParameterTypeError, "approval"),
        ({"who": ""}, ParameterTypeError, "who"),
        ({"gate": {"metric": "mse"}}, ConfigError, "metric of a multiclass task must be one of accuracy, .* got 'mse'"),
        ({"challenger_uri": "nowhere"}, ConfigError, "nowhere: no checkpoint there"),
        ({"corpus": {"label_column": "truth"}}, ConfigError, "no column 'truth'"),
        ({"approval": "person"}, ConfigError, "to wait for a person a run must be one of a deployment"),
    ],
)
def test_what_is_wrong_is_said(run, models, held_out, tmp_path, change, error, words):
    run("poor")
    parameters = {
        "challenger_uri": models["good"],
        "registry_uri": str(tmp_path / "registry"),
        "corpus_uri": held_out,
        "output_uri": str(tmp_path / "out"),
        "spec": SPEC,
    }

    with pytest.raises(error, match=words):
        promote(**(parameters | change))

    assert registry.find(str(tmp_path / "registry"), "champion").to_digest == digest(models["poor"])


def test_other_labels_are_no_comparison(run, tiny_checkpoint, held_out, models_uri, tmp_path):
    run("poor")

    with pytest.raises(ConfigError, match=re.escape("nothing to evaluate")):  # ham, other and spam
        promote(tiny_checkpoint, models_uri, held_out, str(tmp_path / "out"), CorpusSpec(), SPEC, GATE)


def test_the_command_line_promotes_lists_and_goes_back(models, held_out, models_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("BELT_USER", "ann")
    config = tmp_path / "c.yaml"
    config.write_text("gate: {num_resamples: 200, min_documents: 61}\nspec: {device: cpu}\n")
    poor, good = digest(models["poor"]), digest(models["good"])

    def belt(*arguments):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    def promoted(name, *more):
        paths = ["--challenger", models[name], "--registry", models_uri, "--output", tmp_path / "out"]
        return belt("promote", held_out, *paths, "--config", config, *more)

    code, shown, said = promoted("poor")
    assert (code, said) == (0, "")
    assert shown.startswith(f"{poor} stays the challenger: not every check passed.\n")
    assert "| documents | 60 | 61 | **not passed** |" in shown
    for name in ("poor", "good"):
        code, shown, said = promoted(name, "--min-documents", 40)
        assert (code, said) == (0, "")
    assert f"{good} is the champion now.\n\n- champion is {good} instead of {poor} (entry 4, ann: gain in acc" in shown

    code, listed, said = belt("models", models_uri)
    assert (code, said) == (0, "")
    assert f"| {good} | challenger, champion | multiclass (2) |" in listed
    assert f"| 4 | champion | {poor[:12]} | {good[:12]} |" in listed

    assert belt("score", held_out, "--checkpoint", f"{models_uri}@champion", "--output", tmp_path / "night")[0] == 0
    assert belt("models", "rollback", models_uri, "--why", "slow", "--who", "bob") == (
        0, f"champion is {poor} instead of {good} (entry 5, bob: slow).\n\n", ""
    )  # fmt: skip
    assert registry.find(models_uri, "champion").to_digest == poor
    assert belt("models", "assign", models_uri, good, "--why", "fast enough", "--who", "bob") == (
        0, f"champion is {good} instead of {poor} (entry 6, bob: fast enough).\n\n", ""
    )  # fmt: skip
    assert belt("models", "assign", models_uri, "f" * 64, "--why", "x")[0] == 1
    tables = score_tables.read_table(str(tmp_path / "night"), "predictions")
    assert tables["checkpoint_digest"].unique().to_list() == [good]
