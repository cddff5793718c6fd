"""Specs: how a stage works. Small, frozen, keyword-only, and valid from birth.

A spec says nothing about where data lies (that is a reference) or what happened to it (a receipt).
Wrong values raise `pydantic.ValidationError` at construction, from Python, YAML, the CLI and Prefect alike.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
PoolingStrategy = Literal["mean", "max", "length_weighted_mean", "attention"]
PoolingSpace = Literal["logits", "probabilities"]
Selection = Literal["all", "head", "head_tail", "random_k"]
Evidence = Literal["none", "top", "all"]
Removed = Literal["delete", "mark"]
Precision = Literal["fp32", "bf16", "fp16"]
Metric = Literal[
    "accuracy", "macro_f1", "micro_f1", "subset_accuracy", "auc", "log_loss", "mse", "mae", "r2", "spearman"
]
Runner = Literal["threads", "ray"]

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _label_weights(value: Any) -> Any:  # noqa: ANN401 - whatever was given
    """Refuse what is no weights, in one message instead of one for each member of the union."""
    numbers = value.values() if isinstance(value, Mapping) else ()
    are_weights = all(isinstance(number, int | float) and 0.0 < number < math.inf for number in numbers)
    if value is None or value == "balanced" or (isinstance(value, Mapping) and are_weights):
        return value
    raise PydanticCustomError(
        "label_weights", "input should be balanced, or by label a number above 0 (such weights go into --config)"
    )


class Spec(BaseModel):
    """What every spec has in common: frozen, and an unknown field is an error rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ChunkSpec(Spec):
    """How a document's content tokens are cut into windows; the names are the BELT method's own.

    Windows start at 0, stride, 2 * stride, ... and each covers `tokens[start : start + chunk_size]`.
    """

    chunk_size: int = Field(default=510, ge=1)
    """Tokens in a chunk, without special tokens; with them a chunk must fit what the encoder can read."""

    stride: int = Field(default=510, ge=1)
    """Step between the starts of neighbouring chunks, in tokens; chunks overlap where it is below chunk_size."""

    minimal_chunk_length: int = Field(default=1, ge=1)
    """Chunks shorter than this many tokens are dropped, but never a document's last remaining chunk."""

    maximal_text_length: int | None = Field(default=None, ge=1)
    """Tokens of a document beyond this many are not read; without it (None) the whole document is."""

    drop_contained_tail: bool = False
    """Omit a chunk that lies wholly inside the chunk before it (belt-nlp keeps it)."""

    selection: Selection = "all"
    """Which chunks the encoder sees: all, only the head, the head and the last chunk_size tokens, or k random."""

    num_random_chunks: int = Field(default=4, ge=1)
    """How many chunks `selection: random_k` keeps of a document."""

    seed: int = Field(default=0, ge=0)
    """Seed of `selection: random_k`; the draw depends on this and on the document alone."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stride > self.chunk_size:
            raise ValueError(
                f"stride must be at most chunk_size ({self.chunk_size}), got {self.stride}: "
                "a larger step would leave tokens unread between chunks"
            )
        if self.minimal_chunk_length > self.chunk_size:
            raise ValueError(
                f"minimal_chunk_length must be at most chunk_size ({self.chunk_size}), "
                f"got {self.minimal_chunk_length}: no chunk could ever be that long"
            )
        return self


class PoolingSpec(Spec):
    """How a document's chunk outputs become one prediction."""

    pooling_strategy: PoolingStrategy = "mean"
    """Reduction over a document's chunks: mean, max, length_weighted_mean or attention (learned)."""

    pooling_space: PoolingSpace = "logits"
    """Pool logits (as belt-nlp 1.1.0 does) or probabilities (as BELT's documentation describes)."""


