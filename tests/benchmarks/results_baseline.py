"""The baseline of the results: tf-idf of words and pairs of words, and a linear model, on the same split.

Its regularisation is chosen by cross-validation on the training documents: a baseline should be a good one.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.multiclass import OneVsRestClassifier

from belt_tasks import resampling, storage
from belt_tasks.resampling import Floats
from belt_tasks.specs import LengthSpec, Spec, TaskKind
from tests.benchmarks.results_corpora import Found

MAX_ITERATIONS, TOLERANCE = 1_000, 1e-2  # of liblinear
REGULARISATION = (1.0, 10.0, 100.0)
"""Values of C that are tried; of ridge regression 1 / alpha."""
NUM_FOLDS = 3


class Baseline(Spec):
    """What it reached."""

    data_digest: str
    """Of the corpus."""
    value: float
    """Accuracy, or mean squared error."""
    lower: float
    upper: float
    num_training_documents: int
    """Those that fine-tuning holds out are among them: there is nothing to choose here."""
    num_test_documents: int
    num_features: int
    chosen: dict[str, float]
    """Regularisation."""
    seconds: float
    """Of training and prediction."""


def baseline(found: Found, task: TaskKind, spec: LengthSpec, path: Path) -> Baseline:
    """Train and measure it, or read what an earlier run found for the same data.

    Args:
        found: the corpus.
        task: regression, or one with a class for each document.
        spec: of the interval: the draws are those of the length report.
        path: where it is kept.
    """
    digest = found.digest
    if path.exists():
        kept = Baseline.model_validate_json(path.read_bytes())
        if kept.data_digest == digest:
            return kept
    measured = _measure(found, task, spec, digest)
    storage.write_bytes(str(path), (measured.model_dump_json(indent=1) + "\n").encode())
    return measured


def _measure(found: Found, task: TaskKind, spec: LengthSpec, digest: str) -> Baseline:
    label = pl.col("label").cast(pl.Float64 if task == "regression" else pl.String)
    rows = found.rows().with_columns(label).drop_nulls().unique("doc_id", keep="first", maintain_order=True)
    training, test = rows.filter(split="train"), rows.filter(split="test").sort("doc_id")
    if task != "regression":  # what belt puts aside too
        test = test.filter(pl.col("label").is_in(training["label"].unique().implode()))
    model, tfidf = _model(task), TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    started = time.perf_counter()
    model.fit(tfidf.fit_transform(training["text"].to_list()), training["label"].to_numpy())
    predicted = model.predict(tfidf.transform(test["text"].to_list()))
    seconds = time.perf_counter() - started
    target = test["label"].to_numpy()
    score_D = (predicted - target) ** 2 if task == "regression" else (predicted == target).astype(np.float64)

    def mean(weights_BD: Floats) -> Floats:
        return (weights_BD @ score_D / weights_BD.sum(axis=1))[:, None]

    (lower,), (upper,) = resampling.intervals(
        mean,
        num_documents=len(test),
        confidence=spec.confidence,
        num_resamples=spec.num_resamples,
        seed=spec.resampling_seed,
    )
    return Baseline(
        data_digest=digest,
        value=float(score_D.mean()),
        lower=float(lower),
        upper=float(upper),
        num_training_documents=len(training),
        num_test_documents=len(test),
        num_features=len(tfidf.vocabulary_),
        chosen={name: float(value) for name, value in model.best_params_.items()},
        seconds=seconds,
    )


def _model(task: TaskKind) -> Any:  # scikit-learn is untyped
    if task == "regression":
        linear, values = Ridge(), {"alpha": [1 / value for value in REGULARISATION]}
    else:
        one = LogisticRegression(
            solver="liblinear", dual=True, tol=TOLERANCE, max_iter=MAX_ITERATIONS
        )  # memory of one class a time
        linear, values = OneVsRestClassifier(one), {"estimator__C": list(REGULARISATION)}
    scoring = "neg_mean_squared_error" if task == "regression" else "accuracy"
    folds = KFold(NUM_FOLDS, shuffle=True, random_state=0)
    return GridSearchCV(linear, values, scoring=scoring, cv=folds)
