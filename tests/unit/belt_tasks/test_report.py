"""Reports of real runs: what they say, that they quote no text unasked, and that they survive kills and clean-ups."""

import html
import re
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from belt_tasks import pages, publishing, reference, report, run_list, statistics, storage
from belt_tasks.clean import clean_up
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.report import ScoreReport, report_again, score_report
from belt_tasks.run_list import list_runs
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, DriftSpec, ScoreSpec
from tests.conftest import save_tiny_checkpoint, words

ROOT = Path(__file__).parents[3]
LIMITS = DriftSpec(min_documents=20)
MARKED = "xylophone"


def spec(**more) -> ScoreSpec:
    return ScoreSpec(device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.5, **more)


def write(folder, name: str, texts: list[str | None]) -> None:
    folder.mkdir(exist_ok=True)
    rows = {"doc_id": [f"{name}-{i}" for i in range(len(texts))], "text": texts}
    pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")


@pytest.fixture
def corpus(tmp_path):
    """Thirty documents and one without a text."""
    write(tmp_path / "corpus", "a", [f"{MARKED} {words(9 * i, seed=i)}" for i in range(30)] + [None])
    return tmp_path / "corpus"


def run_of(output: str, manifest: Manifest) -> RunRef:
    return RunRef(output_uri=output, run_id=manifest.run["run_id"])


def night(corpus, checkpoint: str, output: str, limits: DriftSpec = LIMITS, **more) -> ScoreReport:
    manifest = score_corpus(str(corpus), checkpoint, output, spec=spec(**more))
    return score_report(run_of(output, manifest), manifest, limits)


def text_of(uri: str) -> str:
    """What a page shows."""
    page = storage.read_bytes(uri).decode()
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_a_report_tells_what_the_run_did(corpus, tiny_checkpoint, output):
    done = night(corpus, tiny_checkpoint, output)

    told = text_of(done.report_uri)
    manifest = publishing.read_run_manifest(done.run)
    assert f"Scoring run {done.run.run_id}" in told
    assert "This run is what later ones are compared with" in told
    assert (done.is_reference, done.drift) == (True, None)
    assert "documents scored 30 30 new, 0 changed, 0 unchanged, 0 removed" in told
    assert f"content tokens {manifest.run['num_tokens']:,}" in told
    assert "1 rows of the files that the run read were put aside" in told
    assert "chunks.chunk_size 30" in told
    assert f"checkpoint digest {manifest.run['checkpoint_digest']}" in told
    counted = statistics.of_run(done.run, manifest)
    for label, count in zip(counted.labels, counted.label_counts, strict=True):
        assert f"{label} {count} {count / 30:.1%} {count / 30:.1%}" in told
    quality = text_of(done.quality_uri)
    assert "text_null The row has no text. An empty text would be accepted. 1" in quality
    assert f"{pages.short(f'{corpus}/a.parquet', 80)} 30 a-30 text_null column 'text' is null" in quality


