"""Score a labelled corpus and compare the predictions with its labels."""

from datetime import UTC, datetime

from prefect import flow

from belt_tasks import summaries
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.publishing import Manifest
from belt_tasks.specs import CorpusSpec, DriftSpec, ScoreSpec
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt
from flows.score import score


@flow(name="evaluate", flow_run_name=run_names.of("corpus_uri"))
def evaluate(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: ScoreSpec = ScoreSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
    drift: DriftSpec = DriftSpec(),
) -> tuple[Manifest, EvaluationReceipt]:
    """Measure how good a checkpoint is on a labelled corpus; parameters are those of `score`."""
    with attempt(storage_block, time_limit_s):
        asked_at = datetime.now(UTC)
        plan = tasks.plan_evaluation(corpus_uri, checkpoint_uri, corpus)
        manifest = score(corpus_uri, plan.checkpoint_uri, output_uri, corpus, spec, storage_block, drift=drift)
        receipt = tasks.evaluate_run(plan, corpus, manifest)
        artifacts.show(
            "evaluate-summary",
            summaries.run_summary(manifest, asked_at=asked_at) + "\n" + summaries.evaluation_summary(receipt),
        )
        return manifest, receipt
