"""Promotion: a challenger enters the registry, is measured beside the champion, and takes its place if it may.

    OUTPUT/scores/DIGEST/...    an output of scoring for each checkpoint that was ever measured here: a champion's
                                scores of the same documents are found, not made, when the next challenger comes

Everything here can be done again after a crash: what is there already is found.
"""

from collections.abc import Sequence
from typing import Any, Literal

import polars as pl

from belt_tasks import delta_tables, evaluation, gate, model_store, planning, registry, score_tables, storage
from belt_tasks.errors import ConfigError
from belt_tasks.gate import DecisionRecord, Scored
from belt_tasks.publishing import Manifest
from belt_tasks.registry import CHALLENGER, CHAMPION, Entry
from belt_tasks.specs import CorpusSpec, GateSpec, ScoreSpec, Spec
from belt_tasks.stored import read_json

Outcome = Literal["promoted", "held", "rejected", "declined", "taken back", "champion already"]


class Scoring(Spec):
    """One checkpoint to score the held-out documents with."""

    digest: str
    checkpoint_uri: str
    output_uri: str


class PromotionPlan(Spec):
    """Who is measured against whom."""

    registry_uri: str
    challenger: Scoring
    champion: Scoring | None
    """As it was found; None where there is none."""
    champion_entry: Entry | None
    """That made it the champion."""

    @property
    def is_done(self) -> bool:
        """Whether the challenger is the champion already."""
        return self.champion is not None and self.champion.digest == self.challenger.digest

    @property
    def scorings(self) -> tuple[Scoring, ...]:
        """What has to be measured."""
        return (self.challenger,) if self.champion is None else (self.champion, self.challenger)


class Promotion(Spec):
    """What came of it."""

    registry_uri: str
    outcome: Outcome
    challenger_digest: str
    decision: str | None
    """The id of the decision; None where the challenger became the champion without one."""
    record: DecisionRecord | None
    entry: Entry | None
    """That made the challenger the champion; None where it did not become it."""


def plan_promotion(
    challenger_uri: str, registry_uri: str, corpus_uri: str, output_uri: str, rules: GateSpec, who: str
) -> PromotionPlan:
    """Add a challenger to a registry, and find out whom it challenges.

    Args:
        challenger_uri: whatever can be scored with.
        registry_uri: the registry; it is made where there is none.
        corpus_uri: the held-out documents.
        output_uri: where their scores go.
        rules: when a challenger takes the champion's place.
        who: adds it.

    Raises:
        ConfigError: there is no such checkpoint, or a place or the metric is wrong.
    """
    registry_uri, output_uri = storage.absolute(registry_uri), storage.absolute(output_uri)
    planning.check_apart(corpus_uri, output_uri)
    model = model_store.add(registry_uri, challenger_uri, who=who)
    gate.check_metric(rules, model.head)
    entry = registry.aliases(registry.history(registry_uri)).get(CHAMPION)
    plan = PromotionPlan(
        registry_uri=registry_uri,
        challenger=_scoring(registry_uri, output_uri, model.digest),
        champion=None if entry is None else _scoring(registry_uri, output_uri, entry.to_digest),
        champion_entry=entry,
    )
    if not plan.is_done:
        registry.put_alias(registry_uri, CHALLENGER, model.digest, who=who, why="to be measured against the champion")
    return plan


def decide_promotion(
    plan: PromotionPlan,
    manifests: Sequence[Manifest],
    corpus_uri: str,
    corpus: CorpusSpec,
    spec: ScoreSpec,
    rules: GateSpec,
) -> DecisionRecord:
    """Decide on a challenger, and keep the decision in the registry.

    Args:
        plan: who is measured against whom.
        manifests: of the scoring runs, in the order of the plan's.
        corpus_uri: the held-out documents.
        corpus: columns, and the split.
        spec: how they were scored.
        rules: when a challenger takes the champion's place.

    Raises:
        ConfigError: the two cannot be compared.
    """
    scored = [
        _scored(scoring, manifest, corpus_uri, corpus)
        for scoring, manifest in zip(plan.scorings, manifests, strict=True)
    ]
    record = gate.decide(
        None if plan.champion is None else scored[0],
        scored[-1],
        rules,
        corpus_uri=corpus_uri,
        corpus=corpus,
        score_spec=spec,
    )
    uri = registry.decision_uri(plan.registry_uri, record.id)
    if not storage.create_bytes(uri, (record.model_dump_json(indent=1) + "\n").encode()):
        raise ConfigError(f"{uri}: holds another decision than its name says; the registry is damaged")
    return record