def test_drift_is_told(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", [f"\N{SNOWMAN} {words(400, seed=i)}" for i in range(30)])

    done = night(corpus, tiny_checkpoint, output)

    assert done.has_drifted
    told = text_of(done.report_uri)
    assert done.verdict in told
    assert re.search(r"document lengths \(PSI \d+\.\d\d, KS 1\.00\)", done.verdict)
    assert "document lengths KS 1.0000 0.1000 below 0.0001 drifted" in told
    assert report.read_report(done.run) == done


def test_a_report_is_made_once_unless_asked_again_or_with_other_limits(corpus, tiny_checkpoint, output):
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", [words(9, seed=i) for i in range(30)])
    done = night(corpus, tiny_checkpoint, output)
    before = storage.read_bytes(done.report_uri)
    storage.remove_files([done.report_uri])

    again = night(corpus, tiny_checkpoint, output)

    assert again == done
    assert not storage.exists(done.report_uri)
    assert report_again(output) == done
    assert storage.read_bytes(done.report_uri) == before
    other = night(corpus, tiny_checkpoint, output, DriftSpec(min_documents=31))
    assert other.verdict == ("No verdict on drift: fewer than 31 documents (30 here, 30 in the reference)")
    assert other.verdict in text_of(other.report_uri)
    assert report_again(output).spec == other.spec


def test_who_listens_is_told_once_of_a_run_that_has_drifted(corpus, tiny_checkpoint, output):
    told = []

    def listened(limits: DriftSpec = LIMITS) -> ScoreReport:
        manifest = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
        return score_report(run_of(output, manifest), manifest, limits, announce=told.append)

    listened()
    write(corpus, "b", [words(400, seed=i) for i in range(30)])
    assert not listened(DriftSpec(min_documents=31)).has_drifted
    assert told == []

    done = listened()

    assert [each.run for each in told] == [done.run]
    assert done.is_announced
    assert listened() == done
    assert listened(DriftSpec(min_documents=21)).is_announced
    assert report_again(output).is_announced
    assert len(told) == 1


def test_who_did_not_listen_when_a_report_was_made_is_told_later(corpus, tiny_checkpoint, tmp_path):
    output, told = str(tmp_path / "out"), []
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", [words(400, seed=i) for i in range(30)])
    done = night(corpus, tiny_checkpoint, output)
    write(corpus, "c", ["fox"])

    manifest = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    score_report(run_of(output, manifest), manifest, LIMITS, announce=told.append)

    assert [each.run for each in told] == [done.run]


def test_one_corpus_has_one_data_version_whatever_scores_it(corpus, tiny_checkpoint, tmp_path):
    first = night(corpus, tiny_checkpoint, str(tmp_path / "one"))
    again = night(corpus, tiny_checkpoint, str(tmp_path / "one"), full=True)
    other = night(corpus, tiny_checkpoint, str(tmp_path / "two"), evidence="all")
    write(corpus, "b", ["fox"])
    later = night(corpus, tiny_checkpoint, str(tmp_path / "two"), evidence="all")

    assert first.run != again.run
    assert first.data_version == again.data_version == other.data_version != later.data_version


def test_texts_stay_in_the_corpus_unless_passages_are_asked_for(corpus, tiny_checkpoint, tmp_path):
    silent = night(corpus, tiny_checkpoint, str(tmp_path / "silent"))
    told = night(corpus, tiny_checkpoint, str(tmp_path / "told"), evidence_text=True)

    for name in ("report_uri", "quality_uri"):
        assert MARKED not in storage.read_bytes(getattr(silent, name)).decode()
    assert "Texts stay in the corpus" in text_of(silent.report_uri)
    assert MARKED in text_of(told.report_uri)
    assert "characters passage" in text_of(told.report_uri)


@pytest.mark.parametrize("evidence", ["none", "all"])
def test_evidence_is_told_where_there_is_some(corpus, tiny_checkpoint, tmp_path, evidence):
    done = night(corpus, tiny_checkpoint, str(tmp_path / "out"), evidence=evidence)

    assert ("Evidence" in text_of(done.report_uri)) == (evidence == "all")


@pytest.mark.parametrize(
    ("task", "labels"), [("multilabel", ("a", "b")), ("multilabel", ("a",)), ("regression", ("stars",))]
)
def test_every_task_has_a_report(corpus, tiny_encoder, tmp_path, task, labels):
    checkpoint, output = (
        save_tiny_checkpoint(tmp_path / "model", tiny_encoder, labels, task=task),
        str(tmp_path / "out"),
    )
    first = night(corpus, checkpoint, output)
    write(corpus, "b", [words(9 * i, seed=i) for i in range(30)])

    second = night(corpus, checkpoint, output)

    for done in (first, second):
        assert ("Documents by label" in text_of(done.report_uri)) == (task == "multilabel")
    assert second.verdict == "No drift"
    assert [measure.quantity for measure in second.drift.measures].count("labels") == (task == "multilabel")


def test_a_run_that_only_takes_documents_away_has_a_report(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    write(corpus, "b", ["fox", "dog"])
    night(corpus, tiny_checkpoint, output)
    (corpus / "b.parquet").unlink()

    done = night(corpus, tiny_checkpoint, output)

    assert (done.drift.verdict, done.drift.num_documents, done.drift.measures) == ("too_few_documents", 0, ())
    assert "documents scored 0 0 new, 0 changed, 30 unchanged, 2 removed" in text_of(done.report_uri)


@pytest.mark.parametrize("on_the_way", [True, False], ids=["reported on the way", "left out"])
def test_steps_have_reports_and_become_the_reference(corpus, tiny_checkpoint, tmp_path, on_the_way):
    output = str(tmp_path / "out")
    write(corpus, "b", [words(30, seed=i) for i in range(20)])
    manifest = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(publish_every=30))
    last = run_of(output, manifest)
    (step,) = (RunRef(output_uri=output, run_id=run.run_id) for run in list_runs(output) if run.run_id != last.run_id)
    if on_the_way:
        score_report(step, publishing.read_run_manifest(step), LIMITS)

    late = score_report(last, manifest, LIMITS)

    early = report.read_report(step)
    assert (early.drift, early.is_reference, late.drift, late.is_reference) == (None, False, None, True)
    assert early.verdict == "No verdict on drift: there is no reference yet"
    assert early.verdict in text_of(early.report_uri)
    made = "The reference is the first whole scoring by the same rules, of which this run was a step: 50 documents"
    assert made in text_of(late.report_uri)
    assert report_again(output, step.run_id).is_reference
    assert made in text_of(early.report_uri)


def test_a_night_after_one_whose_report_was_left_out_makes_both(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    manifests = [score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())]
    for name in ("b", "c"):
        write(corpus, name, [words(400, seed=i) for i in range(30)])
        manifests.append(score_corpus(str(corpus), tiny_checkpoint, output, spec=spec()))
    told = []

    score_report(run_of(output, manifests[-1]), manifests[-1], LIMITS, announce=told.append)

    first, *others = (report.read_report(run_of(output, manifest)) for manifest in manifests)
    assert first.is_reference
    assert [each.has_drifted for each in others] == [True, True]
    assert [each.run for each in told] == [each.run for each in others]


def test_what_a_document_and_a_label_contain_is_text(tmp_path, tiny_encoder):
    hostile = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\x00\u202e nul and bidi", "x" * 10_000]
    checkpoint = save_tiny_checkpoint(tmp_path / "model", tiny_encoder, (*hostile[:3],))
    folder = tmp_path / "<b>corpus"
    folder.mkdir()
    ids = [*hostile, *hostile, *(f"doc-{i}" for i in range(30))]  # the second of each is rejected
    texts = [f"</td>{words(20, seed=i)}<script>" for i in range(len(ids))]
    pl.DataFrame({"doc_id": ids, "text": texts}).write_parquet(folder / "a.parquet")

    done = night(folder, checkpoint, str(tmp_path / "out"), evidence_text=True)

    for uri in (done.report_uri, done.quality_uri):
        page = storage.read_bytes(uri).decode()
        assert not re.search(r"<(script|b>|img src=x)|onerror=alert\(2\)(?!&gt;)|\x00|\u202e", page)
        assert "x" * 81 not in page
    shown = text_of(done.report_uri) + text_of(done.quality_uri)
    for value in hostile:
        assert pages.spelt_out(pages.short(value, 80)) in shown


def test_statistics_and_reports_survive_cleaning_up(corpus, tiny_checkpoint, output):
    first = night(corpus, tiny_checkpoint, output)
    write(corpus, "b", ["the fox"])
    second = night(corpus, tiny_checkpoint, output)
    kept = [first.statistics_uri, first.report_uri, first.quality_uri]
    before = [storage.read_bytes(uri) for uri in kept]

    assert clean_up(output, older_than=timedelta(0)).num_files

    assert report_again(output, first.run.run_id) == first  # as it was: there is nothing to make another of
    assert [storage.read_bytes(uri) for uri in kept] == before
    assert storage.exists(reference.uri_of(output, first.scoring_fingerprint))
    assert [run.run_id for run in list_runs(output)] == [second.run.run_id, first.run.run_id]


def test_a_run_that_is_shown_again_after_cleaning_up_goes_without_a_report(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    first = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    before = pl.read_parquet(corpus / "a.parquet")
    write(corpus, "b", ["the fox"])
    score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    clean_up(output, older_than=timedelta(0))
    run_list.roll_back(output)
    (corpus / "b.parquet").unlink()
    assert before.equals(pl.read_parquet(corpus / "a.parquet"))

    assert score_corpus(str(corpus), tiny_checkpoint, output, spec=spec()) == first
    assert score_report(run_of(output, first), first, LIMITS) is None
    with pytest.raises(ConfigError, match="has no report, and what it could be made of was cleaned up"):
        report_again(output)
    write(corpus, "c", ["the dog"])
    assert night(corpus, tiny_checkpoint, output).verdict == "No verdict on drift: there is no reference yet"


def test_what_is_no_scoring_run_has_no_report(tmp_path):
    run = RunRef(output_uri=str(tmp_path), run_id="0" * 16)
    manifest = Manifest(run={"flow": "chunk"}, rejected_by_reason={}, files=())

    with pytest.raises(ConfigError, match="reports are those of score runs, got a chunk run"):
        score_report(run, manifest)
    with pytest.raises(ConfigError, match="nothing was published there by `belt score`"):
        report_again(str(tmp_path))
    with pytest.raises(ConfigError, match="run must be a complete one of those that `belt runs` lists, got 'other'"):
        report_again(str(tmp_path), "other")


def files_of(output: Path) -> dict[str, bytes]:
    found = [*output.glob("statistics/*"), *output.glob("runs/*/statistics.json"), *output.glob("runs/*/report/*")]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


def test_a_report_that_is_killed_at_any_write_is_finished_by_the_next_attempt(corpus, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    manifest = score_corpus(str(corpus), tiny_checkpoint, str(output), spec=spec())

    def attempt(write: int, when: str = "before") -> subprocess.CompletedProcess[str]:
        arguments = [str(output), manifest.run["run_id"], str(write), when]
        command = [sys.executable, "-m", "tests.integration.report_child", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    whole = attempt(-1)
    assert whole.returncode == 0, whole.stderr
    expected, num_writes = files_of(output), int(whole.stdout)
    assert num_writes == len(expected) == 5

    for write, when in [*((i, "before") for i in range(num_writes)), (num_writes - 1, "after")]:
        for folder in (output / "statistics", output / "runs" / manifest.run["run_id"] / "report"):
            shutil.rmtree(folder)
        (output / "runs" / manifest.run["run_id"] / "statistics.json").unlink()
        assert attempt(write, when).returncode == -signal.SIGKILL
        assert len(files_of(output)) == write + (when == "after")

        score_report(run_of(str(output), manifest), manifest)

        assert files_of(output) == expected


def test_the_last_write_is_the_receipt(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    written = []
    really, create = storage.write_bytes, storage.create_bytes
    manifest = score_corpus(str(corpus), tiny_checkpoint, str(tmp_path / "out"), spec=spec())
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), really(uri, data)))
    monkeypatch.setattr(storage, "create_bytes", lambda uri, data: (written.append(uri), create(uri, data)))

    score_report(run_of(str(tmp_path / "out"), manifest), manifest)

    names = [uri.rpartition("/")[2] for uri in written]
    assert names[0] == "statistics.json"
    assert names[2:] == ["rejected.html", "index.html", "report.json"]
