"""The fine-tuning benchmark: all ways have one gradient, sizes are foreseen, and a tiny run goes all the way."""

import gc
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from belt_tasks import data_parallel
from belt_tasks.errors import ConfigError
from tests.benchmarks import training_plot, training_report, training_run, training_ways
from tests.benchmarks.fine_tuning import check, write
from tests.benchmarks.protocol import TrainingSetup, UnavailableError
from tests.benchmarks.rounds import PeerError, Worker
from tests.benchmarks.training_run import GIB, Documents, Measurement, Options, Results, extrapolated
from tests.benchmarks.training_ways import WAYS
from tests.benchmarks.training_worker import TrainingWorker
from tests.conftest import save_tiny_encoder

ROOT = Path(__file__).parents[3]
ONE_BATCH, LONG, SHORT = Documents(lengths=(40,)), Documents(lengths=(400,)), Documents(lengths=(3, 4))


@pytest.fixture
def results(tmp_path):
    setup = TrainingSetup(
        encoder="somewhere/tiny", chunk_size=10, max_batch_tokens=48, device="cpu", num_threads=1, most_bytes=GIB
    )
    options = Options(
        setup=setup,
        ways=("belt-mean", "one-pass"),
        dropouts=(0.1,),
        num_rounds=3,
        timed=(SHORT, ONE_BATCH),
        weighed=(SHORT, ONE_BATCH, LONG),
        one_batch=ONE_BATCH,
        logs=tmp_path,
    )
    return Results(
        options=options,
        memory=[
            measured("belt-mean", SHORT, peak_bytes=GIB // 10),
            measured("belt-mean", ONE_BATCH, peak_bytes=GIB // 4),
            measured("belt-mean", LONG, peak_bytes=GIB * 11 // 40),
            measured("one-pass", SHORT, peak_bytes=GIB // 16),
            measured("one-pass", ONE_BATCH, peak_bytes=GIB // 4),
            measured("one-pass", LONG, estimated_bytes=2.5 * GIB, reason="needs 2.5 GiB (expected)"),
        ],
        gradients=[
            measured("belt-mean", SHORT, dropout=0.0, difference={"norm": 1e-7, "largest": 2e-8}),
            measured("belt-mean", ONE_BATCH, dropout=0.0, reason="its process ended"),
        ],
        times=[
            measured("belt-mean", SHORT, seconds=[1.0, 3.0, 2.0]),
            measured("belt-mean", ONE_BATCH, seconds=[3.0, 3.0, 3.0]),
            measured("one-pass", SHORT, seconds=[1.0, 1.0, 1.0]),
            measured("one-pass", ONE_BATCH, reason="its process ended"),
        ],
    )


def measured(way, documents, *, dropout=0.1, **more):
    return Measurement(way=way, dropout=dropout, documents=documents, **more)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"chunks": "4,x"}, "--chunks must be numbers with commas between them, got '4,x'"),
        ({"tokens": ""}, "--tokens must be numbers with commas between them, got ''"),
        ({"tokens": "0"}, "--tokens must be at least 1, got 0"),
        ({"dropout": "0,1"}, "--dropout must be at least 0 and less than 1, got 1.0"),
        ({"ways": "belt-mean,nobody"}, "--ways must name some of belt-mean, .*, got nobody"),
        ({"most_gib": 0.0}, "--most-gib must be more than 0, got 0.0"),
        ({"chunk_size": 63}, "chunk_size must be at most 62"),
        ({"device": "tpu"}, "device must be cpu, cuda"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(tiny_encoder, tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        check(**{"output": tmp_path, "model": tiny_encoder, "chunk_size": 30} | wrong)


def test_documents_are_a_short_batch_one_mini_batch_and_what_was_asked_for(tiny_encoder, tmp_path):
    options = check(
        output=tmp_path, model=tiny_encoder, chunk_size=30, max_batch_tokens=100, chunks="5,2", tokens="400,20"
    )

    assert [one.lengths for one in options.timed[1:]] == [(60,), (150,)]
    assert options.timed[0].lengths == (3, 7, 11, 15, 18, 22, 26, 30)
    assert options.one_batch.lengths == (90,)
    assert [one.num_tokens for one in options.weighed] == [20, 90, 132, 400]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_all_ways_have_the_same_gradient(minilm, pooling):
    setup = TrainingSetup(
        encoder=str(minilm), chunk_size=60, max_batch_tokens=128, device="cpu", num_threads=1, most_bytes=8 * GIB
    )
    found, losses = {}, {}
    with data_parallel.alone("cpu", "fp32") as ranks:
        model = training_ways.build_model(setup, dropout=0.0)
        trainer = training_ways.build_trainer(setup, model, ranks, (130, 20), pooling=pooling, dropout=0.0)
        for name, way in WAYS.items():
            losses[name] = way.prepare(trainer)()
            found[name] = training_ways.gradient_T(model)

    expected = found["one-pass"]
    for name, gradient in found.items():
        assert losses[name] == pytest.approx(losses["one-pass"], abs=1e-5), name
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("points", "at", "expected"),
    [
        ([], 5, None),
        ([(10, 4.0)], 30, 12.0),
        ([(10, 4.0), (20, 6.0)], 40, 10.0),
        ([(10, 4.0), (20, 6.0), (30, 20.0)], 12, 4.4),
        ([(10, 6.0), (20, 5.0)], 40, 5.0),
    ],
)
def test_memory_is_foreseen_on_a_line(points, at, expected):
    assert extrapolated(points, at) == (None if expected is None else pytest.approx(expected))


def test_what_would_need_too_much_is_not_tried(results):
    longer = Documents(lengths=(4_000,))

    assert results.refusal("belt-mean", 0.1, longer) is None  # no more than one mini-batch
    assert results.refusal("one-pass", 0.1, ONE_BATCH) is None
    assert results.refusal("one-pass", 0.1, longer) == "needs 23.5 GiB (expected from shorter documents)"


def test_a_way_that_failed_is_not_tried_with_longer_documents(results):
    results.memory[1] = measured("belt-mean", ONE_BATCH, reason="its process ended")

    assert results.refusal("belt-mean", 0.1, LONG) == "its process ended"
    assert results.refusal("belt-mean", 0.1, SHORT) is None


def test_tables_have_medians_ratios_and_reasons(results):
    text = training_report.markdown(
        results, {"device": "cpu", "cpu": "a machine", "cores": 1, "model": "tiny", "busy": 0.0}
    )

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["belt, mean", "2.00 (2.00 x; 100%)", "3.00 (-; 0%)"] in rows
    assert ["one pass", "64", "256", "left out: 2,560?"] in rows
    assert "belt, mean, dropout 0.1: 400 tokens take 1.10 times the memory of a document that fills one" in text
    assert "mini-batch (40 tokens): within 15%." in text
    assert "1.0e-07, 2.0e-08" in text
    assert "- one pass, dropout 0.1, 40 tokens: its process ended" in text


def test_memory_that_grows_is_told(results):
    results.memory[2].peak_bytes = GIB * 3 // 4

    assert "3.00 times" in training_report.bounded(results, "belt-mean", 0.1)
    assert "NOT within 15%" in training_report.bounded(results, "belt-mean", 0.1)
    assert training_report.bounded(results, "one-pass", 0.1) is None


def test_the_plot_is_a_png_even_without_results(results):
    drawn = imread(io.BytesIO(training_plot.lines_png(results, 0.1, "a machine")))
    empty = imread(io.BytesIO(training_plot.lines_png(Results(options=results.options), 0.1, "a machine")))

    assert drawn.shape[1] == empty.shape[1] > drawn.shape[0]


class WorkerHere:
    """What stands for a process: the same answers, from this one."""

    def __init__(self, dropout, setup, ranks):
        self._worker = TrainingWorker(dropout, setup, ranks)

    def answer(self):
        return {"ready": True}

    def ask(self, request):
        try:
            return self._worker.answer(request)
        except UnavailableError as error:
            raise PeerError(str(error)) from error

    def close(self):
        pass


@pytest.fixture
def frozen_heap():
    """What is imported is not looked through by every collection, of which a run has many."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
def test_a_tiny_run_has_tables_figures_and_a_plot(tiny_encoder, tmp_path, monkeypatch):
    sizes = {"chunk_size": 30, "max_batch_tokens": 64, "chunks": "3", "tokens": "400", "rounds": 2}
    options = check(output=tmp_path, model=tiny_encoder, **sizes)
    with data_parallel.alone("cpu", "fp32") as ranks:
        monkeypatch.setattr(
            training_run, "_started", lambda options, dropout, _: WorkerHere(dropout, options.setup, ranks)
        )
        results = training_run.run(options, lambda _: None)
    text = write(tmp_path, results, {}, busy=0.0)

    figures = json.loads((tmp_path / "fine_tuning.json").read_text())
    belt_nlp = [one for kind in ("memory", "seconds") for one in figures[kind] if one["way"] == "belt-nlp"]
    assert all("belt-nlp has the ids of BERT's special tokens in its code" in one["reason"] for one in belt_nlp)
    timed = [one for one in figures["seconds"] if one["way"] != "belt-nlp"]
    assert {(one["documents"], one["dropout"]) for one in timed} == {
        (title, dropout) for title in ("8 documents, 132 tokens", "90 tokens") for dropout in (0.1, 0.0)
    }
    assert all(len(one["seconds"]) == 2 and one["times_one_pass"] > 0.0 for one in timed)
    compared = [one for one in figures["gradients"] if one["way"] != "belt-nlp"]
    assert len(compared) == 2 * 3
    assert all(0.0 <= one["difference"]["norm"] < 1e-5 for one in compared)
    assert all(one["peak_bytes"] is not None for one in figures["memory"] if one["way"] != "belt-nlp")
    assert {one["documents"] for one in figures["growth"]} == {"400 tokens"}
    assert (tmp_path / "fine_tuning.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "fine_tuning.md").read_text().strip() == text.strip()
    assert text.count("\n## ") == 5


@pytest.mark.slow
def test_the_command_measures_in_processes(tiny_encoder, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tests.benchmarks.fine_tuning", "--model", tiny_encoder, "--output", output]
    options = ["--rounds", "1", "--chunks", "2", "--tokens", "60", "--dropout", "0", "--ways", "one-pass"]
    sizes = ["--chunk-size", "30", "--max-batch-tokens", "64"]

    result = subprocess.run([*command, *options, *sizes], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    figures = json.loads((output / "fine_tuning.json").read_text())
    assert all(len(one["seconds"]) == 1 for one in figures["seconds"])
    assert all(one["peak_bytes"] > 0 for one in figures["memory"])
    assert (output / "fine_tuning.md").read_text().strip() == result.stdout.strip()


def test_a_process_that_needs_too_much_ends_itself(tiny_encoder, tmp_path):
    setup = TrainingSetup(
        encoder=str(tiny_encoder), chunk_size=30, max_batch_tokens=64, device="cpu", num_threads=1, most_bytes=1
    )
    worker = Worker("0", setup, tmp_path / "log.txt", "tests.benchmarks.training_worker")

    with pytest.raises(PeerError, match=r"ended with exit code 3: it needs more than 0\.0 GiB"):
        worker.answer() and worker.ask({"wanted": "seconds", "way": "one-pass", "lengths": [3000]})
    worker.close()


@pytest.mark.parametrize("way", ["belt-mean", "one-pass"])
def test_memory_of_a_step_is_that_of_a_mini_batch_however_long_the_document(tmp_path, way):
    """Measured in processes of their own; one pass shows that it would be seen if it grew."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    encoder = save_tiny_encoder(tmp_path / "encoder", "bert", **sizes, max_position_embeddings=256)
    setup = TrainingSetup(
        encoder=str(encoder), chunk_size=254, max_batch_tokens=4096, device="cpu", num_threads=2, most_bytes=8 * GIB
    )
    peaks = []
    for num_chunks in (32, 160):  # two mini-batches, and ten
        worker = Worker("0.1", setup, tmp_path / "log.txt", "tests.benchmarks.training_worker")
        assert worker.answer()["ready"]
        worker.ask({"wanted": "peak_bytes", "way": way, "lengths": [8]})  # what is made once
        step = {"wanted": "peak_bytes", "way": way, "lengths": [254 * num_chunks]}
        peaks.append(min(worker.ask(step)["peak_bytes"] for _ in range(3)))  # threads' heaps now and then add to it
        worker.close()

    assert peaks[0] > GIB / 16
    assert (peaks[1] < 1.15 * peaks[0]) == (way == "belt-mean"), peaks