def promote(plan: PromotionPlan, record: DecisionRecord, *, who: str, why: str, is_approved: bool = False) -> Promotion:
    """Make the challenger the champion, if the champion is still the one that it was measured against.

    A challenger that was the champion before and was taken back by somebody stays so, unless a person approves of it;
    a decision that was carried out before is not carried out again in any case.

    Args:
        plan: who was measured against whom.
        record: the decision.
        who: a person or a flow.
        why: in words.
        is_approved: whether a person said so.

    Raises:
        ConflictError: somebody else is the champion by now; nothing was changed.
    """
    entries = registry.history(plan.registry_uri)
    done = registry.carried_out(entries, CHAMPION, record.id)
    is_undone = done is not None and done != registry.aliases(entries)[CHAMPION]
    if is_undone or (registry.was_taken_back(entries, CHAMPION, plan.challenger.digest) and not is_approved):
        return _outcome(plan, "taken back", record, None)
    entry = registry.assign(
        plan.registry_uri,
        CHAMPION,
        plan.challenger.digest,
        expected=None if plan.champion is None else plan.champion.digest,
        who=who,
        why=why,
        decision=record.id,
    )
    return _outcome(plan, "promoted", record, entry)


def leave(plan: PromotionPlan, record: DecisionRecord, *, is_declined: bool = False) -> Promotion:
    """The champion stays."""
    outcome: Outcome = "rejected" if record.decision == "reject" else "held"
    return _outcome(plan, "declined" if is_declined else outcome, record, None)


def find_done(plan: PromotionPlan) -> Promotion:
    """What made the challenger the champion that it is already.

    Raises:
        ConfigError: the decision cannot be read.
    """
    entry = plan.champion_entry
    record = None if entry is None or entry.decision is None else read_decision(plan.registry_uri, entry.decision)
    return _outcome(plan, "champion already", record, entry)


def read_decision(registry_uri: str, decision: str) -> DecisionRecord:
    """A decision that is kept in a registry.

    Raises:
        ConfigError: it is not there, or not one that this belt reads, or not the one that its name says.
    """
    uri = registry.decision_uri(registry_uri, decision)
    record = read_json(uri, DecisionRecord, "a decision")
    if record.id != decision:
        raise ConfigError(f"{uri}: holds another decision than its name says ({record.id}); it was changed")
    return record


def _outcome(plan: PromotionPlan, outcome: Outcome, record: DecisionRecord | None, entry: Entry | None) -> Promotion:
    return Promotion(
        registry_uri=plan.registry_uri,
        outcome=outcome,
        challenger_digest=plan.challenger.digest,
        decision=entry.decision if record is None and entry is not None else record and record.id,
        record=record,
        entry=entry,
    )


def _scoring(registry_uri: str, output_uri: str, digest: str) -> Scoring:
    return Scoring(
        digest=digest,
        checkpoint_uri=registry.checkpoint_uri(registry_uri, digest),
        output_uri=storage.join(output_uri, "scores", digest),
    )


def _scored(scoring: Scoring, manifest: Manifest, corpus_uri: str, corpus: CorpusSpec) -> Scored:
    plan = planning.plan_evaluation(corpus_uri, scoring.checkpoint_uri, corpus)
    found, run = evaluation.labelled_scores(plan, corpus, manifest), manifest.run
    return Scored(
        digest=scoring.digest,
        head=plan.head,
        doc_ids=found.doc_ids,
        fingerprints=found.fingerprints,
        target=found.target,
        scores_DL=found.scores_DL,
        threshold=found.threshold,
        encode_s=_encode_s(run),
        device=f"{run['device']}, {run['precision']}",
    )


def _encode_s(run: dict[str, Any]) -> float | None:
    """Seconds of the encoder for a document that it read, over all runs of an output by the same rules on one device.

    The last of them may have been of a single document that changed, which says little.
    """
    table = score_tables.table_at(run["output_uri"], "runs")
    rows = delta_tables.scan(table)
    if rows is None:
        return None
    alike = rows.filter(pl.col(name) == run[name] for name in ("scoring_fingerprint", "device", "precision"))
    sums = alike.select(pl.col("encode_s", "num_documents", "num_documents_reused").sum())
    seconds, num_documents, num_reused = delta_tables.collect(sums, table).row(0)
    return seconds / (num_documents - num_reused) if seconds and num_documents > num_reused else None
