"""Evaluation: a run's predictions against the corpus's labels, as numbers and pictures."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from belt_tasks import corpus as corpora
from belt_tasks import metrics, plots, prepare, score_tables, storage
from belt_tasks.errors import ConfigError
from belt_tasks.length_comparison import LengthReport
from belt_tasks.planning import EvaluationPlan
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.specs import CorpusSpec, Head, ScoreSpec, Spec
from belt_tasks.training_set import LABEL_ROLES

MOST_LABELS = 10  # shown in a message
PREDICTED = ["doc_id", "content_fingerprint", "num_tokens", "scores"]


class EvaluationReceipt(Spec):
    """A finished evaluation."""

    metrics: dict[str, Any]
    """See `metrics.task_metrics`."""
    rejected_by_reason: dict[str, int]
    """Rows whose label could not be used, besides those that scoring put aside."""
    metrics_uri: str
    plot_uris: tuple[str, ...]
    length: LengthReport | None = None
    """Of an evaluation that was asked whether reading further pays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledScores:
    """Scores of the documents whose label is known."""

    doc_ids: tuple[str, ...]
    """Ascending."""
    fingerprints: tuple[str, ...]
    """Of each document's text."""
    num_tokens_D: npt.NDArray[np.int64]
    """Content tokens of each document."""
    target: npt.NDArray[Any]
    """Class positions [D], bools [D, L] or numbers [D]."""
    scores_DL: npt.NDArray[np.float64]
    threshold: float
    """Of multilabel."""
    rejected_by_reason: dict[str, int]
    """Rows whose label could not be used."""


def evaluate_run(plan: EvaluationPlan, corpus: CorpusSpec, manifest: Manifest) -> EvaluationReceipt:
    """Compare a run's predictions with the labels of the corpus that it scored, and write metrics and plots.

    Args:
        plan: labelled shards, and the checkpoint's task and labels; labels outside its vocabulary are put aside.
        corpus: columns, and the split whose rows were scored.
        manifest: of the scoring run; the evaluation is written into the run's folder.

    Raises:
        ConfigError: no document has both a prediction and a usable label.
    """
    found = labelled_scores(plan, corpus, manifest)
    head, threshold, target, scores_DL = plan.head, found.threshold, found.target, found.scores_DL
    run = RunRef(output_uri=manifest.run["output_uri"], run_id=manifest.run["run_id"])
    measured = metrics.task_metrics(head.task, target, scores_DL, head.labels, threshold)
    folder = storage.join(run.uri, "evaluation")
    plot_uris = []
    for name, image in _plots(measured, target, scores_DL, head, threshold).items():
        plot_uris.append(storage.join(folder, f"{name}.png"))
        storage.write_bytes(plot_uris[-1], image)
    metrics_uri = storage.join(folder, "metrics.json")
    storage.write_bytes(metrics_uri, (json.dumps(measured, indent=1, allow_nan=False) + "\n").encode())
    return EvaluationReceipt(
        metrics=measured,
        rejected_by_reason=found.rejected_by_reason,
        metrics_uri=metrics_uri,
        plot_uris=tuple(plot_uris),
    )


