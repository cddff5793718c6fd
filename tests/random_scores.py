"""Random targets, and scores that know a little of them."""

import numpy as np


def scored(task, num_documents, seed, *, skill=1.0):
    """Random targets, scores with ties that have something to do with them, and labels."""
    random = np.random.default_rng(seed)
    if task == "regression":
        target = random.integers(0, 4, num_documents).astype(float)
        return target, np.round(target * skill + random.normal(size=num_documents), 1)[:, None], ("stars",)
    num_labels = 2 if task == "binary" else 3
    labels = tuple("abc"[:num_labels])
    if task == "multilabel":
        target = random.random((num_documents, num_labels)) < 0.4
        return target, np.round(0.3 * skill * target + 0.7 * random.random(target.shape), 1).clip(0, 1), labels
    target = random.integers(0, num_labels, num_documents)
    logits = skill * np.eye(num_labels)[target] + random.normal(size=(num_documents, num_labels))
    scores = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 2)
    return target, scores, labels
