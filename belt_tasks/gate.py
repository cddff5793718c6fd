"""The gate: whether a challenger takes the champion's place, decided on the same held-out documents. Pure.

    reject     a floor is broken, or the gain is negative; of recalls and the gain, beyond chance
    promote    every check passes: no floor is broken, there are documents enough, and the gain exceeds min_gain beyond
               chance, that is, so does the lower end of its interval
    hold       anything else: no harm is shown, but no gain either

Floors are on recall, calibration and speed. A label's recall rests on its own documents, often few: where it is below
its floor, but the interval of the difference reaches above, it may be chance, and the decision is hold. If a floor
cannot be measured (speeds on different devices), it is hold too. The first champion of all has nobody to be compared
with: it is promoted if no absolute floor is broken and there are documents enough.

Shape letters: B draws, D documents, L labels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from belt_tasks import metrics, resampling
from belt_tasks.errors import ConfigError
from belt_tasks.specs import CorpusSpec, GateSpec, Head, Metric, ScoreSpec, Spec

Decision = Literal["promote", "hold", "reject"]
Floats = NDArray[np.float64]
TOLERANCE = 1e-9  # of a floor, for float noise
HOLDING = {"documents", "gain"}
"""Checks that are not floors: where one fails, the champion stays, but nothing is said against the challenger."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What a checkpoint says of the held-out documents, and what is true of them."""

    digest: str
    head: Head
    doc_ids: tuple[str, ...]
    """Ascending."""
    fingerprints: tuple[str, ...]
    """Of each document's text."""
    target: NDArray[np.generic]
    """Class positions [D], bools [D, L], or numbers [D]; in the order of the head's labels."""
    scores_DL: NDArray[np.float64]
    """Probabilities, or one column of numbers."""
    threshold: float = 0.5
    encode_s: float | None = None
    """Seconds of the encoder for a document."""
    device: str = ""


class Check(Spec):
    """One thing that was looked at."""

    name: str
    label: str | None = None
    """Of a recall."""
    number: float | None
    """What was measured; None where it cannot be."""
    limit: float
    passed: bool | None
    """None where nothing was measured."""
    may_be_chance: bool = False
    """Not passed, but other documents of the same kind might have passed it."""


