"""Drift: how far the statistics of a run are from those of the reference, by numbers that have limits.

PSI, the population stability index, is the sum over categories of (p - q) * ln(p / q), p and q being the two's shares.
So that a category which one of them lacks does not make it infinite, both are first mixed with SMOOTHING of their
mean: that keeps the index 0 where the shares are equal, whatever the numbers of documents, and the same when the two
are exchanged. Numbers, of both samples, are put into NUM_GROUPS groups that hold equal shares of both together.

A small run differs from the reference by chance: a PSI counts only where the chi-squared test, and a KS distance only
where its own test, says that it is more than that. (Labels of multilabel documents are counted as if each were drawn
alone.)

Shape letters: B categories, D documents, U different values.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from belt_tasks.specs import DriftSpec, Spec
from belt_tasks.statistics import RunStatistics

SMOOTHING = 0.01
NUM_GROUPS = 10

Quantity = Literal["labels", "scores", "lengths", "unknown_tokens"]
Verdict = Literal["none", "drifted", "too_few_documents"]
Counts = npt.NDArray[np.int64]

QUANTITIES: dict[Quantity, str] = {
    "labels": "label shares",
    "scores": "scores",
    "lengths": "document lengths",
    "unknown_tokens": "share of unknown tokens",
}
WITHOUT_REFERENCE = "No verdict on drift: there is no reference yet"
OF_REFERENCE = "This run is what later ones are compared with"
STATISTICS = {"psi": "PSI", "ks": "KS", "increase": "increase"}


class Measure(Spec):
    """One number, and what it may be."""

    quantity: Quantity
    """What is compared: shares of the labels, scores, lengths in tokens, the share of unknown tokens."""
    statistic: Literal["psi", "ks", "increase"]
    value: float | None
    """None where it is not known."""
    p_value: float | None = None
    """Of the test that goes with it; None where there is none."""
    limit: float
    passed: bool | None
    """Whether it is within the limit, or may be chance; None where there are too few documents to say."""


class DriftReport(Spec):
    """How far a run is from the reference."""

    verdict: Verdict
    """drifted where any measure did not pass."""
    num_documents: int
    num_documents_reference: int
    reference_run_ids: tuple[str, ...]
    measures: tuple[Measure, ...]
    """Empty where one of the two has no document."""
    spec: DriftSpec

    @property
    def words(self) -> str:
        """The verdict, in a sentence without a full stop."""
        if self.verdict == "too_few_documents":
            here, there = f"{self.num_documents:,} here", f"{self.num_documents_reference:,} in the reference"
            return f"No verdict on drift: fewer than {self.spec.min_documents:,} documents ({here}, {there})"
        far: dict[str, list[str]] = {}
        for measure in self.measures:
            if measure.passed is False:
                far.setdefault(QUANTITIES[measure.quantity], []).append(
                    f"{STATISTICS[measure.statistic]} {measure.value:.2f}"
                )
        told = ", ".join(f"{name} ({', '.join(by)})" for name, by in far.items())
        return f"Drift: {told}" if far else "No drift"


def drift_of(now: RunStatistics, reference: RunStatistics, spec: DriftSpec) -> DriftReport:
    """Compare a run with the reference.

    Args:
        now: of the run.
        reference: of documents by which it is measured, scored by the same rules.
        spec: limits.

    Raises:
        ValueError: they were scored by different rules, and do not compare.
    """
    if now.scoring_fingerprint != reference.scoring_fingerprint:
        both = (now.scoring_fingerprint, reference.scoring_fingerprint)
        raise ValueError(f"scoring_fingerprint must be that of the reference, got {both[0]!r} and {both[1]!r}")
    fewest = min(now.num_documents, reference.num_documents)
    measures = _measures(now, reference, spec) if fewest else []
    if fewest < spec.min_documents:
        verdict: Verdict = "too_few_documents"
        measures = [measure.model_copy(update={"passed": None}) for measure in measures]
    else:
        verdict = "none" if all(measure.passed for measure in measures) else "drifted"
    return DriftReport(
        verdict=verdict,
        num_documents=now.num_documents,
        num_documents_reference=reference.num_documents,
        reference_run_ids=reference.run_ids,
        measures=tuple(measures),
        spec=spec,
    )


def psi(counts_B: npt.ArrayLike, reference_B: npt.ArrayLike) -> float:
    """The population stability index of two counts of the same categories, each above 0 somewhere.

    0 where the shares are the same; .1 is commonly taken for a small change, .25 for a large one. It is at most
    (1 - SMOOTHING) * 2 * ln(2 / SMOOTHING - 1), some 10.5, where the two have no category in common.
    """
    now_B, then_B = (np.asarray(counts, dtype=np.float64) for counts in (counts_B, reference_B))
    now_B, then_B = now_B / now_B.sum(), then_B / then_B.sum()
    mean_B = (now_B + then_B) / 2
    filled_B = mean_B > 0
    now_B, then_B = (((1 - SMOOTHING) * share + SMOOTHING * mean_B)[filled_B] for share in (now_B, then_B))
    return float(((now_B - then_B) * np.log(now_B / then_B)).sum())


def grouped(now_D: npt.ArrayLike, reference_D: npt.ArrayLike) -> tuple[Counts, Counts]:
    """Counts of two samples of numbers in at most NUM_GROUPS groups of neighbouring values.

    The groups hold shares that are as equal as repeated values allow, of both together, each sample weighing the same:
    a value that lies far from all others cannot push those into one group.
    """
    samples = [np.asarray(sample, dtype=np.float64) for sample in (now_D, reference_D)]
    values_U = np.unique(np.concatenate(samples))
    counts = [np.bincount(np.searchsorted(values_U, sample), minlength=len(values_U)) for sample in samples]
    share_U = sum(count_U / count_U.sum() for count_U in counts) / 2
    middle_U = np.cumsum(share_U) - share_U / 2
    group_U = np.minimum((middle_U * NUM_GROUPS).astype(int), NUM_GROUPS - 1)
    now_B, then_B = (np.bincount(group_U, weights=count, minlength=NUM_GROUPS).astype(int) for count in counts)
    return now_B, then_B


def _measures(now: RunStatistics, reference: RunStatistics, spec: DriftSpec) -> list[Measure]:
    found = []
    if not now.is_regression:
        shares = [np.array([*each.label_counts, each.num_without_label]) for each in (now, reference)]
        found.append(_psi("labels", shares[0], shares[1], spec))
    found.append(_psi("scores", *grouped(now.sample.scores, reference.sample.scores), spec))
    found.append(_ks("scores", now.sample.scores, reference.sample.scores, spec))
    found.append(_psi("lengths", *grouped(now.sample.num_tokens, reference.sample.num_tokens), spec))
    found.append(_ks("lengths", now.sample.num_tokens, reference.sample.num_tokens, spec))
    shares_now = (now.unknown_share, reference.unknown_share)
    increase = None if None in shares_now else (shares_now[0] or 0.0) - (shares_now[1] or 0.0)
    limit = spec.max_unknown_increase
    passed = increase is None or increase <= limit
    found.append(Measure(quantity="unknown_tokens", statistic="increase", value=increase, limit=limit, passed=passed))
    return found


def _psi(quantity: Quantity, now_B: Counts, then_B: Counts, spec: DriftSpec) -> Measure:
    from scipy import stats  # noqa: PLC0415 - half a second of every command

    filled_B = now_B + then_B > 0
    table = np.stack([now_B, then_B])[:, filled_B]
    p_value = float(stats.chi2_contingency(table, correction=False).pvalue) if table.shape[1] > 1 else 1.0
    value = psi(now_B, then_B)
    passed = value <= spec.max_psi or p_value >= spec.alpha
    return Measure(quantity=quantity, statistic="psi", value=value, p_value=p_value, limit=spec.max_psi, passed=passed)


def _ks(quantity: Quantity, now_D: tuple[float, ...], then_D: tuple[float, ...], spec: DriftSpec) -> Measure:
    from scipy import stats  # noqa: PLC0415 - half a second of every command

    found = stats.ks_2samp(now_D, then_D, method="asymp")  # exact is slow, and no better for hundreds of documents
    value, p_value = float(found.statistic), float(found.pvalue)
    passed = value <= spec.max_ks or p_value >= spec.alpha
    return Measure(quantity=quantity, statistic="ks", value=value, p_value=p_value, limit=spec.max_ks, passed=passed)
