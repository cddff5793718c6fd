"""Columns: which Arrow types belt reads, what they become, and which rows are put aside with which reason.

Rules of conversion: ids, labels and splits that are integers or booleans become their decimal or true/false strings;
text, ids and labels that are binary are read as UTF-8; dictionary-encoded columns are read as their values.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

import data_contracts
from belt_tasks.errors import ConfigError
from belt_tasks.specs import CorpusSpec

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

NUM_EXAMPLES = 10

# what the contract forbids to be null: doc_id and text
_REQUIRED = [field.name for field in data_contracts.arrow_schema("documents") if not field.nullable]


def words_for(option: str) -> str:
    """An option of the command line, and what a deployment or a Python call has instead."""
    return f"{option}, or {option.removeprefix('--').replace('-', '_')} of corpus"


def field_of(schema: pa.Schema, name: str, *, option: str, uri: str) -> pa.Field:
    """A column of a file.

    Raises:
        ConfigError: it is not there, or there more than once.
    """
    found = schema.get_all_field_indices(name)
    if len(found) != 1:
        names = ", ".join(repr(other) for other in schema.names[:NUM_EXAMPLES])
        more = f" and {len(schema.names) - NUM_EXAMPLES} more" if len(schema.names) > NUM_EXAMPLES else ""
        problem = "no column" if not found else f"{len(found)} columns named"
        raise ConfigError(f"{uri}: {problem} {name!r}; it has {names}{more} (choose with {words_for(option)})")
    return schema.field(found[0])


def check_columns(schema: pa.Schema, spec: CorpusSpec, *, label_role: str, uri: str) -> None:
    """Check that a file has the columns that a spec names, with types that belt reads.

    Raises:
        ConfigError: all that is wrong with the file, in one message.
    """
    wanted: list[tuple[str, str, str, Any]] = [
        ("--id-column", spec.id_column, "strings or integers", _is_name),
        ("--text-column", spec.text_column, "strings, or binary holding UTF-8", _is_text),
    ]
    if label_role != "none":
        allowed, accepts = _LABEL_TYPES[label_role]
        wanted.append(("--label-column", spec.label_column, allowed, accepts))
        if spec.weight_column is not None:
            wanted.append(("--weight-column", spec.weight_column, "numbers", _is_number))
    if spec.split_column is not None:
        wanted.append(("--split-column", spec.split_column, "strings, integers or booleans", _is_label))
    problems = []
    for option, name, allowed, accepts in wanted:
        try:
            found = field_of(schema, name, option=option, uri=uri)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if not accepts(_value_type(found.type)):
            problems.append(f"{uri}: column {name!r} must hold {allowed}, got {found.type} ({words_for(option)})")
    if problems:
        raise ConfigError("\n".join(problems))


def strings(column: pa.Array) -> tuple[pa.Array, Bools]:
    """A column as strings, and which of its values are not UTF-8 (these come out as null).

    Returns:
        large_string, and a mask of the same length.
    """
    if pt.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type):
        return column.cast(pa.large_string()), np.zeros(len(column), dtype=bool)
    binary = column.cast(pa.large_binary())
    try:
        return binary.cast(pa.large_string()), np.zeros(len(column), dtype=bool)
    except pa.ArrowInvalid:  # some value is not UTF-8: find out which, and keep the others
        invalid = np.array([not _is_utf8(value.as_py()) for value in binary])
        return pc.if_else(pa.array(invalid), pa.scalar(None, pa.large_binary()), binary).cast(
            pa.large_string()
        ), invalid


class RowReader:
    """Turns batches of the wanted columns into documents and rejected rows."""

    def __init__(
        self,
        spec: CorpusSpec,
        *,
        label_role: Literal["none", "label", "labels", "target"],
        vocabulary: frozenset[str] | None,
        with_text: bool,
    ) -> None:
        self._spec, self._label_role, self._with_text = spec, label_role, with_text
        self._vocabulary = None if vocabulary is None else sorted(vocabulary)
        wanted = [spec.id_column]
        if with_text:
            wanted.append(spec.text_column)
        if label_role != "none":
            wanted.append(spec.label_column)
            if spec.weight_column is not None:
                wanted.append(spec.weight_column)
        self.names = list(dict.fromkeys(wanted))

    def split(
        self, batch: pa.RecordBatch, row_index: Int64, *, uri: str, duplicates: Int64
    ) -> dict[Literal["good", "rejected"], pl.DataFrame]:
        """Documents fit for use, and rows put aside with the first reason that applies and all that is wrong."""
        frame, reasons = self._canonical(batch)
        reasons["doc_id_duplicate"] = np.isin(row_index, duplicates)
        for column in _REQUIRED:
            # a value that is not UTF-8 was read as null, but is not missing as well
            invalid = reasons.get(f"{column}_invalid_utf8", False)
            reasons[f"{column}_null"] = frame[column].is_null().to_numpy() & ~np.asarray(invalid)
        bad = np.any(list(reasons.values()), axis=0)
        frame = frame.with_columns(row_index=pl.Series(row_index, dtype=pl.Int64))
        rejected = frame.filter(pl.Series(bad)).select(
            pl.lit(uri).alias("source_uri"), "row_index", "doc_id", *_worded(reasons, bad, self._spec)
        )
        return {"good": frame.filter(pl.Series(~bad)), "rejected": rejected}

    def _canonical(self, batch: pa.RecordBatch) -> tuple[pl.DataFrame, dict[str, Bools]]:
        """The batch in the documents contract's columns, and what only a reader of the raw values can see."""
        reasons: dict[str, Bools] = {}
        doc_id, reasons["doc_id_invalid_utf8"] = strings(batch.column(self._spec.id_column))
        empty = pa.array([""] * len(batch), pa.large_string())
        text = empty
        if self._with_text:
            text, reasons["text_invalid_utf8"] = strings(batch.column(self._spec.text_column))
        values: dict[str, Any] = {"doc_id": pl.Series(doc_id), "text": pl.Series(text)}
        label = labels = target = weight = None
        if self._label_role != "none":
            if self._spec.weight_column is not None:
                weight = pl.Series(batch.column(self._spec.weight_column).cast(pa.float64()))
                reasons["weight_null"] = weight.is_null().to_numpy()
                is_usable = (weight.is_finite() & (weight > 0)).fill_null(value=True)
                reasons["weight_not_positive"] = ~is_usable.to_numpy()
            raw = batch.column(self._spec.label_column)
            match self._label_role:
                case "label":
                    texts, reasons["label_invalid_utf8"] = strings(raw)
                    label = pl.Series(texts, dtype=pl.String)
                    reasons["label_null"] = label.is_null().to_numpy() & ~reasons["label_invalid_utf8"]
                    reasons["label_unknown"] = self._unknown(label)
                case "labels":
                    labels, reasons["label_invalid_utf8"] = _label_lists(raw)
                    missing = labels.is_null() | labels.list.eval(pl.element().is_null()).list.any().fill_null(
                        value=False
                    )
                    reasons["label_null"] = missing.to_numpy() & ~reasons["label_invalid_utf8"]
                    reasons["label_unknown"] = self._unknown(labels)
                case "target":
                    target = pl.Series(raw.cast(pa.float64()))
                    reasons["label_null"] = target.is_null().to_numpy()
                    reasons["target_not_finite"] = (~target.is_finite()).fill_null(value=False).to_numpy()
        num_rows = len(batch)
        values["label"] = pl.Series([None] * num_rows, dtype=pl.String) if label is None else label
        values["labels"] = pl.Series([None] * num_rows, dtype=pl.List(pl.String)) if labels is None else labels
        values["weight"] = pl.Series([None] * num_rows, dtype=pl.Float64) if weight is None else weight
        values["target"] = pl.Series([None] * num_rows, dtype=pl.Float64) if target is None else target
        return pl.DataFrame(values), reasons

    def _unknown(self, labels: pl.Series) -> Bools:
        if self._vocabulary is None:
            return np.zeros(len(labels), dtype=bool)
        known = pl.Series(self._vocabulary, dtype=pl.String).implode()
        if labels.dtype == pl.List:
            frame = pl.DataFrame({"labels": labels, "known": known.new_from_index(0, len(labels))})
            return (
                frame.select(
                    (pl.col("labels").list.drop_nulls().list.set_difference("known").list.len() > 0).fill_null(
                        value=False
                    )
                )
                .to_series()
                .to_numpy()
            )
        return (~labels.is_in(known)).fill_null(value=False).to_numpy()


