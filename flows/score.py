"""Score a corpus with a checkpoint and publish the predictions."""

from datetime import UTC, datetime

from prefect import flow, unmapped

from belt_tasks import run_list, summaries
from belt_tasks.publishing import Manifest
from belt_tasks.score_planning import ScorePlan
from belt_tasks.specs import CorpusSpec, DriftSpec, RaySpec, Runner, ScoreSpec
from flows import artifacts, events, run_names, runners, tasks
from flows.attempt import Seconds, attempt
from flows.runners import ScoringStages


@flow(name="score", flow_run_name=run_names.of("corpus_uri"), task_runner=tasks.one_worker)
def score(
    corpus_uri: str,
    checkpoint_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: ScoreSpec = ScoreSpec(),
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
    drift: DriftSpec = DriftSpec(),
    runner: Runner = "threads",
    ray: RaySpec = RaySpec(),
) -> Manifest:
    """Score what is new or changed in a corpus and publish it; killed and started again, it goes on where it was.

    Args:
        corpus_uri: a Parquet file, a directory of them or a glob; any fsspec URL.
        checkpoint_uri: a checkpoint, the output of a fine-tuning, REGISTRY@ALIAS, or a finished Hugging Face sequence
            classifier.
        output_uri: directory for the run and the published tables.
        corpus: columns and split.
        spec: how to score; what it leaves out is the checkpoint's own.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
        drift: how far the run may be from the first whole scoring by the same rules before an event tells of it.
        runner: `threads` scores one shard after the other in this process; `ray` many at once, on a Ray cluster.
        ray: the cluster and its workers.
    """
    with (
        attempt(storage_block, time_limit_s),
        artifacts.refusal() as links,
        runners.scoring(runner, ray) as stages,
    ):
        asked_at = datetime.now(UTC)
        while True:
            started_at = datetime.now(UTC)
            plan = stages.plan_scoring(corpus_uri, checkpoint_uri, output_uri, corpus, spec)
            checkpoint_uri = plan.checkpoint_uri  # an alias that moves meanwhile changes nothing
            manifest = finish_run(stages, plan, corpus_uri, corpus, started_at=started_at)
            tasks.publish_tables(plan.run, manifest, base_version=plan.base_version)
            report = tasks.score_report(plan.run, manifest, drift, announce=events.announce_drift)
            if plan.is_last:
                break
        if spec.export:
            tasks.export_predictions(plan.run.output_uri)
        told = summaries.run_summary(
            manifest,
            asked_at=asked_at,
            earlier_steps=run_list.earlier_steps(manifest),
            report=report,
            links=artifacts.report_links(report, links),
        )
        artifacts.show("score-summary", told)
        return manifest


def finish_run(
    stages: ScoringStages, plan: ScorePlan, corpus_uri: str, corpus: CorpusSpec, *, started_at: datetime
) -> Manifest:
    """Score the shards of a planned run, unless it is complete already; to be called in a flow.

    Args:
        stages: those that compute.
        plan: of the run.
        corpus_uri: as of `score`.
        corpus: as of `score`.
        started_at: when the run began.
    """
    if plan.manifest is not None:
        return plan.manifest
    receipts = tasks.gather(
        stages.score_shards(
            list(plan.shards),
            unmapped(corpus),
            unmapped(plan.spec),
            run=unmapped(plan.run),
            checkpoint_uri=unmapped(plan.checkpoint_uri),
            checkpoint_digest=unmapped(plan.checkpoint_digest),
            scoring_fingerprint=unmapped(plan.scoring_fingerprint),
            rows_uri=[plan.run.rows_uri(shard.key) for shard in plan.shards],
        )
    )
    return tasks.complete_scoring(plan, receipts, corpus_uri=corpus_uri, started_at=started_at)
