"""Columns: what each Arrow type becomes, which types are refused, and the reasons for which a row is put aside."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_contracts
from belt_tasks import columns
from belt_tasks.errors import ConfigError
from belt_tasks.specs import CorpusSpec

TEXTS = ["plain", "", "ünïcödé \U0001f468\u200d\U0001f469\u200d\U0001f467", "nul \0 inside", None]
INVALID = b"\xff\xfe not UTF-8"

TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.binary()),
]


def of_type(values, kind):
    """An array of any of TEXT_TYPES, from strings or bytes."""
    raw = pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    if pa.types.is_dictionary(kind):
        encoded = raw.dictionary_encode()
        words = pc.cast(encoded.dictionary, kind.value_type, safe=False)
        return pa.DictionaryArray.from_arrays(encoded.indices.cast(kind.index_type), words)
    return pc.cast(raw, kind, safe=False)


def split(rows, *, label_role="none", vocabulary=None, duplicates=(), spec=None, with_text=True):
    reader = columns.RowReader(spec or CorpusSpec(), label_role=label_role, vocabulary=vocabulary, with_text=with_text)
    batch = pa.RecordBatch.from_pydict(rows).select(reader.names)
    return reader.split(
        batch, np.arange(len(batch)) + 100, uri="/corpus/a.parquet", duplicates=np.array(duplicates, dtype=np.int64)
    )


def reasons(found):
    return dict(found["rejected"].select("row_index", "reason").iter_rows())


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_of_every_type_is_read_as_it_is(kind):
    values, invalid = columns.strings(of_type(TEXTS, kind))

    assert values.type == pa.large_string()
    assert values.to_pylist() == TEXTS
    assert not invalid.any()


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_invalid_utf8_of_every_type_is_found_and_the_rest_is_kept(kind):
    values, invalid = columns.strings(of_type(["a", INVALID, None, "b", b"\xed\xa0\x80"], kind))

    assert values.to_pylist() == ["a", None, None, "b", None]
    assert invalid.tolist() == [False, True, False, False, True]


def test_a_slice_of_a_column_is_read_within_its_bounds():
    values, invalid = columns.strings(of_type([INVALID, "a", INVALID, "b"], pa.string())[1:])

    assert values.to_pylist() == ["a", None, "b"]
    assert invalid.tolist() == [False, True, False]


@given(st.lists(st.none() | st.text(max_size=5) | st.binary(max_size=4), max_size=8), st.sampled_from(TEXT_TYPES))
def test_strings_are_what_python_decodes(values, kind):
    def decoded(value):
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return None

    found, invalid = columns.strings(of_type(values, kind))

    assert found.to_pylist() == [decoded(value) for value in values]
    assert invalid.tolist() == [value is not None and decoded(value) is None for value in values]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([-1, 0, None], pa.int8()), ["-1", "0", None]),
        (pa.array([2**63 - 1, -(2**63)], pa.int64()), ["9223372036854775807", "-9223372036854775808"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([7, 7, None]).dictionary_encode(), ["7", "7", None]),
    ],
)
def test_integers_and_booleans_become_strings_by_rule(column, expected):
    values, invalid = columns.strings(column)

    assert values.to_pylist() == expected
    assert not invalid.any()


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.int32(), pa.uint64()], ids=str)
def test_ids_of_every_type_become_strings(kind):
    is_number = pa.types.is_integer(kind)
    ids = pa.array([7, 42], kind) if is_number else of_type(["7", "42"], kind)

    found = split({"doc_id": ids, "text": ["x", "y"]})

    assert found["good"]["doc_id"].to_list() == ["7", "42"]
    assert found["good"]["row_index"].to_list() == [100, 101]
    assert len(found["rejected"]) == 0


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *[(of_type(["a", "b"], kind), ["a", "b"]) for kind in TEXT_TYPES],
        (pa.array([3, 4]), ["3", "4"]),
        (pa.array([True, False]), ["true", "false"]),
    ],
    ids=str,
)
def test_class_names_of_every_type_become_strings(label, expected):
    found = split({"doc_id": ["1", "2"], "text": ["x", "y"], "label": label}, label_role="label")

    assert found["good"]["label"].to_list() == expected


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([["a", "b"], []]),
        pa.array([["a", "b"], []], pa.large_list(pa.large_string())),
        pa.array([["a", "b"], []], pa.list_(pa.string_view())),
        pa.array([[b"a", b"b"], []]),
        pa.array([["a", "b"], []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([["gone"], ["a", "b"], []])[1:],
    ],
    ids=lambda labels: str(labels.type),
)
def test_lists_of_class_names_of_every_type_become_lists_of_strings(labels):
    found = split({"doc_id": ["1", "2"], "text": ["x", "y"], "label": labels}, label_role="labels")

    assert found["good"]["labels"].to_list() == [["a", "b"], []]


@pytest.mark.parametrize(
    "target",
    [
        pa.array([1.5, -2.0]),
        pa.array([1.5, -2.0], pa.float32()),
        pa.array(np.array([1.5, -2.0], np.float16)),
        pa.array([1.5, -2.0]).dictionary_encode(),
        pa.array([1.5, -2.0]).cast(pa.decimal128(5, 2)),
    ],
    ids=lambda target: str(target.type),
)
def test_targets_of_every_type_become_numbers(target):
    found = split({"doc_id": ["1", "2"], "text": ["x", "y"], "label": target}, label_role="target")

    assert found["good"]["target"].to_list() == [1.5, -2.0]


def test_good_rows_satisfy_the_documents_contract():
    for label_role, label in (("none", ["a"]), ("label", ["a"]), ("labels", [["a"]]), ("target", [1.0])):
        good = split({"doc_id": [1], "text": [""], "label": label}, label_role=label_role)["good"]
        schema = data_contracts.arrow_schema("documents")

        assert data_contracts.violations(good.select(schema.names).to_arrow().cast(schema), "documents") == []


def test_an_empty_text_is_a_document():
    found = split({"doc_id": ["", "b"], "text": ["", " "]})

    assert found["good"]["text"].to_list() == ["", " "]
    assert found["good"]["doc_id"].to_list() == ["", "b"]


def test_every_reason_of_a_class_name():
    rows = {
        "doc_id": [b"a", None, INVALID, b"d", b"e", b"f", b"g", b"h", b"i"],
        "text": [b"x", b"x", b"x", b"x", None, INVALID, b"x", b"x", b"x"],
        "label": [b"one", b"one", b"one", b"one", b"one", b"one", None, INVALID, b"three"],
    }

    found = split(rows, label_role="label", vocabulary=frozenset({"one", "two"}), duplicates=[103])

    assert found["good"]["doc_id"].to_list() == ["a"]
    assert reasons(found) == {
        101: "doc_id_null",
        102: "doc_id_invalid_utf8",
        103: "doc_id_duplicate",
        104: "text_null",
        105: "text_invalid_utf8",
        106: "label_null",
        107: "label_invalid_utf8",
        108: "label_unknown",
    }
    assert found["rejected"]["doc_id"].to_list() == [None, None, "d", "e", "f", "g", "h", "i"]
    assert found["rejected"]["source_uri"].unique().to_list() == ["/corpus/a.parquet"]


def test_every_reason_of_a_list_of_class_names():
    labels = [[b"one", b"two"], [], None, [b"one", None], [b"one", INVALID], [b"one", b"three"]]
    rows = {"doc_id": range(6), "text": ["x"] * 6, "label": labels}

    found = split(rows, label_role="labels", vocabulary=frozenset({"one", "two"}))

    assert found["good"]["labels"].to_list() == [["one", "two"], []]
    assert reasons(found) == {102: "label_null", 103: "label_null", 104: "label_invalid_utf8", 105: "label_unknown"}
    assert found["rejected"]["detail"].to_list() == [
        "column 'label' is null",
        "column 'label' is null",
        "column 'label' is not valid UTF-8",
        "column 'label' is not among the known labels",
    ]


def test_every_reason_of_a_target():
    rows = {"doc_id": range(4), "text": ["x"] * 4, "label": [1.0, None, float("nan"), float("-inf")]}

    found = split(rows, label_role="target")

    assert found["good"]["target"].to_list() == [1.0]
    assert reasons(found) == {101: "label_null", 102: "target_not_finite", 103: "target_not_finite"}


def test_every_reason_but_the_models_own_is_in_the_contract():
    allowed = {
        choice.value
        for column in data_contracts.contract("rejected").schema_[0].properties
        for choice in column.enum or []
    }

    assert set(columns._WORDS) | {"output_not_finite"} == allowed


def test_a_row_with_several_problems_names_the_first_and_tells_all():
    spec = CorpusSpec(id_column="key", text_column="body", label_column="class")
    rows = {"key": pa.array([None], pa.string()), "body": [INVALID], "class": ["three"]}

    found = split(rows, label_role="label", vocabulary=frozenset({"one"}), spec=spec, duplicates=[100])

    assert found["rejected"].rows() == [
        (
            "/corpus/a.parquet",
            100,
            None,
            "doc_id_null",
            (
                "column 'key' is null; column 'key' is that of an earlier row; "
                "column 'body' is not valid UTF-8; column 'class' is not among the known labels"
            ),
        )
    ]


def test_labels_are_free_without_a_vocabulary_and_unread_without_a_role():
    rows = {"doc_id": ["1"], "text": ["x"], "label": [None]}

    assert split({**rows, "label": ["anything"]}, label_role="label")["good"]["label"].to_list() == ["anything"]
    assert split(rows)["good"]["label"].to_list() == [None]


def test_without_text_only_the_other_columns_are_asked_for():
    reader = columns.RowReader(CorpusSpec(), label_role="label", vocabulary=None, with_text=False)

    assert reader.names == ["doc_id", "label"]
    assert split({"doc_id": ["1"], "label": ["a"]}, label_role="label", with_text=False)["good"]["text"][0] == ""


@pytest.mark.parametrize("label_role", ["none", "label", "labels", "target"])
def test_a_batch_without_rows_has_the_columns_of_one_with_rows(label_role):
    kind = {"labels": pa.list_(pa.string()), "target": pa.float64()}.get(label_role, pa.string())
    some = {"doc_id": ["1"], "text": ["x"], "label": pa.nulls(1, kind)}
    none = {name: pa.array(column)[:0] for name, column in some.items()}

    empty = split(none, label_role=label_role, vocabulary=frozenset({"a"}))
    full = split(some, label_role=label_role, vocabulary=frozenset({"a"}))

    assert {name: frame.schema for name, frame in empty.items()} == {name: frame.schema for name, frame in full.items()}
    assert pl.concat([empty["rejected"], full["rejected"]]).equals(full["rejected"])


@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.sampled_from([b"a", INVALID]),
            st.none() | st.sampled_from([b"", b"x", INVALID]),
            st.none() | st.sampled_from([b"one", b"three", INVALID]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_every_row_is_good_or_rejected_and_never_both(rows):
    fields = dict(zip(("doc_id", "text", "label"), zip(*rows, strict=True), strict=False)) if rows else {}
    table = {name: pa.array(fields.get(name, ()), pa.binary()) for name in ("doc_id", "text", "label")}
    duplicates = [i + 100 for i, row in enumerate(rows) if row[3]]

    found = split(table, label_role="label", vocabulary=frozenset({"one"}), duplicates=duplicates)

    good, rejected = found["good"]["row_index"].to_list(), found["rejected"]["row_index"].to_list()
    assert sorted(good + rejected) == list(range(100, 100 + len(rows)))
    assert good == [
        i + 100
        for i, (doc_id, text, label, duplicate) in enumerate(rows)
        if doc_id == b"a" and text in (b"", b"x") and label == b"one" and not duplicate
    ]


GOOD_SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("label", pa.string())])


@pytest.mark.parametrize(
    ("column", "kind", "label_role", "message"),
    [
        (
            "doc_id",
            pa.float64(),
            "none",
            r"'doc_id' must hold strings or integers, got double \(--id-column",
        ),
        ("doc_id", pa.bool_(), "none", r"'doc_id' must hold strings or integers, got bool"),
        (
            "text",
            pa.int64(),
            "none",
            r"'text' must hold strings, or binary holding UTF-8, got int64 \(--text-column",
        ),
        ("text", pa.list_(pa.string()), "none", r"'text' must hold strings, .* got list<.*string>"),
        ("text", pa.null(), "none", r"'text' must hold strings, .* got null"),
        (
            "label",
            pa.float64(),
            "label",
            r"'label' must hold class names .* got double \(--label-column",
        ),
        ("label", pa.string(), "labels", r"'label' must hold lists of class names, got string"),
        ("label", pa.string(), "target", r"'label' must hold numbers, got string"),
        ("label", pa.list_(pa.float64()), "labels", r"'label' must hold lists of class names, got list"),
    ],
)
def test_a_wrong_type_is_refused_by_name(column, kind, label_role, message):
    schema = GOOD_SCHEMA.set(GOOD_SCHEMA.get_field_index(column), pa.field(column, kind))

    with pytest.raises(ConfigError, match=f"^/c/a.parquet: column {message}"):
        columns.check_columns(schema, CorpusSpec(), label_role=label_role, uri="/c/a.parquet")


def test_a_label_column_is_not_looked_at_without_a_role():
    schema = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("label", pa.duration("s"))])

    columns.check_columns(schema, CorpusSpec(), label_role="none", uri="/c/a.parquet")


def test_all_problems_of_a_file_are_told_at_once():
    schema = pa.schema([("doc_id", pa.float64()), ("body", pa.string()), ("label", pa.string()), ("label", pa.int8())])
    spec = CorpusSpec(split_column="part", split="train")

    with pytest.raises(ConfigError) as caught:
        columns.check_columns(schema, spec, label_role="label", uri="/c/a.parquet")

    has = "it has 'doc_id', 'body', 'label', 'label'"
    assert str(caught.value).split("\n") == [
        "/c/a.parquet: column 'doc_id' must hold strings or integers, got double (--id-column, or id_column of corpus)",
        f"/c/a.parquet: no column 'text'; {has} (choose with --text-column, or text_column of corpus)",
        f"/c/a.parquet: 2 columns named 'label'; {has} (choose with --label-column, or label_column of corpus)",
        f"/c/a.parquet: no column 'part'; {has} (choose with --split-column, or split_column of corpus)",
    ]


def test_a_wide_file_is_not_listed_whole():
    schema = pa.schema([(f"column_{i}", pa.string()) for i in range(30)])

    with pytest.raises(ConfigError, match="'column_9' and 20 more"):
        columns.field_of(schema, "text", option="--text-column", uri="/c/a.parquet")