class DecisionRecord(Spec):
    """A decision, with all that it rests on; equal reasons make equal records."""

    decision: Decision
    why: str
    champion_digest: str | None
    challenger_digest: str
    head: Head
    metric: Metric
    gain: float | None
    """How much better the challenger is in that metric; None where there is no champion."""
    gain_lower: float | None
    gain_upper: float | None
    checks: tuple[Check, ...]
    labels_without_documents: tuple[str, ...]
    """Their recall is not known."""
    num_documents: int
    documents_fingerprint: str
    """sha256 over the ids and texts of the held-out documents, 64 hex digits."""
    corpus_uri: str
    corpus: CorpusSpec
    score_spec: ScoreSpec
    gate: GateSpec
    """With the seed of the draws."""
    champion_metrics: dict[str, float | None]
    challenger_metrics: dict[str, float | None]

    @property
    def id(self) -> str:
        """16 hex digits over everything above."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def decide(
    champion: Scored | None,
    challenger: Scored,
    gate: GateSpec,
    *,
    corpus_uri: str = "",
    corpus: CorpusSpec = CorpusSpec(),  # noqa: B008 - frozen
    score_spec: ScoreSpec = ScoreSpec(),  # noqa: B008 - frozen
) -> DecisionRecord:
    """Decide whether a challenger takes the champion's place.

    Args:
        champion: its scores; None where there is no champion.
        challenger: its scores, of the same documents.
        gate: what is asked of it.
        corpus_uri: where the documents are.
        corpus: which of them.
        score_spec: how they were scored.

    Raises:
        ConfigError: the two were not scored on the same documents, or have other labels, or there is no such metric.
    """
    check_metric(gate, challenger.head)
    if champion is not None:
        challenger = _aligned(champion, challenger)
    head = challenger.head
    metric = gate.metric or resampling.METRICS[head.task][0]
    interval = (None, None) if champion is None else _gain_interval(champion, challenger, metric, gate)
    now, before = _measured(challenger), None if champion is None else _measured(champion)
    gain = None if before is None else _gain(metric, before, now)
    recalls = _recalls(now)
    checks = (
        _at_least("documents", len(challenger.doc_ids), gate.min_documents),
        *([] if champion is None else [_gain_check(interval[0], gate.min_gain)]),
        *_floors(gate, champion, challenger, before, now),
    )
    decision = _decision(checks, interval[1])
    return DecisionRecord(
        decision=decision,
        why=_why(checks, metric, gain, interval),
        champion_digest=None if champion is None else champion.digest,
        challenger_digest=challenger.digest,
        head=head,
        metric=metric,
        gain=gain,
        gain_lower=interval[0],
        gain_upper=interval[1],
        checks=checks,
        labels_without_documents=tuple(label for label, recall in recalls.items() if recall is None),
        num_documents=len(challenger.doc_ids),
        documents_fingerprint=_fingerprint(challenger),
        corpus_uri=corpus_uri,
        corpus=corpus,
        score_spec=score_spec,
        gate=gate,
        champion_metrics={} if before is None else _numbers(before),
        challenger_metrics=_numbers(now),
    )


def check_metric(gate: GateSpec, head: Head) -> None:
    """See that a head has the metric that is asked for.

    Raises:
        ConfigError: it has not.
    """
    allowed = resampling.METRICS[head.task]
    if gate.metric is not None and gate.metric not in allowed:
        raise ConfigError(f"metric of a {head.task} task must be one of {', '.join(allowed)}, got {gate.metric!r}")


def _decision(checks: tuple[Check, ...], gain_upper: float | None) -> Decision:
    if any(check.passed is False and not check.may_be_chance and check.name not in HOLDING for check in checks):
        return "reject"
    if gain_upper is not None and gain_upper < 0:
        return "reject"
    return "promote" if all(check.passed for check in checks) else "hold"


def _floors(
    gate: GateSpec, champion: Scored | None, challenger: Scored, before: dict[str, Any] | None, now: dict[str, Any]
) -> Iterator[Check]:
    """The checks that may reject; those of what the task does not have are left out."""
    recall = _recalls(now)
    if gate.min_recall is not None:
        yield from _recall_checks("recall", recall, dict.fromkeys(recall, gate.min_recall), None, challenger, gate)
    if gate.max_recall_drop is not None and champion is not None and before is not None:
        kept = 1 - gate.max_recall_drop
        limit = {label: None if known is None else kept * known for label, known in _recalls(before).items()}
        yield from _recall_checks("recall against the champion's", recall, limit, champion, challenger, gate)
    if "ece" in now:
        if gate.max_ece is not None:
            yield _at_most("calibration error", now["ece"], gate.max_ece)
        if gate.max_ece_increase is not None and before is not None:
            yield _at_most("increase of the calibration error", now["ece"] - before["ece"], gate.max_ece_increase)
    if gate.max_slowdown is not None and champion is not None:
        yield _at_most("slowdown", _slowdown(champion, challenger), gate.max_slowdown)


def _recall_checks(
    name: str,
    recall: dict[str, float | None],
    limit: dict[str, float | None],
    champion: Scored | None,
    challenger: Scored,
    gate: GateSpec,
) -> list[Check]:
    """Of every label that has documents; its limit is a share of the champion's recall, or the same for all."""
    checks = [
        _at_least(name, number, least, label)
        for label, number in recall.items()
        if number is not None and (least := limit[label]) is not None
    ]
    if all(check.passed for check in checks):
        return checks
    of_challenger = _weighted_recalls(challenger)
    of_champion = None if champion is None else _weighted_recalls(champion)

    def excess(weights_BD: Floats) -> Floats:
        if of_champion is None:
            return of_challenger(weights_BD) - (gate.min_recall or 0.0)
        return of_challenger(weights_BD) - (1 - (gate.max_recall_drop or 0.0)) * of_champion(weights_BD)

    _, upper_L = resampling.intervals(excess, num_documents=len(challenger.doc_ids), **_draws(gate))
    upper = dict(zip(challenger.head.labels, upper_L.tolist(), strict=True))
    return [
        check.model_copy(update={"may_be_chance": not check.passed and upper[check.label or ""] >= -TOLERANCE})
        for check in checks
    ]


def _weighted_recalls(scored: Scored) -> resampling.WeightedMetrics:
    return resampling.weighted_recalls(scored.head.task, scored.target, scored.scores_DL, scored.threshold)


def _draws(gate: GateSpec) -> dict[str, Any]:
    return {"confidence": gate.confidence, "num_resamples": gate.num_resamples, "seed": gate.resampling_seed}


def _at_least(name: str, number: float, limit: float, label: str | None = None) -> Check:
    return Check(name=name, label=label, number=number, limit=limit, passed=number >= limit - TOLERANCE)


def _at_most(name: str, number: float | None, limit: float) -> Check:
    passed = None if number is None else number <= limit + TOLERANCE
    return Check(name=name, number=number, limit=limit, passed=passed)


