"""The results: their numbers are those of the runs, the README shows what is kept, and nothing is made up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from belt_tasks.errors import ConfigError
from belt_tasks.length_comparison import LengthReport, LengthRow
from belt_tasks.specs import Head, LengthSpec
from flows.options import WrongUsageError
from tests.benchmarks import results, results_baseline, results_corpora, results_table
from tests.benchmarks.results_baseline import Baseline
from tests.benchmarks.results_corpora import SELECTIONS, Settings
from tests.benchmarks.results_runs import CorpusResult, SeedResult, WayRun
from tests.conftest import labelled_rows

ROOT = Path(__file__).parents[3]
README = f"# belt\n\nbefore\n\n{results_table.BEGIN}\n{results_table.NOTHING}\n{results_table.END}\n\nafter\n"

TOOK = {"head": (1_000, 30.0), "head_tail": (2_000, 90.0), "all": (1_500_000, 7_200.0)}
"""Tokens and seconds."""

TWICE = """
import json, shutil, sys
from pathlib import Path
from tests.benchmarks.results import main
folder, encoder, output, kept, readme = map(Path, sys.argv[1:])
for number in (1, 2):
    main(folder, epochs=1, seeds="3", output=output, kept=kept, readme=readme, encoder=encoder, chunk_size=30)
    shutil.copy(output / "results.json", output / f"results-{number}.json")
    weights = {str(path): path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    (output / f"weights-{number}.json").write_text(json.dumps(weights))
"""


def write(folder, name="movie_reviews", rows=None):
    folder.mkdir(parents=True, exist_ok=True)
    (labelled_rows(40) if rows is None else rows).write_parquet(folder / f"{name}.parquet")
    return folder


def row(selection, value, lower, upper, *, compared_with=None, metric="accuracy"):
    return LengthRow(
        kind="all", min_tokens=0, max_tokens=None, num_documents=400, metric=metric, selection=selection,
        compared_with=compared_with, value=value, lower=lower, upper=upper, num_tokens_encoded=1,
    )  # fmt: skip


def result(corpus="movie_reviews", *, gains=((0.05, 0.02, 0.08),), metric="accuracy", device="cpu"):
    """One whose selections have .8, .85 and .85 + the gain over the head."""
    seeds = []
    for seed, (gain, lower, upper) in enumerate(gains):
        rows = [row("head", 0.8, 0.75, 0.85, metric=metric), row("head_tail", 0.85, 0.8, 0.9, metric=metric)]
        rows += [row("all", 0.8 + gain, 0.8, 0.9, metric=metric)]
        rows += [row("all", gain, lower, upper, compared_with="head", metric=metric)]
        rows += [row("all", gain - 0.05, -0.01, 0.01, compared_with="head_tail", metric=metric)]
        runs = tuple(
            WayRun(
                selection=selection, checkpoint_digest="0", num_training_documents=9, num_validation_documents=1,
                epochs=3, best_epoch=2, num_tokens_trained=3 * tokens, training_s=seconds, num_tokens_scored=tokens,
                scoring_s=seconds / 10, training_device=device, scoring_device=device, precision="fp32",
            )
            for selection, (tokens, seconds) in TOOK.items()
        )  # fmt: skip
        seeds.append(
            SeedResult(
                seed=seed, num_test_documents=400, num_longer=356, rows=tuple(rows), runs=runs, date="2026-01-02",
                machine={"cpu": "a processor", "cores": 2}, versions={},
            )
        )  # fmt: skip
    baseline = Baseline(
        data_digest="0", value=0.9, lower=0.87, upper=0.93, num_training_documents=1600, num_test_documents=400,
        num_features=5, chosen={}, seconds=1.0,
    )  # fmt: skip
    return CorpusResult(
        corpus=corpus, head=Head(task="binary", labels=("neg", "pos")), metric=metric, encoder="an encoder",
        settings=Settings(), baseline=baseline, length=LengthSpec(), seeds=tuple(seeds),
    )  # fmt: skip


@pytest.mark.slow
def test_a_corpus_goes_all_the_way_and_once_only(tiny_encoder, tmp_path):
    folder, output = write(tmp_path / "data"), tmp_path / "out"
    kept, readme = tmp_path / "kept.json", tmp_path / "README.md"
    readme.write_text(README)

    done = subprocess.run(
        [sys.executable, "-c", TWICE, folder, tiny_encoder, output, kept, readme],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, second = (json.loads((output / f"results-{number}.json").read_text()) for number in (1, 2))
    assert second.pop("date") >= first.pop("date")
    assert second == first  # seconds and all
    weights = json.loads((output / "weights-1.json").read_text())
    assert len(weights) >= 3
    assert json.loads((output / "weights-2.json").read_text()) == weights

    shown = results_table.read(kept)
    assert shown == results_table.read(output / "results.json")
    (seed,) = shown["movie_reviews"].seeds
    (table,) = output.glob("movie_reviews/3/evaluation/runs/*/evaluation/length.json")
    report = LengthReport.model_validate_json(table.read_bytes())
    assert first["length_reports"] == {"movie_reviews": {"3": json.loads(table.read_text())}}
    assert (seed.seed, seed.num_test_documents, seed.num_longer) == (3, 8, report.group("longer").num_documents)
    assert [reading.is_at_home for reading in report.readings] == [True] * 3
    for selection in SELECTIONS:
        (path,) = output.glob(f"movie_reviews/3/{selection}/runs/*/fine_tuning.json")
        (card,) = output.glob(f"movie_reviews/3/{selection}/runs/*/checkpoint/belt.json")
        tuned, training = json.loads(path.read_text()), json.loads(card.read_text())["training"]
        run, reading = seed.run(selection), report.reading(selection)
        assert (run.num_tokens_trained, run.training_s) == (tuned["num_tokens_encoded"], tuned["training_s"])
        assert (run.num_tokens_scored, run.scoring_s) == (reading.num_tokens_encoded, reading.encode_s)
        assert run.num_training_documents + run.num_validation_documents == 32
        assert run.checkpoint_digest == reading.checkpoint_digest == tuned["checkpoint_digest"]
        assert (training["seed"], training["epochs"], training["chunks"]["selection"]) == (3, 1, selection)
        assert seed.row(selection) == report.row(report.group("all"), selection)
    assert seed.row("all", "head") == report.row(report.group("all"), "all", "head")
    assert shown["movie_reviews"].baseline.num_test_documents == 8
    assert shown["movie_reviews"].settings == Settings(epochs=1, chunk_size=30)
    assert str(tmp_path) not in kept.read_text()

    assert readme.read_text() == README.replace(results_table.NOTHING, results_table.block(shown))
    assert done.stdout.count(results_table.block(shown)) == 2


def test_the_readme_shows_what_is_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    block = results_table.block(results_table.read(results.KEPT))

    assert results_table.with_block(text, block, where="README.md") == text, "run `make results` or --readme README.md"


def test_one_seed_is_told_with_its_interval():
    lines = results_table.block({"movie_reviews": result()}).splitlines()

    assert lines[2].startswith("| movie_reviews: accuracy; 1,600 training and 400 test documents, 89% of these longer")
    assert lines[2].endswith("| tf-idf + linear | 0.9000 (0.8700 to 0.9300) |  |  |  |")
    assert lines[3] == (
        "|  | the head | 0.8000 (0.7500 to 0.8500) | +5.0 points (+2.0 to +8.0) | 3,000, 30.0 s | 1,000, 3.0 s |"
    )
    assert lines[5] == "|  | all | 0.8500 (0.8000 to 0.9000) |  | 4.50 M, 2.0 h | 1.50 M, 12.0 min |"
    assert lines[7] == (
        "- movie_reviews, film reviews, positive or negative (Pang and Lee 2004, polarity v2.0): reading past the "
        "first 510 tokens changes the accuracy by +5.0 points (95 % CI +2.0 to +8.0), a gain beyond chance, reading "
        "all instead of the first and the last 510 tokens by +0.0 points (95 % CI -1.0 to +1.0), no difference beyond "
        "chance; that is 1500.0 and 750.0 times as many tokens. an encoder, 3 epochs, the best of them by 10% held "
        "out, learning rate 5e-05, 8 documents a batch, mean pooling, fp32, seed 0; a processor, 2 cores, "
        "2026-01-02."
    )


def test_several_seeds_are_told_with_their_mean_and_deviation():
    gains = ((0.05, 0.02, 0.08), (0.01, -0.02, 0.04), (0.03, 0.01, 0.06))

    block = results_table.block({"movie_reviews": result(gains=gains, device="a GPU")})

    assert "| 0.8300 ± 0.0200 (0.8000 to 0.9000; 0.8000 to 0.9000; 0.8000 to 0.9000) |" in block
    assert "| +3.0 ± 2.0 points (+2.0 to +8.0; -2.0 to +4.0; +1.0 to +6.0) |" in block
    assert (
        "by +3.0 ± 2.0 points over 3 seeds (a gain beyond chance with 2 and no difference beyond chance with 1 of 3)"
    ) in block
    assert "seeds 0, 1, 2; a GPU, 2026-01-02." in block


def test_more_error_is_a_loss():
    block = results_table.block({"imdb_stars_long": result("imdb_stars_long", metric="mse")})

    assert (
        "the mean squared error (lower is better) by +0.05 (95 % CI +0.02 to +0.08), a loss beyond chance, reading"
    ) in block


def test_a_corpus_replaces_its_own_row_alone():
    old, new = result("movie_reviews"), result("movie_reviews", gains=((0.0, -0.1, 0.1),))
    kept = {"imdb": result("imdb"), "movie_reviews": old}

    merged = results_table.merge(kept, {"movie_reviews": new})

    assert list(merged.items()) == [("movie_reviews", new), ("imdb", kept["imdb"])]


def test_results_of_a_run_elsewhere_are_merged(tmp_path):
    kept, other, readme = tmp_path / "kept.json", tmp_path / "other.json", tmp_path / "README.md"
    readme.write_text(README)
    results_table.write_kept(kept, {"movie_reviews": result()})
    results_table.write_kept(other, {"imdb": result("imdb")})

    results.main(merge=[other], kept=kept, readme=readme)

    assert results_table.read(kept) == {"movie_reviews": result(), "imdb": result("imdb")}
    assert readme.read_text() == README.replace(results_table.NOTHING, results_table.block(results_table.read(kept)))
    other.write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json: must hold results, got KeyError: 'results'"):
        results_table.read(other)


@pytest.mark.parametrize("text", ["no block", README + README, README.replace(results_table.END, "")])
def test_a_readme_without_exactly_one_block_is_refused(text):
    with pytest.raises(ConfigError, match=r"README.md: must have one line '<!-- results"):
        results_table.with_block(text, "", where="README.md")


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("movie_reviews", "nothing"), "--only must name some of movie_reviews, .*, got nothing"),
        ((), "--only must name some of .*, got none"),
        (("imdb",), "--only names imdb, but there is neither imdb.parquet nor a folder imdb"),
    ],
)
def test_a_corpus_that_is_not_there_is_told(tmp_path, only, message):
    with pytest.raises(ConfigError, match=message):
        results_corpora.find(write(tmp_path), only)


def test_a_corpus_that_is_not_as_it_should_be_is_told(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: must be a folder with corpora, there is no such folder"):
        results_corpora.find(tmp_path / "nowhere", None)
    with pytest.raises(ConfigError, match=r"must have some of movie_reviews.parquet, .*, has none"):
        results_corpora.find(tmp_path, None)
    write(tmp_path, rows=labelled_rows(4).drop("label").rename({"split": "part"}))
    with pytest.raises(
        ConfigError, match=r"reviews.parquet: a corpus must have .*, lacks label, split; it has doc_id, text, part"
    ):
        results_corpora.find(tmp_path, None)
    write(tmp_path, rows=labelled_rows(4).with_columns(split=pl.lit("train")))
    with pytest.raises(ConfigError, match="column split must hold train and test, has no row of test"):
        results_corpora.find(tmp_path, None)
    (tmp_path / "movie_reviews.parquet").write_text("no Parquet")
    with pytest.raises(ConfigError, match=r"movie_reviews.parquet: must be Parquet"):
        results_corpora.find(tmp_path, None)


def test_a_corpus_may_be_a_folder_and_the_large_one_has_to_be_named(tmp_path):
    write(tmp_path / "movie_reviews", "part-0", labelled_rows(20))
    write(tmp_path / "movie_reviews", "part-1", labelled_rows(20, seed=1))
    write(tmp_path, "imdb")

    (found,) = results_corpora.find(tmp_path, None)

    assert (found.name, len(found.rows())) == ("movie_reviews", 40)
    assert [each.name for each in results_corpora.find(tmp_path, ("imdb", "movie_reviews"))] == [
        "movie_reviews",
        "imdb",
    ]


def test_a_rehearsal_draws_the_same_documents_and_leaves_its_file(tmp_path):
    (found,) = results_corpora.find(write(tmp_path / "data"), None)

    drawn = results_corpora.sample(found, 5, tmp_path / "a.parquet")
    written_at = (tmp_path / "a.parquet").stat().st_mtime_ns
    again = results_corpora.sample(found, 5, tmp_path / "a.parquet")

    assert again == drawn
    assert (tmp_path / "a.parquet").stat().st_mtime_ns == written_at
    assert drawn.rows().equals(results_corpora.sample(found, 5, tmp_path / "b.parquet").rows())
    assert drawn.rows()["split"].value_counts().sort("split")["count"].to_list() == [5, 5]
    assert drawn.rows().join(found.rows(), on=list(results_corpora.COLUMNS), how="anti").is_empty()


def test_the_baseline_learns_and_is_kept(tmp_path):
    (found,) = results_corpora.find(write(tmp_path / "data", rows=labelled_rows(60)), None)

    measured = results_baseline.baseline(found, "binary", LengthSpec(), tmp_path / "baseline.json")

    assert measured.value == 1.0
    assert (measured.num_training_documents, measured.num_test_documents) == (48, 12)
    again = results_baseline.baseline(found, "binary", LengthSpec(), tmp_path / "baseline.json")
    assert again == measured  # seconds and all


def test_the_baseline_of_numbers_is_measured_by_their_squared_error(tmp_path):
    number = pl.when(pl.col("label") == "fox").then(2).otherwise(7)
    rows = labelled_rows(60).with_columns(label=number.cast(pl.Int64))
    (found,) = results_corpora.find(write(tmp_path, "imdb_stars_long", rows), None)

    measured = results_baseline.baseline(found, "regression", LengthSpec(), tmp_path / "baseline.json")

    assert 0 < measured.lower < measured.value < measured.upper < np.var([2, 7])
    assert found.known.settings.train_spec("all", found.known.task, seed=0).task == "regression"


@pytest.mark.parametrize("text", ["", "one", "0,0", "-1", "1,"])
def test_wrong_seeds_are_told(text):
    with pytest.raises(WrongUsageError, match="--seeds must be different numbers from 0 on"):
        results._seeds(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs: .* greater than or equal to 1, got 0"),
        ({"device": "tpu"}, "--device: .*, got tpu"),
        ({"chunk_size": 0}, "--chunk-size: .*, got 0"),
    ],
)
def test_wrong_settings_are_told(changes, message):
    with pytest.raises(WrongUsageError, match=message):
        results._changed(Settings(), changes)


def test_every_selection_is_fine_tuned_alike():
    specs = [Settings().train_spec(selection, None, seed=1) for selection in SELECTIONS]

    different = {spec.model_copy(update={"chunks": specs[0].chunks}).model_dump_json() for spec in specs}
    assert len(different) == 1
    assert [spec.chunks.selection for spec in specs] == list(SELECTIONS)