class BatchSpec(Spec):
    """How chunks are put into mini-batches."""

    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Budget of one forward: chunks x longest chunk, specials included (at least one chunk); None suits the device."""


class Head(Spec):
    """A task and its labels, in the order of the logits."""

    task: TaskKind
    """binary (one logit, two labels), multiclass, multilabel (a logit per label) or regression (one number)."""

    labels: tuple[str, ...] = Field(min_length=1)
    """Names, unique; of binary the negative label first; of regression the name of the target alone."""

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        allowed = {"binary": (2, 2), "multiclass": (2, None), "multilabel": (1, None), "regression": (1, 1)}
        fewest, most = allowed[self.task]
        if len(self.labels) < fewest or (most is not None and len(self.labels) > most):
            wanted = f"exactly {fewest}" if most == fewest else f"at least {fewest}"
            raise ValueError(f"a {self.task} head needs {wanted} labels, got {len(self.labels)}: {self.labels}")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must be unique, got {self.labels}")
        return self

    @property
    def num_logits(self) -> int:
        """L: columns of the pooled logits."""
        return 1 if self.task in ("binary", "regression") else len(self.labels)


class CorpusSpec(Spec):
    """Which columns and rows of the input are read."""

    id_column: str = "doc_id"
    """Column that identifies a document; integers become their decimal strings."""

    text_column: str = "text"
    """Column that holds the text."""

    label_column: str = "label"
    """Column that holds the label; read only by fine-tuning and evaluation."""

    weight_column: str | None = None
    """Column that says how much a document counts in the training loss, a number above 0; read only by fine-tuning."""

    split_column: str | None = None
    """Column that tells splits apart; without it every row is read."""

    split: str | None = None
    """Rows whose split_column equals this value are read, the others are not."""

    @model_validator(mode="after")
    def _split_has_a_column(self) -> Self:
        if (self.split is None) != (self.split_column is None):
            raise ValueError(
                f"split and split_column go together, got split_column={self.split_column!r} and split={self.split!r}"
            )
        return self


class ScoreSpec(Spec):
    """How documents are scored. `chunks` and `pooling` left out (None) are the checkpoint's own."""

    chunks: ChunkSpec | None = None
    """Windows; None takes those that the checkpoint was fine-tuned with."""

    pooling: PoolingSpec | None = None
    """Pooling; None takes that which the checkpoint was fine-tuned with."""

    batches: BatchSpec = BatchSpec()
    """Mini-batches."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""

    precision: Precision | None = None
    """fp32, bf16 or fp16 of the encoder; None is fp32 on a CPU, and bf16 (fp16 where that is missing) on a GPU."""

    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Probability from which a multilabel document carries a label."""

    max_rejected_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of rows put aside above which nothing is published; of the rows in the files that the run reads."""

    evidence: Evidence = "top"
    """Chunks of a document that table evidence shows: the top ones, all, or none; with none there is no such table."""

    num_evidence_chunks: int = Field(default=3, ge=1)
    """How many chunks of a document `evidence: top` shows, those that contribute most to its label."""

    evidence_text: bool = False
    """Copy the passages into table evidence; without it texts stay where they are, and spans lead there."""

    export: bool = False
    """Also write all predictions as plain Parquet with a manifest, for tools that cannot read Delta Lake."""

    full: bool = False
    """Score every document again, not only those that are new or changed since the last run."""

    removed: Removed = "delete"
    """What becomes of predictions whose document is gone from the corpus: delete, or mark in column removed_at."""

    publish_every: int | None = Field(default=None, ge=1)
    """Where everything is scored, publish after about this many documents; None publishes when all are done."""

    @model_validator(mode="after")
    def _full_is_published_once(self) -> Self:
        if self.full and self.publish_every is not None:
            raise ValueError(
                f"full and publish_every ({self.publish_every}) do not go together: nothing would tell the documents "
                "that were scored again from those that were not"
            )
        return self


class DriftSpec(Spec):
    """When the documents of a run, or what the model says of them, count as other than those of the reference.

    A measure is over its limit where chance alone would hardly bring it there: the p-value must be below `alpha` too.
    """

    max_psi: float = Field(default=0.2, gt=0.0)
    """Population stability index of label shares, scores and lengths up to which all is well."""

    max_ks: float = Field(default=0.1, gt=0.0, le=1.0)
    """Kolmogorov-Smirnov distance of scores and of lengths up to which all is well."""

    alpha: float = Field(default=0.001, gt=0.0, lt=1.0)
    """Significance level: a measure counts as drift only where its p-value is below."""

    max_unknown_increase: float = Field(default=0.02, gt=0.0, le=1.0)
    """By how much the share of tokens that the vocabulary lacks may exceed the reference's."""

    min_documents: int = Field(default=200, ge=1)
    """Documents, of the run and of the reference, below which there is no verdict."""


