"""Score a corpus in each way of reading long documents, and say whether reading further pays."""

from datetime import UTC, datetime

from prefect import flow

from belt_tasks import length_report as reports
from belt_tasks.length_comparison import LengthReport
from belt_tasks.length_report import Way
from belt_tasks.planning import EvaluationPlan
from belt_tasks.publishing import RunRef
from belt_tasks.specs import CorpusSpec, LengthSpec, RaySpec
from flows import run_names, runners, tasks
from flows.attempt import attempt
from flows.score import finish_run


@flow(name="length-report", flow_run_name=run_names.of("corpus_uri"), task_runner=tasks.one_worker)
def length_report(
    corpus_uri: str,
    plan: EvaluationPlan,
    ways: tuple[Way, ...],
    evaluated: RunRef,
    corpus: CorpusSpec,
    length: LengthSpec,
    storage_block: str | None = None,
) -> LengthReport:
    """Compare ways of reading a labelled corpus; killed and started again, it goes on where it was.

    Args:
        corpus_uri: as of `score`.
        plan: of the evaluation.
        ways: what is compared.
        evaluated: the run of the evaluation, which may be that of a way.
        corpus: columns and split.
        length: how the ways are compared.
        storage_block: as of `score`.
    """
    with attempt(storage_block), runners.scoring("threads", RaySpec()) as stages:
        runs = []
        for way in ways:
            if reports.is_done_by(way, evaluated):
                runs.append(evaluated)
                continue
            started_at = datetime.now(UTC)
            planned = stages.plan_scoring(corpus_uri, way.checkpoint_uri, way.output_uri, corpus, way.spec)
            finish_run(stages, planned, corpus_uri, corpus, started_at=started_at)
            runs.append(planned.run)
        return tasks.write_length_report(plan, ways, runs, evaluated, corpus, length)
