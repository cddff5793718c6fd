"""Say what a scoring would do, and how long it would take."""

from prefect import flow

from belt_tasks import summaries
from belt_tasks.preview import ScorePreview
from belt_tasks.specs import CorpusSpec, ScoreSpec
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt


@flow(name="preview", flow_run_name=run_names.of("corpus_uri"))
def preview(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: ScoreSpec = ScoreSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> ScorePreview:
    """What `score` would find new, changed, gone or broken; parameters are those of `score`, nothing is written."""
    with attempt(storage_block, time_limit_s):
        found = tasks.preview_scoring(corpus_uri, checkpoint_uri, output_uri, corpus, spec)
        artifacts.show("preview-summary", summaries.preview_summary(found))
        return found
