"""Whether a table that was stored under another version of its contract can be one of the present version.

A contract may gain columns that can be null, and come to allow nulls: the rows that are there already satisfy it, the
new columns null. Anything else that changed can only be cured by writing the table anew.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from data_contracts.loader import arrow_schema


class Misfit(NamedTuple):
    """What keeps a stored table from being one of its contract."""

    path: str
    """The column, `column.field` or `column[]` within it."""
    rule: str
    """missing: a required one is; type; null: nulls are allowed that the contract forbids; extra."""
    message: str


def misfits(stored: pa.Schema, name: str) -> list[Misfit]:
    """Find what keeps the rows of a stored table from being rows of a contract; no row is looked at.

    Args:
        stored: the schema of the table, nullability included.
        name: the contract, one of TABLES.

    Returns:
        In the order of the contract's columns, columns that it does not have last; none if they can all be kept.
    """
    return list(_of_fields(stored, arrow_schema(name), ""))


def is_stored_so(stored: pa.Schema, name: str) -> bool:
    """Whether a table has the contract's columns, types and nullability, in any order."""
    return {field.name: field for field in stored} == {field.name: field for field in arrow_schema(name)}


def _of_fields(stored: Iterable[pa.Field], wanted: Iterable[pa.Field], within: str) -> Iterator[Misfit]:
    what = "field" if within else "column"
    found = {field.name: field for field in stored}
    for field in wanted:
        path = f"{within}{field.name}"
        if field.name in found:
            yield from _of_field(found.pop(field.name), field, path)
        elif not field.nullable:
            yield Misfit(path, "missing", f"missing {what} {path} ({field.type}), which is required")
    for name, field in found.items():
        yield Misfit(f"{within}{name}", "extra", f"extra {what} {within}{name} ({field.type})")


def _of_field(stored: pa.Field, wanted: pa.Field, path: str) -> Iterator[Misfit]:
    if stored.nullable and not wanted.nullable:
        yield Misfit(path, "null", f"{path} may be null, which the contract forbids")
    if pa.types.is_list(stored.type) and pa.types.is_list(wanted.type):
        yield from _of_field(stored.type.value_field, wanted.type.value_field, f"{path}[]")
    elif pa.types.is_struct(stored.type) and pa.types.is_struct(wanted.type):
        yield from _of_fields(stored.type, wanted.type, f"{path}.")
    elif stored.type != wanted.type:
        yield Misfit(path, "type", f"{path} is {stored.type}, not {wanted.type}")
