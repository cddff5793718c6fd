"""The training set: labelled documents as tokens, read once from the corpus and used in every epoch."""

import hashlib
from dataclasses import dataclass
from typing import Any

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
from belt_tasks.specs import CorpusSpec, Head, TaskKind
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
    """Content tokens, one document after the other."""
    offsets: npt.NDArray[np.int64]
    """Document d owns `input_ids_T[offsets[d] : offsets[d + 1]]`."""
    document_seed_D: npt.NDArray[np.int64]
    """A number that depends on the text alone."""
    target: npt.NDArray[Any]
    """What `heads.loss` wants: positions in the labels int64 [D], bool [D, L], or float64 [D]."""
    head: Head
    fingerprint: str
    """sha256 over ids, contents and labels, 64 hex digits."""

    def held_out_D(self, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
        """Documents for validation: a share of about `fraction`, by a stable hash of doc_id."""
        return np.array([_unit_hash(f"{seed}\0{doc_id}") < fraction for doc_id in self.doc_ids], dtype=bool)


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
) -> ShardReceipt:
    """Tokenize one shard of labelled documents and write its tokens table, unless an earlier attempt did.

    Args:
        shard: what to read.
        corpus: columns, and the split whose rows are wanted.
        run: where to write.
        encoder: local directory or hub name of the tokenizer.
        label_role: how to read the label column.
        duplicates_uri: table of rows whose doc_id came before; None where there is none.
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


def load_training_set(
    uris: list[str], *, task: TaskKind | None, target_name: str, label_role: LabelRole
) -> TrainingSet:
    """Read tokens tables into one training set, and learn the labels from them.

    Args:
        uris: tokens tables.
        task: None lets the number of classes decide between binary and multiclass.
        target_name: the name of a regression's target.
        label_role: how the label column was read.

    Raises:
        ConfigError: there is no document, or the labels do not make a task.
    """
    table = pa.concat_tables([storage.read_parquet(uri) for uri in uris])
    frame = pl.DataFrame(table.drop_columns(["input_ids"])).with_row_index("row").sort("doc_id")
    if len(frame) == 0:
        raise ConfigError("no document is left to train on: all rows were rejected or belong to another split")
    tokens = table["input_ids"].combine_chunks().take(pa.array(frame["row"].to_numpy()))
    head, target = _head_and_target(frame, task, target_name, label_role)
    fingerprint = hashlib.sha256()
    for row in frame.select("doc_id", "content_fingerprint", "label", "labels", "target").iter_rows():
        fingerprint.update(repr(row).encode())
    return TrainingSet(
        doc_ids=frame["doc_id"].to_list(),
        input_ids_T=tokens.values.to_numpy()[tokens.offsets[0].as_py() : tokens.offsets[-1].as_py()],
        offsets=tokens.offsets.to_numpy().astype(np.int64) - tokens.offsets[0].as_py(),
        document_seed_D=prepare.document_seeds(frame["content_fingerprint"]),
        target=target,
        head=head,
        fingerprint=fingerprint.hexdigest(),
    )


def _head_and_target(
    frame: pl.DataFrame, task: TaskKind | None, target_name: str, label_role: LabelRole
) -> tuple[Head, npt.NDArray[Any]]:
    if label_role == "target":
        return Head(task="regression", labels=(target_name,)), frame["target"].to_numpy()
    if label_role == "labels":
        names = frame["labels"].list.explode().drop_nulls().unique().sort().to_list()
        if not names:
            raise ConfigError("a multilabel task needs labels, but every document's list is empty")
        target_DL = np.array([[name in carried for name in names] for carried in frame["labels"]], dtype=bool)
        return Head(task="multilabel", labels=tuple(names)), target_DL
    names = frame["label"].unique().sort().to_list()
    fitting: TaskKind = task or ("binary" if len(names) == 2 else "multiclass")  # noqa: PLR2004 - two classes
    if len(names) < 2 or (fitting == "binary" and len(names) != 2):  # noqa: PLR2004
        needed = "exactly 2" if fitting == "binary" else "at least 2"
        shown = ", ".join(map(repr, names[:10]))
        raise ConfigError(f"a {fitting} task needs {needed} different labels, got {len(names)}: {shown}")
    positions = {name: i for i, name in enumerate(names)}
    target_D = np.array([positions[name] for name in frame["label"]], dtype=np.int64)
    return Head(task=fitting, labels=tuple(names)), target_D


def _tokens_table(block: prepare.TokenBlock) -> pa.Table:
    schema = data_contracts.arrow_schema("tokens")
    columns = block.documents.to_arrow()
    tokens = pa.ListArray.from_arrays(block.tokens.offsets.astype(np.int32), block.tokens.input_ids_T)
    values = {name: columns[name] for name in schema.names if name in columns.column_names}
    values |= {"input_ids": tokens, "num_tokens": pa.array(block.tokens.num_tokens_D.astype(np.int32))}
    return pa.table({name: values[name] for name in schema.names}).cast(schema)


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
