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

from belt_tasks import pages, publishing, reference, report, statistics, storage
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

    told = text_of(done.pages.report_uri)
    manifest = publishing.read_run_manifest(RunRef(output_uri=output, run_id=done.run_id))
    assert f"Scoring run {done.run_id}" in told
    assert "No drift: this run is the reference" in told
    assert "documents scored 30 30 new, 0 changed, 0 unchanged, 0 removed" in told
    assert f"content tokens {manifest.run['num_tokens']:,}" in told
    assert "1 rows of the files that the run read were put aside" in told
    assert "chunks.chunk_size 30" in told
    assert f"checkpoint digest {manifest.run['checkpoint_digest']}" in told
    counted = statistics.of_run(RunRef(output_uri=output, run_id=done.run_id), manifest)
    for label, count in zip(counted.labels, counted.label_counts, strict=True):
        assert f"{label} {count} {count / 30:.1%} {count / 30:.1%}" in told
    quality = text_of(done.pages.quality_uri)
    assert "text_null The row has no text. An empty text would be accepted. 1" in quality
    assert f"{corpus}/a.parquet 30 a-30 text_null column 'text' is null" in quality


def test_drift_is_told(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    night(corpus, tiny_checkpoint, output)
    write(corpus, "b", [f"\N{SNOWMAN} {words(400, seed=i)}" for i in range(30)])

    done = night(corpus, tiny_checkpoint, output)

    assert done.drift.verdict == "drifted"
    told = text_of(done.pages.report_uri)
    assert "Drift: " in told
    assert "document lengths (KS 1.00)" in told
    assert "document lengths KS 1.0000 0.1000 below 0.0001 drifted" in told
    assert (
        ScoreReport.model_validate_json(storage.read_bytes(done.pages.report_uri.replace("index.html", "report.json")))
        == done
    )


def test_a_report_is_made_once_unless_asked_again_or_with_other_limits(corpus, tiny_checkpoint, output):
    done = night(corpus, tiny_checkpoint, output)
    storage.remove_files([done.pages.report_uri])

    again = night(corpus, tiny_checkpoint, output)

    assert again == done.model_copy(update={"reused": True})
    assert not storage.exists(done.pages.report_uri)
    other = night(corpus, tiny_checkpoint, output, DriftSpec(min_documents=31))
    assert other.drift.verdict == "too_few_documents"
    assert "No verdict on drift: fewer than 31 documents (30 here, 30 in the reference)" in text_of(
        other.pages.report_uri
    )
    before = storage.read_bytes(done.pages.report_uri)
    storage.remove_files([done.pages.report_uri])
    assert report_again(output).spec == other.spec
    assert storage.read_bytes(done.pages.report_uri) == before


def test_texts_stay_in_the_corpus_unless_passages_are_asked_for(corpus, tiny_checkpoint, tmp_path):
    silent = night(corpus, tiny_checkpoint, str(tmp_path / "silent"))
    told = night(corpus, tiny_checkpoint, str(tmp_path / "told"), evidence_text=True)

    for name in ("report_uri", "quality_uri"):
        assert MARKED not in storage.read_bytes(getattr(silent.pages, name)).decode()
    assert "Texts stay in the corpus" in text_of(silent.pages.report_uri)
    assert MARKED in text_of(told.pages.report_uri)
    assert "characters passage" in text_of(told.pages.report_uri)


@pytest.mark.parametrize("evidence", ["none", "all"])
def test_evidence_is_told_where_there_is_some(corpus, tiny_checkpoint, tmp_path, evidence):
    done = night(corpus, tiny_checkpoint, str(tmp_path / "out"), evidence=evidence)

    assert ("Evidence" in text_of(done.pages.report_uri)) == (evidence == "all")


def test_a_run_that_only_takes_documents_away_has_a_report(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    write(corpus, "b", ["fox", "dog"])
    night(corpus, tiny_checkpoint, output)
    (corpus / "b.parquet").unlink()

    done = night(corpus, tiny_checkpoint, output)

    assert (done.drift.verdict, done.drift.num_documents, done.drift.measures) == ("too_few_documents", 0, ())
    assert "documents scored 0 0 new, 0 changed, 30 unchanged, 2 removed" in text_of(done.pages.report_uri)


def test_steps_have_reports_before_there_is_a_reference(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    write(corpus, "b", [words(30, seed=i) for i in range(20)])
    manifest = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec(publish_every=30))
    last = run_of(output, manifest)
    (step,) = (run.run_id for run in list_runs(output) if run.run_id != last.run_id)
    first = RunRef(output_uri=output, run_id=step)

    early = score_report(first, publishing.read_run_manifest(first), LIMITS)
    late = score_report(last, manifest, LIMITS)

    assert early.drift is None
    assert "No verdict on drift: there is no reference yet" in text_of(early.pages.report_uri)
    assert late.drift.num_documents_reference == 50
    assert report_again(output, step).drift.num_documents_reference == 50
    assert "The reference is the first whole scoring by the same rules: 50 documents" in text_of(early.pages.report_uri)


def test_what_a_document_and_a_label_contain_is_text(tmp_path, tiny_encoder):
    hostile = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\x00\u202e nul and bidi", "x" * 10_000]
    checkpoint = save_tiny_checkpoint(tmp_path / "model", tiny_encoder, (*hostile[:3],))
    folder = tmp_path / "<b>corpus"
    folder.mkdir()
    ids = [*hostile, *hostile, *(f"doc-{i}" for i in range(30))]  # the second of each is rejected
    texts = [f"</td>{words(20, seed=i)}<script>" for i in range(len(ids))]
    pl.DataFrame({"doc_id": ids, "text": texts}).write_parquet(folder / "a.parquet")

    done = night(folder, checkpoint, str(tmp_path / "out"), evidence_text=True)

    for uri in (done.pages.report_uri, done.pages.quality_uri):
        page = storage.read_bytes(uri).decode()
        assert not re.search(r"<(script|b>|img src=x)|onerror=alert\(2\)(?!&gt;)|\x00|\u202e", page)
        assert "x" * 81 not in page
    shown = text_of(done.pages.report_uri) + text_of(done.pages.quality_uri)
    for value in hostile:
        assert pages.spelt_out(pages.short(value, 80)) in shown


def test_statistics_and_reports_survive_cleaning_up(corpus, tiny_checkpoint, output):
    first = night(corpus, tiny_checkpoint, output)
    write(corpus, "b", ["the fox"])
    second = night(corpus, tiny_checkpoint, output)
    kept = [first.statistics_uri, first.pages.report_uri, first.pages.quality_uri]
    before = [storage.read_bytes(uri) for uri in kept]

    assert clean_up(output, older_than=timedelta(0)).num_files

    assert [storage.read_bytes(uri) for uri in kept] == before
    run = publishing.read_run_manifest(RunRef(output_uri=output, run_id=first.run_id)).run
    assert storage.exists(reference.uri_of(output, run["scoring_fingerprint"]))
    assert report_again(output, first.run_id) == first.model_copy(update={"reused": True})
    assert [run.run_id for run in list_runs(output)] == [second.run_id, first.run_id]
    assert not report_again(output).reused  # of the one that is shown the files are there


def test_a_run_that_was_cleaned_up_before_it_was_counted_has_no_report(corpus, tiny_checkpoint, tmp_path):
    output = str(tmp_path / "out")
    first = score_corpus(str(corpus), tiny_checkpoint, output, spec=spec())
    write(corpus, "b", ["the fox"])
    night(corpus, tiny_checkpoint, output)
    clean_up(output, older_than=timedelta(0))

    with pytest.raises(ConfigError, match="could be told by; it was cleaned up"):
        report_again(output, first.run["run_id"])


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
    really = storage.write_bytes
    manifest = score_corpus(str(corpus), tiny_checkpoint, str(tmp_path / "out"), spec=spec())
    monkeypatch.setattr(report.storage, "write_bytes", lambda uri, data: (written.append(uri), really(uri, data)))

    score_report(run_of(str(tmp_path / "out"), manifest), manifest)

    names = [uri.rpartition("/")[2] for uri in written]
    assert names[0] == "statistics.json"
    assert names[2:] == ["rejected.html", "index.html", "report.json"]
