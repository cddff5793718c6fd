"""The training set: labelled documents as tokens, read once from the corpus and used in every epoch and run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.types as pt

import data_contracts
from belt_tasks import milestones, prepare, progress, publishing, storage
from belt_tasks.corpus import LabelRole, ShardRef
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import RunRef, ShardWriter
from belt_tasks.receipts import Counts, ShardReceipt, Stopwatch
from belt_tasks.resampling import METRICS
from belt_tasks.specs import CorpusSpec, Head, TaskKind, TrainSpec
from belt_tasks.token_buffer import map_file, mapped_tokens
from belt_tasks.tokens import load_tokenizer

LABEL_ROLES: dict[TaskKind, LabelRole] = {
    "binary": "label",
    "multiclass": "label",
    "multilabel": "labels",
    "regression": "target",
}


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """D labelled documents in the order of their doc_id, so that neither files nor workers change a run."""

    doc_ids: list[str]
    input_ids_T: npt.NDArray[np.int32]
    """Content tokens of all documents, maybe mapped from a file."""
    first_token_D: npt.NDArray[np.int64]
    """Document d owns `input_ids_T[first_token_D[d] :][: num_tokens_D[d]]`."""
    num_tokens_D: npt.NDArray[np.int64]
    document_seed_D: npt.NDArray[np.int64]
    """A number that depends on the text alone."""
    target: npt.NDArray[Any]
    """What `heads.losses` wants: positions in the labels int64 [D], bool [D, L], or float64 [D]."""
    head: Head
    fingerprint: str
    """sha256 over ids, contents and labels, 64 hex digits."""
    weight_D: npt.NDArray[np.float64] | None = None
    """How much each document counts; None where all count the same."""
    is_validation_D: npt.NDArray[np.bool_] | None = None
    """Which documents come from a split of their own for validation; None where there is no such split."""

    def held_out_D(self, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
        """Documents for validation: their own split, or a share of about `fraction`, by a stable hash of doc_id.

        A label's only documents are not held out: the model would never see the label.
        """
        if self.is_validation_D is not None:
            return self.is_validation_D
        held_out_D = np.array([_unit_hash(f"{seed}\0{doc_id}") < fraction for doc_id in self.doc_ids], dtype=bool)
        return held_out_D & ~self._carries(~self._is_in(~held_out_D))

    def _is_in(self, chosen_D: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which labels some documents have, [L]; all of a regression."""
        num_labels = len(self.head.labels)
        if self.head.task == "regression":
            return np.ones(num_labels, dtype=bool)
        if self.head.task == "multilabel":
            return np.asarray(self.target[chosen_D].any(axis=0))
        return np.asarray(np.bincount(self.target[chosen_D], minlength=num_labels) > 0)

    def _carries(self, labels_L: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which documents have one of some labels, [D]."""
        if self.head.task == "regression":
            return np.zeros(len(self.target), dtype=bool)
        return np.asarray(self.target[:, labels_L].any(axis=1) if self.target.ndim > 1 else labels_L[self.target])


def lonely_labels(training_set: TrainingSet, training: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Labels that a single training document has, which nobody learns from one."""
    head, target = training_set.head, training_set.target[training]
    if head.task == "regression":
        return ()
    num_L = target.sum(axis=0) if target.ndim > 1 else np.bincount(target, minlength=len(head.labels))
    return tuple(label for label, number in zip(head.labels, num_L, strict=True) if number == 1)


def label_weights(
    training_set: TrainingSet, training: npt.NDArray[np.int64], wanted: Literal["balanced"] | dict[str, float] | None
) -> npt.NDArray[np.float64] | None:
    """Weights by label, as `heads.losses` wants them: float64 [L], or None where all labels count the same.

    Args:
        training_set: labelled documents.
        training: those that are trained on.
        wanted: balanced gives each label of a binary or multiclass task the same sum of weights, and of multilabel
            those that carry a label the same as those that do not; or weights by name, 1 for those not named.

    Raises:
        ConfigError: a name is no label.
    """
    head = training_set.head
    if wanted is None:
        return None
    if wanted != "balanced":
        unknown = sorted(set(wanted) - set(head.labels))
        if unknown:
            raise ConfigError(
                f"label_weights: no such labels as {', '.join(map(repr, unknown[:10]))}; the training documents have "
                f"{', '.join(map(repr, head.labels[:10]))}"
            )
        return np.array([wanted.get(label, 1.0) for label in head.labels], dtype=np.float64)
    target = training_set.target[training]
    if head.task == "multilabel":
        num_with_L = np.maximum(target.sum(axis=0), 1)
        return np.asarray((len(target) - num_with_L).clip(1) / num_with_L, dtype=np.float64)
    num_L = np.maximum(np.bincount(target, minlength=len(head.labels)), 1)
    return np.asarray(len(target) / (len(head.labels) * num_L), dtype=np.float64)


def check_task(task: TaskKind | None, spec: TrainSpec) -> None:
    """See that what a spec asks for is something that a task has.

    Args:
        task: None where the labels will decide between binary and multiclass.
        spec: how to fine-tune.

    Raises:
        ConfigError: the metric is another task's, or there are no labels to weigh.
    """
    tasks: tuple[TaskKind, ...] = ("binary", "multiclass") if task is None else (task,)
    allowed = dict.fromkeys(metric for each in tasks for metric in METRICS[each])
    if spec.metric_for_best_model not in (None, *allowed):
        raise ConfigError(
            f"metric_for_best_model of a {' or '.join(tasks)} task must be one of {', '.join(allowed)}, "
            f"got {spec.metric_for_best_model!r}"
        )
    if task == "regression" and spec.label_weights is not None:
        raise ConfigError("label_weights: a regression has no labels to weigh; leave it out")


def infer_task(column: pa.DataType, wanted: TaskKind | None) -> TaskKind | None:
    """The task that a label column stands for: numbers with a fraction mean regression, lists mean multilabel.

    Returns:
        The task; None for class names, where the number of classes decides between binary and multiclass.

    Raises:
        ConfigError: the wanted task cannot use such a column.
    """
    kind = column.value_type if pt.is_dictionary(column) else column
    is_list = pt.is_list(kind) or pt.is_large_list(kind)
    allowed: tuple[TaskKind, ...]
    if is_list:
        allowed = ("multilabel",)
    elif pt.is_floating(kind) or pt.is_decimal(kind):
        allowed = ("regression",)
    elif pt.is_integer(kind):
        allowed = ("binary", "multiclass", "regression")
    else:
        allowed = ("binary", "multiclass")
    if wanted is not None and wanted not in allowed:
        raise ConfigError(f"task must be {' or '.join(allowed)} for a label column of {column}, got {wanted!r}")
    return wanted or (allowed[0] if len(allowed) == 1 else None)


@milestones.of_shard("prepare")
def prepare_shard(
    shard: ShardRef,
    corpus: CorpusSpec,
    *,
    run: RunRef,
    encoder: str,
    label_role: LabelRole,
    duplicates_uri: str | None,
    vocabulary: tuple[str, ...] | None = None,
) -> ShardReceipt:
    """Tokenize one shard of labelled documents and write its tokens table, unless an earlier attempt did.

    Args:
        shard: what to read.
        corpus: columns, and the split whose rows are wanted.
        run: where to write.
        encoder: local directory or hub name of the tokenizer.
        label_role: how to read the label column.
        duplicates_uri: table of rows whose doc_id came before; None where there is none.
        vocabulary: allowed class names; None allows all.
    """
    finished = publishing.finished_shard(run, shard)
    if finished is not None:
        progress.advance("tokenize", shard.num_rows)
        return finished
    stopwatch, counts = Stopwatch(), Counts()
    blocks = prepare.token_blocks(
        shard,
        corpus,
        load_tokenizer(encoder),
        duplicates_uri=duplicates_uri,
        stopwatch=stopwatch,
        label_role=label_role,
        vocabulary=None if vocabulary is None else frozenset(vocabulary),
    )
    with ShardWriter.open(run, shard, table="tokens") as writer:
        for block in blocks:
            writer.reject(block.rejected)
            with stopwatch.time("write"):
                writer.write(_tokens_table(block))
            counts += Counts(
                num_documents=len(block.documents),
                num_tokens=len(block.tokens.input_ids_T),
                num_unknown_tokens=block.tokens.num_unknown,
            )
    return writer.receipt(counts.model_copy(update=stopwatch.receipt()))


@contextmanager
def load_training_set(
    uris: Sequence[str],
    *,
    task: TaskKind | None,
    target_name: str,
    label_role: LabelRole,
    validation_uris: Sequence[str] = (),
    tokens_path: str | None = None,
) -> Iterator[tuple[TrainingSet, str | None]]:
    """Read tokens tables into one training set, whose tokens are mapped, and learn the labels from them.

    Args:
        uris: tokens tables, with one document or more.
        task: None lets the number of classes decide between binary and multiclass.
        target_name: the name of a regression's target.
        label_role: how the label column was read.
        validation_uris: tokens tables of the documents that are validated with.
        tokens_path: where another process of this machine has mapped the tokens; None maps them here.

    Returns:
        The training set, which lasts as long as the block, and where other processes find its tokens.

    Raises:
        ConfigError: the labels do not make a task.
    """
    frames = [
        _documents(uri).with_columns(is_validation=pl.lit(is_validation))
        for some, is_validation in ((uris, False), (validation_uris, True))
        for uri in some
    ]
    frame = pl.concat(frames)
    frame = frame.with_columns(first_token=pl.col("num_tokens").cum_sum() - pl.col("num_tokens"))
    frame = frame.sort("doc_id", "is_validation")
    learned_from = frame.filter(pl.col("is_validation").not_())
    head = _learn_head(learned_from, task, target_name, label_role)
    fingerprint = hashlib.sha256()
    for row in frame.select("doc_id", "content_fingerprint", "label", "labels", "target", "weight").iter_rows():
        fingerprint.update(repr(row).encode())
    with ExitStack() as stack:
        if tokens_path is None:
            input_ids_T, path = stack.enter_context(mapped_tokens([*uris, *validation_uris]))
        else:
            input_ids_T, path = map_file(tokens_path), tokens_path
        yield (
            TrainingSet(
                doc_ids=frame["doc_id"].to_list(),
                input_ids_T=input_ids_T,
                first_token_D=frame["first_token"].to_numpy(),
                num_tokens_D=frame["num_tokens"].to_numpy(),
                document_seed_D=prepare.document_seeds(frame["content_fingerprint"]),
                target=_target(frame, head),
                head=head,
                fingerprint=fingerprint.hexdigest(),
                weight_D=None if frame["weight"].null_count() else frame["weight"].to_numpy(),
                is_validation_D=frame["is_validation"].to_numpy() if validation_uris else None,
            ),
            path,
        )


def tokens_uris(output_uri: str, receipts: Sequence[ShardReceipt]) -> list[str]:
    """The tokens tables of prepared shards."""
    return [storage.join(output_uri, file.path) for receipt in receipts for file in receipt.files_of("tokens")]


def learn_labels(uris: Sequence[str], *, task: TaskKind | None, label_role: LabelRole) -> tuple[str, ...] | None:
    """The labels that training documents have; None of a regression.

    Args:
        uris: their tokens tables.
        task: None lets the number of classes decide between binary and multiclass.
        label_role: how the label column was read.

    Raises:
        ConfigError: they do not make a task.
    """
    if label_role == "target":
        return None
    return _learn_head(pl.concat(map(_documents, uris)), task, "", label_role).labels


def _documents(uri: str) -> pl.DataFrame:
    """A tokens table without its tokens."""
    names = [name for name in data_contracts.arrow_schema("tokens").names if name != "input_ids"]
    frame = pl.DataFrame(storage.read_parquet(uri, columns=names))
    return frame.with_columns(pl.col("num_tokens").cast(pl.Int64))


def _learn_head(frame: pl.DataFrame, task: TaskKind | None, target_name: str, label_role: LabelRole) -> Head:
    if label_role == "target":
        return Head(task="regression", labels=(target_name,))
    if label_role == "labels":
        names = frame["labels"].list.explode().drop_nulls().unique().sort().to_list()
        if not names:
            raise ConfigError("a multilabel task needs labels, but every document's list is empty")
        return Head(task="multilabel", labels=tuple(names))
    names = frame["label"].unique().sort().to_list()
    fitting: TaskKind = task or ("binary" if len(names) == 2 else "multiclass")  # noqa: PLR2004 - two classes
    if len(names) < 2 or (fitting == "binary" and len(names) != 2):  # noqa: PLR2004
        needed = "exactly 2" if fitting == "binary" else "at least 2"
        shown = ", ".join(map(repr, names[:10]))
        raise ConfigError(f"a {fitting} task needs {needed} different labels, got {len(names)}: {shown}")
    return Head(task=fitting, labels=tuple(names))


def _target(frame: pl.DataFrame, head: Head) -> npt.NDArray[Any]:
    match head.task:
        case "regression":
            return frame["target"].to_numpy()
        case "multilabel":
            return np.array([[name in carried for name in head.labels] for carried in frame["labels"]], dtype=bool)
        case "binary" | "multiclass":
            positions = {name: i for i, name in enumerate(head.labels)}
            return np.array([positions[name] for name in frame["label"]], dtype=np.int64)


def _tokens_table(block: prepare.TokenBlock) -> pa.Table:
    schema = data_contracts.arrow_schema("tokens")
    columns = block.documents.to_arrow()
    tokens = pa.ListArray.from_arrays(block.tokens.offsets.astype(np.int32), block.tokens.input_ids_T)
    values = {name: columns[name] for name in schema.names if name in columns.column_names}
    values |= {"input_ids": tokens, "num_tokens": pa.array(block.tokens.num_tokens_D.astype(np.int32))}
    return pa.table({name: values[name] for name in schema.names}).cast(schema)


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
