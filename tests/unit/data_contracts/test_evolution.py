"""A stored table fits its contract exactly where Arrow can make the contract's rows of its own."""

from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_contracts import TABLES, Misfit, arrow_schema, is_stored_so, misfits


def stored_as(name: str, column: str, field: pa.Field) -> pa.Schema:
    schema = arrow_schema(name)
    return schema.set(schema.get_field_index(column), field)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_contract_fits_in_any_order(name: str) -> None:
    schema = arrow_schema(name)
    turned = pa.schema(list(schema)[::-1])

    assert misfits(turned, name) == []
    assert is_stored_so(turned, name)


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_of_missing_columns_only_the_required_ones_matter(name: str, data: st.DataObject) -> None:
    schema = arrow_schema(name)
    gone = data.draw(st.lists(st.sampled_from(schema.names), min_size=1, unique=True))
    stored = pa.schema([field for field in schema if field.name not in gone])

    found = misfits(stored, name)

    assert [(each.path, each.rule) for each in found] == [
        (field.name, "missing") for field in schema if field.name in gone and not field.nullable
    ]
    assert not is_stored_so(stored, name)


SPAN = arrow_schema("predictions").field("top_chunk").type
SCORE = arrow_schema("predictions").field("scores").type.value_type


def span(*fields: pa.Field) -> pa.Schema:
    return stored_as("predictions", "top_chunk", pa.field("top_chunk", pa.struct(fields), nullable=False))


def scores(*fields: pa.Field, nullable: bool = False) -> pa.Schema:
    item = pa.field("element", pa.struct(fields), nullable=nullable)
    return stored_as("predictions", "scores", pa.field("scores", pa.list_(item), nullable=False))


NESTED: list[tuple[Callable[[], pa.Schema], list[Misfit]]] = [
    (
        lambda: span(*list(SPAN)[1:]),
        [Misfit("top_chunk.chunk_index", "missing", "missing field top_chunk.chunk_index (int32), which is required")],
    ),
    (
        lambda: span(*SPAN, pa.field("page", pa.int32())),
        [Misfit("top_chunk.page", "extra", "extra field top_chunk.page (int32)")],
    ),
    (
        lambda: scores(SCORE[0], pa.field("score", pa.float32(), nullable=False)),
        [Misfit("scores[].score", "type", "scores[].score is float, not double")],
    ),
    (
        lambda: scores(SCORE[0].with_nullable(True), SCORE[1], nullable=True),
        [
            Misfit("scores[]", "null", "scores[] may be null, which the contract forbids"),
            Misfit("scores[].label", "null", "scores[].label may be null, which the contract forbids"),
        ],
    ),
    (
        lambda: stored_as("predictions", "labels", pa.field("labels", pa.string(), nullable=False)),
        [Misfit("labels", "type", "labels is string, not list<element: string not null>")],
    ),
]


@pytest.mark.parametrize(("stored", "expected"), NESTED, ids=[case[1][0].path for case in NESTED])
def test_types_are_compared_to_the_bottom(stored: Callable[[], pa.Schema], expected: list[Misfit]) -> None:
    assert misfits(stored(), "predictions") == expected
    assert not is_stored_so(stored(), "predictions")
