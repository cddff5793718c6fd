"""The data contracts of belt: what each table it reads or writes looks like, and whether a given table does.

This package knows tables only. It knows nothing of stages, flows or where tables lie, and it raises no error
over rows: it returns violations, and whoever asked decides what they mean.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import Final, cast

import dataframely as dy
import polars as pl
import pyarrow as pa
from open_data_contract_standard.model import SchemaProperty

from data_contracts.evolution import Misfit, is_stored_so, misfits
from data_contracts.loader import (
    TABLES,
    arrow_schema,
    columns,
    contract,
    is_finite,
    laws,
    primary_key,
    purpose,
    rules,
)

__all__ = [
    "TABLES",
    "Misfit",
    "Violation",
    "arrow_schema",
    "contract",
    "is_stored_so",
    "message",
    "misfits",
    "purpose",
    "rules",
    "violations",
]

_MAX_EXAMPLES: Final = 3
_MAX_VALUE_CHARS: Final = 40
_ROW: Final = "row position"  # no contract names a column so: a name in SQL has no space


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One way in which a table breaks its contract."""

    name: str
    """The column, `column.field` or `column[]` within it, the key columns, or the law across columns."""
    rule: str
    """Of columns: missing, extra, repeated, type, malformed. Of rows: null, key, enum, minimum, length,
    pattern, finite, law."""
    count: int
    """Rows that break the rule; for a rule about columns, the columns of that name."""
    examples: tuple[int, ...]
    """Positions in the table of the first rows that break it, from 0, at most three; none for columns."""
    message: str
    """What is wrong, counted, with the examples and, where short, their values."""


def violations(table: pa.Table, name: str, *, keys: bool = True) -> list[Violation]:
    """Find all the ways in which a table breaks a contract.

    Columns come first: missing, extra, repeated, of another Arrow type, or malformed (a string that is not
    UTF-8). Rows are checked only if every column of the contract is sound, for otherwise the laws cannot be
    decided. The order of the columns and the nullability that the table declares do not matter; nulls do.

    Args:
        table: the rows.
        name: the contract, one of TABLES.
        keys: whether the primary key must be unique in the table; a batch of a stream cannot know the others.

    Returns:
        Violations in the order of the contract's columns, the key first and laws across columns last; none if
        the table satisfies its contract.
    """
    found = list(_column_violations(table, arrow_schema(name)))
    if all(violation.rule == "extra" for violation in found):
        found += _row_violations(table.select([str(column.name) for column in columns(name)]), name, keys=keys)
    return found


def message(found: Iterable[Violation | Misfit], name: str, where: str) -> str:
    """Put all violations into one text that says which contract is broken, where, and how.

    Args:
        found: what `violations` or `misfits` returned, not empty.
        name: the contract, one of TABLES.
        where: what the reader knows the table by, such as "shard 00042".
    """
    major = str(contract(name).version).partition(".")[0]
    return f"{name} v{major}, {where}: {'; '.join(violation.message for violation in found)}"


def _column_violations(table: pa.Table, expected: pa.Schema) -> Iterator[Violation]:
    for field in expected:
        found = [table.column(index) for index in table.schema.get_all_field_indices(field.name)]
        types = [_nullable(column.type) for column in found]
        wanted = _nullable(field.type)
        if not types:
            yield _of_column(field.name, "missing", f"missing column {field.name} ({wanted})")
        elif len(types) > 1:
            text = f"{len(types)} columns named {field.name}"
            yield _of_column(field.name, "repeated", text, count=len(types))
        elif types[0] != wanted:
            yield _of_column(field.name, "type", f"column {field.name} is {types[0]}, not {wanted}")
        elif (fault := _fault(found[0])) is not None:
            yield _of_column(field.name, "malformed", f"malformed column {field.name}: {fault}")
    for field in table.schema:
        if field.name not in expected.names:
            yield _of_column(field.name, "extra", f"extra column {field.name} ({field.type})")