class TrainSpec(Spec):
    """How an encoder is fine-tuned."""

    task: TaskKind | None = None
    """binary, multiclass, multilabel or regression; None reads it from the label column."""

    chunks: ChunkSpec = ChunkSpec()
    """Windows."""

    pooling: PoolingSpec = PoolingSpec()
    """Pooling."""

    batches: BatchSpec = BatchSpec()
    """Mini-batches of chunks: they decide memory, never the result."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""

    num_devices: int = Field(default=1, ge=1)
    """GPUs of this machine, or processes on its CPU, that share every batch of documents; the result is the same but
    for float noise."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training documents."""

    learning_rate: float = Field(default=5e-5, gt=0.0)
    """Peak learning rate of AdamW."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay; biases and normalisation weights have none."""

    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up: falls linearly to zero, or stays."""

    warmup_fraction: Fraction = 0.1
    """Share of the optimizer steps over which the learning rate rises from zero."""

    documents_per_batch: int = Field(default=8, ge=1)
    """Documents whose loss is computed together."""

    accumulation_steps: int = Field(default=1, ge=1)
    """Document batches whose gradients are summed before the optimizer moves."""

    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm; None leaves them."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Every dropout of the encoder; None keeps its config's."""

    precision: Precision = "fp32"
    """fp32, or autocast to bf16; on a GPU also to fp16."""

    label_weights: Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(_label_weights)] = None
    """How much documents count by their label: balanced makes rare labels count as much as common ones; or weights by
    label, 1 for those not named. Of multilabel they weigh the documents that carry a label against the others."""

    redraw_chunks: bool = False
    """Draw the chunks of `selection: random_k` anew in every epoch; otherwise a document keeps its draw. Validation and
    scoring keep it in any case."""

    validation_fraction: Fraction = 0.1
    """Share of the training documents held out to choose the best epoch; by a stable hash of doc_id."""

    validation_split: str | None = None
    """Rows whose split_column equals this value are held out instead of a share of the training documents."""

    metric_for_best_model: Metric | None = None
    """Metric of the held-out documents that chooses the best epoch; None is their loss."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Epochs without a better one after which training ends; None goes on to the last."""

    save_every_s: float = Field(default=300.0, gt=0.0)
    """Seconds between saved states, from which a run goes on that was killed; one is saved after every epoch too."""

    calibration: Literal["auto", "none"] = "auto"
    """auto fits probabilities to the held-out documents, if there are 20 or more: by a temperature, or by a slope and
    an offset for each label of multilabel; none leaves them."""

    seed: int = Field(default=0, ge=0)
    """Seed of the head's weights, dropout and the order of documents."""

    @model_validator(mode="after")
    def _redraws_what_is_drawn(self) -> Self:
        if self.redraw_chunks and self.chunks.selection != "random_k":
            raise ValueError(f"redraw_chunks needs selection random_k, got selection {self.chunks.selection!r}")
        return self


class GateSpec(Spec):
    """When a challenger may take the champion's place; None of a limit does not look."""

    metric: Metric | None = None
    """What is compared; None is accuracy, micro F1 of multilabel, mean squared error of regression."""

    min_gain: float = Field(default=0.0, ge=0.0)
    """Gain in that metric that has to be exceeded, beyond chance."""

    confidence: float = Field(default=0.95, ge=0.5, lt=1.0)
    """Share of the resamples that lie in the gain's interval, whose lower end counts."""

    num_resamples: int = Field(default=2000, ge=100)
    """How often the held-out documents are drawn anew, with replacement."""

    resampling_seed: int = Field(default=0, ge=0)
    """Seed of these draws."""

    min_documents: int = Field(default=100, ge=1)
    """Held-out documents without which there is no promotion."""

    min_recall: float | None = Field(default=None, ge=0.0, le=1.0)
    """Recall that the challenger has to reach for every label."""

    max_recall_drop: float | None = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the champion's recall that the challenger may lose for any label."""

    max_ece: float | None = Field(default=None, ge=0.0, le=1.0)
    """Expected calibration error that the challenger may have."""

    max_ece_increase: float | None = Field(default=None, ge=0.0, le=1.0)
    """How far the expected calibration error may exceed the champion's."""

    max_slowdown: float | None = Field(default=None, ge=0.0)
    """Share by which the challenger's encoder may take longer for a document; both on the same device."""


class LengthSpec(Spec):
    """How the ways of reading long documents are compared: the head alone, head and tail, all of it."""

    confidence: float = Field(default=0.95, ge=0.5, lt=1.0)
    """Share of the resamples that lie in the intervals of the length report."""

    num_resamples: int = Field(default=2000, ge=100)
    """How often the length report draws the documents anew, with replacement."""

    resampling_seed: int = Field(default=0, ge=0)
    """Seed of these draws."""

    min_bucket_documents: int = Field(default=30, ge=1)
    """Documents of like length below which the length report says that they are too few, rather than what they show."""


class RaySpec(Spec):
    """Where shards are scored under `runner: ray`. It decides how long a run takes, never its result."""

    address: str | None = Field(default=None, pattern=r"^(ray://)?\S+:\d+$")
    """ray://HOST:10001 or, on a node of the cluster, HOST:6379; None starts a private cluster on this machine."""

    num_workers: int | None = Field(default=None, ge=1)
    """Processes that score a shard each; None takes as many as the cluster has room for when the run begins."""

    num_cpus: int = Field(default=1, ge=1)
    """Cores of each worker: they tokenize, and encode where there is no GPU."""

    num_gpus: float = Field(default=0.0, ge=0.0, le=1.0)
    """GPUs of each worker: 1, or a fraction for workers that share one; 0 takes none."""

    start_timeout_s: float = Field(default=300.0, gt=0.0)
    """Seconds to wait until the cluster has room for a first worker."""
