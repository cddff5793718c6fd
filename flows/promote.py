"""Measure a challenger against the champion of a registry, and let it take the champion's place if it may."""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from belt_tasks import model_summaries, promotion
from belt_tasks.promotion import Promotion
from belt_tasks.specs import CorpusSpec, GateSpec, ScoreSpec
from flows import approval as approvals
from flows import artifacts, run_names, tasks
from flows.attempt import Seconds, attempt
from flows.evaluate import evaluate


@flow(name="promote", flow_run_name=run_names.of("challenger_uri"))
def promote(
    challenger_uri: str,
    registry_uri: str,
    corpus_uri: str,
    output_uri: str,
    corpus: CorpusSpec = CorpusSpec(),
    spec: ScoreSpec = ScoreSpec(),
    gate: GateSpec = GateSpec(),
    approval: Literal["gate", "person"] = "gate",
    who: Annotated[str, Field(min_length=1, max_length=1000)] = "the gate",
    storage_block: str | None = None,
    time_limit_s: Seconds | None = None,
) -> Promotion:
    """Promote a challenger that is better than the champion on held-out documents; killed, it goes on where it was.

    Args:
        challenger_uri: a checkpoint, the output of a fine-tuning, or a finished Hugging Face sequence classifier.
        registry_uri: the registry of models; it is made where there is none.
        corpus_uri: the held-out documents with their labels; neither checkpoint may have been fine-tuned on them.
        output_uri: where their scores go; a champion's are found there the next time.
        corpus: columns and split.
        spec: how to score; what it leaves out is each checkpoint's own.
        gate: when the challenger takes the champion's place.
        approval: who has the last word: the gate, or a person, who is asked unless the gate rejects.
        who: stands in the registry's history for what no person did.
        storage_block: a Prefect Secret block with the options of object stores; None takes those of the environment.
        time_limit_s: seconds after which it ends, to be taken up again by the next attempt; None is no limit.
    """
    with attempt(storage_block, time_limit_s):
        if approval == "person":
            approvals.check_can_wait()
        plan = tasks.plan_promotion(challenger_uri, registry_uri, corpus_uri, output_uri, gate, who)
        if plan.is_done:
            return tasks.find_promotion(plan)
        manifests = [
            evaluate(corpus_uri, each.checkpoint_uri, each.output_uri, corpus, spec, storage_block)[0]
            for each in plan.scorings
        ]
        record = tasks.decide_promotion(plan, manifests, corpus_uri, corpus, spec, gate)
        artifacts.show("promote-decision", model_summaries.decision_summary(record))
        if approval == "person" and record.decision != "reject":
            answer = approvals.ask(record)
            if not answer.approve:
                return promotion.leave(plan, record, is_declined=True)
            return tasks.promote(plan, record, who=answer.who, why=answer.reason, is_approved=True)
        if record.decision != "promote":
            return promotion.leave(plan, record)
        return tasks.promote(plan, record, who=who, why=record.why)