def labelled_scores(
    plan: EvaluationPlan, corpus: CorpusSpec, manifest: Manifest, *, is_published: bool = True
) -> LabelledScores:
    """Join a run's predictions with the labels of the corpus that it scored.

    Args:
        plan: as of `evaluate_run`.
        corpus: as of `evaluate_run`.
        manifest: as of `evaluate_run`.
        is_published: read the table that shows the run; otherwise the files that it wrote, which are all of a run that
            scored every document.

    Raises:
        ConfigError: no document has both a prediction and a usable label.
    """
    run = RunRef(output_uri=manifest.run["output_uri"], run_id=manifest.run["run_id"])
    head = plan.head
    labelled, rejected_by_reason = _read_labels(plan, corpus, run.existing_duplicates_uri())
    predicted = _scores(_read_published(run) if is_published else _read_written(run.output_uri, manifest))
    joined = labelled.join(predicted, on="doc_id", how="inner").sort("doc_id")
    if len(joined) == 0:
        labels = ", ".join([*head.labels[:MOST_LABELS], *(["..."] if len(head.labels) > MOST_LABELS else [])])
        raise ConfigError(
            f"nothing to evaluate: of {len(labelled)} labelled and {len(predicted)} scored documents none is both; "
            f"rows put aside: {rejected_by_reason or 'none'}; column {corpus.label_column!r} was searched for the "
            f"checkpoint's labels: {labels}"
        )
    return LabelledScores(
        doc_ids=tuple(joined["doc_id"]),
        fingerprints=tuple(joined["content_fingerprint"]),
        num_tokens_D=joined["num_tokens"].to_numpy().astype(np.int64),
        target=_target(joined, head),
        scores_DL=np.array(joined["scores"].to_list(), dtype=np.float64),
        threshold=ScoreSpec.model_validate_json(manifest.run["spec"]).threshold,
        rejected_by_reason=rejected_by_reason,
    )


def _read_labels(
    plan: EvaluationPlan, corpus: CorpusSpec, duplicates_uri: str | None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """doc_id and label, labels or target of every usable row, and how many rows were not."""
    good, rejected = [], []
    for shard in plan.shards:
        batches = corpora.read_documents(
            shard,
            corpus,
            duplicates=prepare.duplicates_of(shard, duplicates_uri),
            label_role=LABEL_ROLES[plan.head.task],
            with_text=False,
            vocabulary=None if plan.head.task == "regression" else frozenset(plan.head.labels),
        )
        for batch in batches:
            good.append(batch.good.select("doc_id", "label", "labels", "target"))
            rejected.append(batch.rejected.filter(pl.col("reason").str.starts_with("doc_id").not_()))
    counts = pl.concat(rejected).group_by("reason").len().sort("reason")
    return pl.concat(good), dict(counts.iter_rows())


def _read_published(run: RunRef) -> pl.DataFrame:
    """As the run left the table: another may have been published since."""
    columns = [*PREDICTED, "removed_at"]
    frame = score_tables.read_table(run.output_uri, "predictions", columns=columns, run_id=run.run_id)
    return frame.filter(pl.col("removed_at").is_null())


def _read_written(output_uri: str, manifest: Manifest) -> pl.DataFrame:
    uris = manifest.uris(output_uri, "predictions")
    if not uris:
        raise ConfigError(f"run {manifest.run['run_id']} of {output_uri}: wrote no predictions")
    return pl.concat([pl.DataFrame(storage.read_parquet(uri, columns=PREDICTED)) for uri in uris])


def _scores(predictions: pl.DataFrame) -> pl.DataFrame:
    """With the list of scores in label order."""
    return predictions.select(*PREDICTED[:-1], pl.col("scores").list.eval(pl.element().struct.field("score")))


def _target(joined: pl.DataFrame, head: Head) -> npt.NDArray[Any]:
    match head.task:
        case "binary" | "multiclass":
            positions = {label: i for i, label in enumerate(head.labels)}
            return np.array([positions[label] for label in joined["label"]], dtype=np.int64)
        case "multilabel":
            return np.array([[label in carried for label in head.labels] for carried in joined["labels"]], dtype=bool)
        case "regression":
            return joined["target"].to_numpy()


def _plots(
    measured: dict[str, Any], target: npt.NDArray[Any], scores_DL: npt.NDArray[np.float64], head: Head, threshold: float
) -> dict[str, bytes]:
    if head.task == "regression":
        return {"predicted_against_target": plots.predicted_against_target_png(target, scores_DL[:, 0])}
    if head.task == "multilabel":
        bins = metrics.reliability_bins(*metrics.label_decisions(target, scores_DL, threshold))
        return {"reliability": plots.reliability_png(bins, counted="label decisions")}
    bins = metrics.reliability_bins(*metrics.class_decisions(target, scores_DL))
    return {
        "reliability": plots.reliability_png(bins),
        "confusion_matrix": plots.confusion_matrix_png(measured["confusion_matrix"], head.labels),
    }
