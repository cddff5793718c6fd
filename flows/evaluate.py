"""Score a labelled corpus and compare the predictions with its labels."""

from datetime import UTC, datetime

from prefect import flow

from belt_tasks import model_summaries, summaries
from belt_tasks.errors import ConfigError
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import CorpusSpec, DriftSpec, LengthSpec, ScoreSpec
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt
from flows.length_report import length_report
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
    length: LengthSpec | None = None,
    head_checkpoint_uri: str | None = None,
    head_tail_checkpoint_uri: str | None = None,
) -> tuple[Manifest, EvaluationReceipt]:
    """Measure how good a checkpoint is on a labelled corpus, and whether reading long documents further pays.

    Args:
        corpus_uri: as of `score`.
        checkpoint_uri: as of `score`.
        output_uri: as of `score`.
        corpus: columns and split.
        spec: how to score.
        storage_block: as of `score`.
        time_limit_s: as of `score`.
        drift: as of `score`.
        length: how the head alone, head and tail, and all of the documents are compared; None does not.
        head_checkpoint_uri: scores the head in that comparison; None takes the checkpoint.
        head_tail_checkpoint_uri: scores head and tail in that comparison; None takes the checkpoint.
    """
    with attempt(storage_block, time_limit_s):
        asked_at = datetime.now(UTC)
        if length is None and (head_checkpoint_uri, head_tail_checkpoint_uri) != (None, None):
            raise ConfigError("head_checkpoint_uri and head_tail_checkpoint_uri go with length, got none")
        plan = tasks.plan_evaluation(corpus_uri, checkpoint_uri, corpus)
        ways = (
            ()
            if length is None
            else tasks.plan_ways(plan, output_uri, spec, head_checkpoint_uri, head_tail_checkpoint_uri)
        )
        manifest = score(corpus_uri, plan.checkpoint_uri, output_uri, corpus, spec, storage_block, drift=drift)
        receipt = tasks.evaluate_run(plan, corpus, manifest)
        if length is not None:
            run = RunRef(output_uri=manifest.run["output_uri"], run_id=manifest.run["run_id"])
            found = length_report(corpus_uri, plan, ways, run, corpus, length, storage_block)
            receipt = receipt.model_copy(update={"length": found})
        artifacts.show(
            "evaluate-summary",
            summaries.run_summary(manifest, asked_at=asked_at) + "\n" + model_summaries.evaluation_summary(receipt),
        )
        return manifest, receipt