def _fault(column: pa.ChunkedArray) -> str | None:
    """Find what polars would take on trust, such as bytes that are not UTF-8; it can crash on them later."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None


def _of_column(name: str, rule: str, text: str, *, count: int = 1) -> Violation:
    return Violation(name=name, rule=rule, count=count, examples=(), message=text)


def _nullable(arrow_type: pa.DataType) -> pa.DataType:
    """Drop what a type declares about nulls inside it: only the rows can tell whether there are any."""
    if pa.types.is_list(arrow_type):
        return pa.list_(_nullable(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([(field.name, _nullable(field.type)) for field in arrow_type])
    return arrow_type


def _row_violations(table: pa.Table, name: str, *, keys: bool) -> Iterator[Violation]:
    frame = cast("pl.DataFrame", pl.from_arrow(table)).with_columns(pl.int_range(pl.len()).alias(_ROW))
    _, failure = _numbered_rules(name, keys=keys).filter(frame)
    counts = failure.counts()
    if not counts:
        return
    failed = failure.details()
    for rule, (path, kind, phrase) in _phrases(name).items():
        if rule not in counts:
            continue
        rows = failed.filter(pl.col(rule) == "invalid")
        shown = []
        if kind == "key":
            shown = primary_key(name)
            rows = rows.drop_nulls(shown)  # a null key is reported as null, not as a duplicate as well
        elif kind in {"enum", "minimum", "length", "pattern"} and path in frame.columns:
            shown = [path]
        if rows.height > 0:
            yield _of_rows(rows, path, kind, phrase, shown)


def _of_rows(rows: pl.DataFrame, path: str, kind: str, phrase: str, shown: list[str]) -> Violation:
    examples = rows.head(_MAX_EXAMPLES)
    positions = tuple(examples[_ROW].to_list())
    where = "rows " if rows.height > 1 else "row "
    where = ("first " if rows.height > _MAX_EXAMPLES else "") + where + ", ".join(map(str, positions))
    if shown and not any(examples[column].dtype.is_nested() for column in shown):
        values = [row[0] if len(shown) == 1 else row for row in examples.select(shown).iter_rows()]
        where += f": {', '.join(map(_short, values))}"
    verb = ("row breaks " if rows.height == 1 else "rows break ") if kind == "law" else ""
    text = f"{rows.height} {verb}{phrase} ({where})"
    return Violation(name=path, rule=kind, count=rows.height, examples=positions, message=text)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 3]}..."


@cache
def _numbered_rules(name: str, *, keys: bool) -> type[dy.Schema]:
    """Add a row number to the rules of a table, so that rows that fail know their position."""
    numbered = {"row_position": dy.Int64(nullable=True, alias=_ROW)}
    schema = new_class("Numbered", (rules(name, keys=keys),), exec_body=lambda body: body.update(numbered))
    return cast("type[dy.Schema]", schema)


@cache
def _phrases(name: str) -> dict[str, tuple[str, str, str]]:
    """Map each rule, as dataframely names it, to name, rule and wording in a Violation."""
    key = primary_key(name)
    key_text = key[0] if len(key) == 1 else f"({', '.join(key)})"
    phrases = {"primary_key": (", ".join(key), "key", f"duplicate {key_text}")}
    for column in columns(name):
        phrases |= _column_phrases(column, str(column.name), f"{column.name}|")
    return phrases | {law: (law, "law", f"{law}: {sql}") for law, sql in laws(name).items()}


def _column_phrases(column: SchemaProperty, path: str, prefix: str) -> dict[str, tuple[str, str, str]]:
    options = column.logicalTypeOptions or {}
    phrases = {}
    if column.required:
        phrases["nullability"] = ("null", f"null {path}")
    if "minimum" in options:
        phrases["min"] = ("minimum", f"{path} below {options['minimum']}")
    if "minLength" in options or "minItems" in options:
        least = options.get("minLength", options.get("minItems"))
        phrases["min_length"] = ("length", f"{path} shorter than {least}")
    if "pattern" in options:
        phrases["regex"] = ("pattern", f"{path} not like {options['pattern']}")
    if column.enum is not None:
        allowed = ", ".join(str(choice.value) for choice in column.enum)
        phrases["check__enum"] = ("enum", f"{path} not one of {allowed}")
    if is_finite(column):
        phrases["inf"] = ("finite", f"infinite {path}")
        phrases["nan"] = ("finite", f"NaN {path}")
    named = {f"{prefix}{rule}": (path, *phrase) for rule, phrase in phrases.items()}
    if column.items is not None:
        named |= _column_phrases(column.items, f"{path}[]", f"{prefix}inner_")
    for field in column.properties or []:
        named |= _column_phrases(field, f"{path}.{field.name}", f"{prefix}inner_{field.name}_")
    return named