_WORDS = {
    "doc_id_null": "{id} is null",
    "doc_id_invalid_utf8": "{id} is not valid UTF-8",
    "doc_id_duplicate": "{id} is that of an earlier row",
    "text_null": "{text} is null",
    "text_invalid_utf8": "{text} is not valid UTF-8",
    "label_null": "{label} is null",
    "label_invalid_utf8": "{label} is not valid UTF-8",
    "label_unknown": "{label} is not among the known labels",
    "target_not_finite": "{label} is not a finite number",
    "weight_null": "{weight} is null",
    "weight_not_positive": "{weight} is not a finite number above 0",
}


def in_words(reason: str, spec: CorpusSpec) -> str:
    """What a reason means for the columns that a spec names."""
    return _WORDS[reason].format(
        id=f"column {spec.id_column!r}",
        text=f"column {spec.text_column!r}",
        label=f"column {spec.label_column!r}",
        weight=f"column {spec.weight_column!r}",
    )


def _worded(reasons: dict[str, Bools], bad: Bools, spec: CorpusSpec) -> list[pl.Series]:
    words = {reason: in_words(reason, spec) for reason in _WORDS}
    found = [[reason for reason in words if reason in reasons and reasons[reason][row]] for row in np.flatnonzero(bad)]
    return [
        pl.Series("reason", [names[0] for names in found], dtype=pl.String),
        pl.Series("detail", ["; ".join(words[name] for name in names) for names in found], dtype=pl.String),
    ]


def _label_lists(raw: pa.Array) -> tuple[pl.Series, Bools]:
    lists = raw.cast(pa.large_list(raw.type.value_type)) if not pt.is_large_list(raw.type) else raw
    values, invalid_values = strings(lists.flatten())
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    row_of_value = np.repeat(np.arange(len(lists)), lengths)
    invalid = np.zeros(len(lists), dtype=bool)
    invalid[row_of_value[invalid_values]] = True
    rebuilt = pa.LargeListArray.from_arrays(offsets, values, mask=lists.is_null())
    return pl.Series(rebuilt, dtype=pl.List(pl.String)), invalid


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in _TEXT_CHECKS)


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pt.is_integer(kind))


def _is_label(kind: pa.DataType) -> bool:
    return _is_name(kind) or bool(pt.is_boolean(kind))


def _is_label_list(kind: pa.DataType) -> bool:
    return (pt.is_list(kind) or pt.is_large_list(kind)) and _is_label(_value_type(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))


_TEXT_CHECKS: tuple[Callable[[pa.DataType], bool], ...] = (
    pt.is_string,
    pt.is_large_string,
    pt.is_string_view,
    pt.is_binary,
    pt.is_large_binary,
    pt.is_binary_view,
)
_LABEL_TYPES: dict[str, tuple[str, Any]] = {
    "label": ("class names (strings, integers or booleans)", _is_label),
    "labels": ("lists of class names", _is_label_list),
    "target": ("numbers", _is_number),
}


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False
