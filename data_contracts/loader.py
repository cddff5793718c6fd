"""Reads the contracts: the YAML files in this directory are the one definition of every table.

An Arrow schema says how a table is stored, a dataframely schema which rows are lawful; both are derived here.
Arrow types stand in `physicalType`; laws in `required`, `primaryKey`, `enum`, `logicalTypeOptions` and the
custom property `finite`; laws across columns in `quality`, as boolean polars SQL. No other keyword is a law.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from types import new_class
from typing import Any, Final, cast

import dataframely as dy
import polars as pl
import pyarrow as pa
from open_data_contract_standard.model import OpenDataContractStandard, SchemaObject, SchemaProperty

TABLES: Final[tuple[str, ...]] = (
    "documents",
    "inventory",
    "sources",
    "tokens",
    "chunks",
    "predictions",
    "evidence",
    "rejected",
    "runs",
)

# physicalType -> how it is stored, and the column that checks it
_TYPES: Final[dict[str, tuple[pa.DataType, Callable[..., dy.Column]]]] = {
    "string": (pa.string(), dy.String),
    "int32": (pa.int32(), dy.Int32),
    "int64": (pa.int64(), dy.Int64),
    "float": (pa.float32(), dy.Float32),
    "double": (pa.float64(), dy.Float64),
    "timestamp[us, UTC]": (
        pa.timestamp("us", tz="UTC"),
        partial(dy.Datetime, time_unit="us", time_zone="UTC"),
    ),
}
# logicalTypeOptions -> dataframely's name for the law; any other option fails, lest it be ignored
_OPTIONS: Final[dict[str, str]] = {
    "minimum": "min",
    "minLength": "min_length",  # counted in bytes, which for the only length in use, 1, is the same
    "minItems": "min_length",
    "pattern": "regex",
}


@cache
def contract(name: str) -> OpenDataContractStandard:
    """Read the contract of one of TABLES; it is shared between callers, so leave it as it is.

    Raises:
        ValueError: if there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
    text = resources.files("data_contracts").joinpath(f"{name}.odcs.yaml").read_text(encoding="utf-8")
    return OpenDataContractStandard.from_string(text)


def purpose(name: str) -> str:
    """What a table is for, in a sentence."""
    description = contract(name).description
    return (description and description.purpose) or ""


@cache
def arrow_schema(name: str) -> pa.Schema:
    """Build the Arrow schema that a table is written with.

    A field is nullable unless the contract requires it, at every depth. The metadata of a field carries its
    description as `comment`, which readers of Delta Lake show with the column; that of the schema carries `contract_id`
    and `contract_version`.
    """
    document = contract(name)
    return pa.schema(
        [_field(column) for column in columns(name)],
        metadata={"contract_id": document.id, "contract_version": document.version},
    )


@cache
def rules(name: str, *, keys: bool = True) -> type[dy.Schema]:
    """Build the dataframely schema of a table: its types in polars and its laws, within and across columns.

    Args:
        name: one of TABLES.
        keys: whether the primary key is checked; a batch of a stream cannot know the keys of the others.
    """
    namespace: dict[str, Any] = {str(column.name): _column(column, keys=keys) for column in columns(name)}
    namespace |= {law: _rule(sql) for law, sql in laws(name).items()}
    # dataframely collects columns and rules from the class body, which here is the contract
    schema = new_class(name.capitalize(), (dy.Schema,), exec_body=lambda body: body.update(namespace))
    return cast("type[dy.Schema]", schema)


def columns(name: str) -> list[SchemaProperty]:
    """List the columns of a table in the order in which they are written."""
    return _table(name).properties or []


def primary_key(name: str) -> list[str]:
    """List the columns of a table's primary key, in the order of their `primaryKeyPosition`."""
    keys = [column for column in columns(name) if column.primaryKey]
    return [str(column.name) for column in sorted(keys, key=lambda column: column.primaryKeyPosition or 0)]


def laws(name: str) -> dict[str, str]:
    """Map the name of each law across columns to the boolean polars SQL that states it."""
    return {str(law.name): str(law.implementation) for law in _table(name).quality or []}


def is_finite(column: SchemaProperty) -> bool:
    """Tell whether NaN and infinity break the contract in this column."""
    return any(extra.property == "finite" and extra.value is True for extra in column.customProperties or [])


def _table(name: str) -> SchemaObject:
    (table,) = contract(name).schema_ or []
    return table


def _field(column: SchemaProperty) -> pa.Field:
    return pa.field(
        column.name or "element",  # the items of a list have no name; Parquet calls them so
        _arrow_type(column),
        nullable=not column.required,
        metadata={"comment": column.description},
    )


def _arrow_type(column: SchemaProperty) -> pa.DataType:
    if column.items is not None:
        return pa.list_(_field(column.items))
    if column.properties is not None:
        return pa.struct([_field(field) for field in column.properties])
    return _TYPES[str(column.physicalType)][0]


def _column(column: SchemaProperty, *, keys: bool) -> dy.Column:
    settings: dict[str, Any] = {
        "nullable": not column.required,
        "primary_key": keys and column.primaryKey is True,
        "description": column.description,
    }
    settings |= {_OPTIONS[option]: value for option, value in (column.logicalTypeOptions or {}).items()}
    if column.enum is not None:
        settings["check"] = {"enum": _is_one_of([choice.value for choice in column.enum])}
    if column.logicalType == "number":
        settings |= {"allow_inf": not is_finite(column), "allow_nan": not is_finite(column)}
    if column.items is not None:
        return dy.List(_column(column.items, keys=keys), **settings)
    if column.properties is not None:
        return dy.Struct({str(field.name): _column(field, keys=keys) for field in column.properties}, **settings)
    return _TYPES[str(column.physicalType)][1](**settings)


def _is_one_of(allowed: list[Any]) -> Callable[[pl.Expr], pl.Expr]:
    return lambda expr: expr.is_in(allowed)


def _rule(sql: str) -> Any:  # noqa: ANN401 -- dataframely keeps the type of its rules private
    return dy.rule()(lambda _: pl.sql_expr(sql))
