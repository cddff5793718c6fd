"""The pages of a report in a real browser: they show all that they should, and nothing that a corpus holds runs."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from belt_tasks.errors import RejectedError
from belt_tasks.publishing import RunRef
from belt_tasks.report import ScoreReport, score_report
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, DriftSpec, ScoreSpec
from tests.browser import Watch, launched
from tests.conftest import save_tiny_checkpoint, words

pytestmark = pytest.mark.browser

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)' style='position:fixed;inset:0",
    "</td></table></style><svg onload=alert(4)>",
    "<iframe srcdoc='<script>parent.alert(5)</script>'>",
    '<a href="javascript:alert(6)">click</a>',
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "{{ 7 * 7 }}{% for x in y %}",
]
LABELS = (SCRIPT, '"><img src=x onerror=alert(7)>', "ham & eggs")
LIMITS = DriftSpec(min_documents=20)


def night(corpus: Path, checkpoint: str, output: str) -> ScoreReport:
    spec = ScoreSpec(
        device="cpu", chunks=ChunkSpec(chunk_size=30, stride=30), max_rejected_share=0.9, evidence_text=True
    )
    manifest = score_corpus(str(corpus), checkpoint, output, spec=spec)
    done = score_report(RunRef(output_uri=output, run_id=manifest.run["run_id"]), manifest, LIMITS)
    assert done is not None
    return done


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_encoder) -> list[ScoreReport]:
    """Reports of two nights of a corpus whose ids, texts, labels and file names are attacks."""
    root = tmp_path_factory.mktemp("hostile")
    checkpoint = save_tiny_checkpoint(root / "model", tiny_encoder, LABELS)
    corpus = root / "<b>corpus"
    corpus.mkdir()
    reports = []
    for number, most_words in enumerate((40, 400)):
        ids = [f"{number}{value}" for value in HOSTILE]
        ids += [*ids, *(f"{number}-{i}" for i in range(30))]  # the second of each is put aside
        texts = [f"{HOSTILE[i % len(HOSTILE)]} {words(most_words * i // 40, seed=i)}" for i in range(len(ids))]
        pl.DataFrame({"doc_id": ids, "text": texts}).write_parquet(corpus / f"{number}<script>.parquet")
        reports.append(night(corpus, checkpoint, str(root / "out")))
    return reports


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


def opened(context: BrowserContext, uri: str) -> tuple[Page, Watch]:
    page = context.new_page()
    watch = Watch(page)
    page.goto(Path(uri).as_uri(), wait_until="load")
    return page, watch


LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 375, "height": 800}},
    "no JavaScript": {"java_script_enabled": False, "viewport": {"width": 1280, "height": 900}},
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("which", ["report_uri", "quality_uri"])
def test_a_page_renders_whole_and_quietly(hostile, browser, tmp_path, look, which):
    with browser.new_context(**LOOKS[look]) as context:
        page, watch = opened(context, getattr(hostile[-1], which))
        page.screenshot(path=tmp_path / f"{which}.png", full_page=True)

        assert watch.said == []
        assert page.locator("h1").inner_text().endswith(hostile[-1].run.run_id)
        if which == "report_uri":
            assert page.locator("h2").all_inner_texts() == [
                "Drift",
                "What the model said",
                "Evidence",
                "Rejected rows",
                "Throughput and cost",
                "Settings and versions",
            ]
            assert hostile[-1].verdict in page.locator("header").inner_text()
        assert page.locator("img").count() == (7 if which == "report_uri" else 0)
        if look != "no JavaScript":
            sizes = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
            assert all(sizes)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("scripts", [True, False], ids=["JavaScript", "no JavaScript"])
def test_what_a_corpus_holds_is_shown_as_it_is_and_runs_nothing(hostile, browser, scripts):
    with browser.new_context(java_script_enabled=scripts) as context:
        shown = {}
        for which in ("report_uri", "quality_uri"):
            page, watch = opened(context, getattr(hostile[-1], which))
            for row in page.locator("tr").all():
                row.hover()
            page.wait_for_timeout(100)
            shown[which] = page.locator("main").inner_text()

            assert watch.said == []
            assert page.locator("script, iframe, svg, form, [onerror], [onload], [onmouseover]").count() == 0
            assert len(page.frames) == 1
            assert page.url == Path(getattr(hostile[-1], which)).as_uri()
        for value in HOSTILE:
            assert f"1{value}" in shown["quality_uri"]
        assert "1<script>.parquet" in shown["quality_uri"]
        for label in LABELS:
            assert label in shown["report_uri"]
        assert "alert(1)</script> " in shown["report_uri"].replace("\n", " ")  # of a passage


def test_the_page_of_a_refused_run_leads_nowhere_that_is_not_there(hostile, browser, tmp_path, tiny_checkpoint):
    corpus = Path(hostile[0].run.output_uri).parent / "<b>corpus"
    with pytest.raises(RejectedError) as refused:
        score_corpus(str(corpus), tiny_checkpoint, str(tmp_path / "out"), spec=ScoreSpec(device="cpu"))

    with browser.new_context() as context:
        page, watch = opened(context, refused.value.quality_uri)
        page.screenshot(path=tmp_path / "refused.png", full_page=True)

        assert watch.said == []
        header = page.locator("header").inner_text()
        assert "The run was refused: 16 of 92 rows (17.4%) were rejected, more than max_rejected_share" in header
        assert "refused" in page.locator("footer").inner_text()
        assert page.locator("a").count() == 0
        shown = page.locator("main").inner_text()
        for value in HOSTILE:
            assert f"0{value}" in shown


def test_links_lead_from_page_to_page(hostile, browser):
    with browser.new_context() as context:
        page, _ = opened(context, hostile[-1].report_uri)

        page.get_by_role("link", name="Which rows, and what is wrong with them").click()
        assert page.url == Path(hostile[-1].quality_uri).as_uri()
        page.get_by_role("link", name="Back to the report").click()
        assert page.url == Path(hostile[-1].report_uri).as_uri()


@pytest.mark.parametrize("has_policy", [True, False])
def test_a_script_that_got_in_would_be_stopped_by_the_policy_and_by_nothing_else(
    hostile, browser, tmp_path, has_policy
):
    page = Path(hostile[-1].quality_uri).read_text(encoding="utf-8").replace("</main>", f"{SCRIPT}</main>")
    if not has_policy:
        page = page.replace('http-equiv="Content-Security-Policy"', "")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")

    with browser.new_context() as context:
        _, watch = opened(context, str(tmp_path / "page.html"))

    (said,) = watch.said
    assert ("violates the following Content Security Policy" in said) == has_policy
    assert (said == "dialog: 1") == (not has_policy)