def _gain_check(lower: float | None, min_gain: float) -> Check:
    return Check(name="gain", number=lower, limit=min_gain, passed=None if lower is None else lower > min_gain)


def _gain_interval(champion: Scored, challenger: Scored, metric: Metric, gate: GateSpec) -> tuple[float, float]:
    before, now = (
        resampling.weighted_metric(each.head.task, metric, each.target, each.scores_DL, each.threshold)
        for each in (champion, challenger)
    )
    return resampling.gain_interval(
        before,
        now,
        num_documents=len(challenger.doc_ids),
        sign=-1 if metric in resampling.LOWER_IS_BETTER else 1,
        **_draws(gate),
    )


def _gain(metric: Metric, before: dict[str, Any], now: dict[str, Any]) -> float | None:
    if before[metric] is None or now[metric] is None:
        return None
    return float(now[metric] - before[metric]) * (-1 if metric in resampling.LOWER_IS_BETTER else 1)


def _slowdown(champion: Scored, challenger: Scored) -> float | None:
    """How much longer the challenger takes, as a share; None where that is not known, or was another device's."""
    if not champion.encode_s or challenger.encode_s is None or champion.device != challenger.device:
        return None
    return challenger.encode_s / champion.encode_s - 1


def _measured(scored: Scored) -> dict[str, Any]:
    head = scored.head
    return metrics.task_metrics(head.task, scored.target, scored.scores_DL, head.labels, scored.threshold)


def _recalls(measured: dict[str, Any]) -> dict[str, float | None]:
    return {row["label"]: row["recall"] for row in measured.get("per_class", [])}


def _numbers(measured: dict[str, Any]) -> dict[str, float | None]:
    """Without those of single labels."""
    return {name: value for name, value in measured.items() if value is None or isinstance(value, float)}


def _why(
    checks: tuple[Check, ...],
    metric: Metric,
    gain: float | None,
    interval: tuple[float | None, float | None],
) -> str:
    told = "no champion to compare with"
    if interval[0] is not None and gain is not None:
        told = f"gain in {metric} {gain:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
    missed = ", ".join(
        check.name + (f" of {check.label}" if check.label else "") + (" (may be chance)" if check.may_be_chance else "")
        for check in checks
        if not check.passed
    )
    return f"{told}; " + (f"not passed: {missed}" if missed else "every check passed")


def _aligned(champion: Scored, challenger: Scored) -> Scored:
    """The challenger with its labels in the champion's order.

    Raises:
        ConfigError: the documents, what is true of them, or the labels are not the same.
    """
    one, other = champion.head, challenger.head
    if one.task != other.task or set(one.labels) != set(other.labels):
        raise ConfigError(
            f"champion and challenger cannot be compared: {one.task} of {', '.join(one.labels)} against "
            f"{other.task} of {', '.join(other.labels)}; where that is meant, a person makes it the champion with "
            f"`belt models assign REGISTRY {challenger.digest} --why ...`"
        )
    if champion.threshold != challenger.threshold:
        raise ConfigError(
            f"champion and challenger were scored with thresholds {champion.threshold} and {challenger.threshold}"
        )
    _check_same_documents(champion, challenger)
    position = np.array([other.labels.index(label) for label in one.labels])
    if one.task != "regression":
        target = challenger.target
        target = target[:, position] if one.task == "multilabel" else np.argsort(position)[target.astype(np.int64)]
        scores_DL = challenger.scores_DL[:, position]
        challenger = replace(challenger, head=one, target=target, scores_DL=scores_DL)
    if not np.array_equal(champion.target, challenger.target):
        raise ConfigError("labels of the held-out documents changed while they were scored; run again")
    return challenger


def _check_same_documents(champion: Scored, challenger: Scored) -> None:
    before, now = (dict(zip(each.doc_ids, each.fingerprints, strict=True)) for each in (champion, challenger))
    if before == now:
        return
    other_text = sum(before[doc_id] != now[doc_id] for doc_id in before.keys() & now.keys())
    raise ConfigError(
        "champion and challenger were not scored on the same documents: "
        f"{len(before.keys() - now.keys()):,} only by the champion, {len(now.keys() - before.keys()):,} only by the "
        f"challenger, {other_text:,} with another text; if the corpus changed meanwhile, run again"
    )


def _fingerprint(scored: Scored) -> str:
    pairs = zip(scored.doc_ids, scored.fingerprints, strict=True)
    return hashlib.sha256("\n".join(f"{doc_id}\0{text}" for doc_id, text in pairs).encode()).hexdigest()
