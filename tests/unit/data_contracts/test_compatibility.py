"""A change of a contract that breaks those who rely on it is a change of its major version."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import new_class
from typing import Any

import dataframely as dy
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from open_data_contract_standard.model import OpenDataContractStandard

from data_contracts import TABLES, loader
from data_contracts.compatibility import Change, changes, faults
from tests.contracts import release

Document = dict[str, Any]


def document(name: str = "predictions") -> Document:
    return yaml.safe_load((release.IN_WORK / f"{name}.odcs.yaml").read_text(encoding="utf-8"))


def parsed(text: Document) -> OpenDataContractStandard:
    return OpenDataContractStandard.model_validate(text)


def column(text: Document, path: str) -> Document:
    """The column or field `a.b` of a contract, `a[].b` through a list."""
    properties = text["schema"][0]["properties"]
    for part in path.split("."):
        found = next(each for each in properties if each["name"] == part.removesuffix("[]"))
        found = found["items"] if part.endswith("[]") else found
        properties = found.get("properties")
    return found


def test_the_contracts_may_follow_the_released_ones() -> None:
    assert release.faults() == []


@pytest.mark.parametrize("name", TABLES)
def test_a_contract_does_not_differ_from_itself(name: str) -> None:
    assert changes(parsed(document(name)), parsed(document(name))) == []
    assert faults(parsed(document(name)), parsed(document(name))) == []


# --- one change at a time -------------------------------------------------------------------------


def put(path: str, **values: Any) -> Callable[[Document], Any]:
    return lambda text: column(text, path).update(values)


def drop(path: str, key: str) -> Callable[[Document], Any]:
    return lambda text: column(text, path).pop(key)


def removed(path: str) -> Callable[[Document], Any]:
    within = path.rpartition(".")[0]

    def change(text: Document) -> None:
        properties = column(text, within)["properties"] if within else text["schema"][0]["properties"]
        properties.remove(column(text, path))

    return change


def added(within: str, **values: Any) -> Callable[[Document], Any]:
    new = {"name": "new", "description": "New.", "logicalType": "string", "physicalType": "string"} | values

    def change(text: Document) -> None:
        (column(text, within)["properties"] if within else text["schema"][0]["properties"]).append(new)

    return change


def law(**values: Any) -> Callable[[Document], Any]:
    return lambda text: text["schema"][0]["quality"][0].update(values)


def keyed(text: Document) -> None:
    column(text, "run_id").update(primaryKey=True, primaryKeyPosition=2)


MAJOR: list[tuple[Callable[[Document], Any], str]] = [
    (removed("label"), "column label was removed"),
    (removed("top_chunk.start_char"), "field top_chunk.start_char was removed"),
    (removed("scores[].score"), "field scores[].score was removed"),
    (put("num_tokens", physicalType="int64"), "num_tokens is integer int64, it was integer int32"),
    (put("scored_at", physicalType="timestamp[ms, UTC]"), "scored_at is timestamp timestamp[ms, UTC], it was"),
    (put("logits[]", physicalType="double"), "logits[] is number double, it was number float"),
    (put("scores[].score", physicalType="float"), "scores[].score is number float, it was number double"),
    (drop("score", "required"), "score may be null, it was required"),
    (put("score", required=False), "score may be null, it was required"),
    (drop("labels[]", "required"), "labels[] may be null, it was required"),
    (put("top_chunk.stop_char", required=False), "top_chunk.stop_char may be null, it was required"),
    (put("label", required=True), "label is required, but may be null in published tables"),
    (added("", required=True), "column new is new and required, but published tables do not have it"),
    (added("top_chunk", required=True), "field top_chunk.new is new and required, but"),
    (put("num_chunks", logicalTypeOptions={"minimum": 0}), "minimum of num_chunks is 0, it was 1"),
    (drop("num_tokens", "logicalTypeOptions"), "minimum of num_tokens is none, it was 0"),
    (drop("scores", "logicalTypeOptions"), "minItems of scores is none, it was 1"),
    (put("checkpoint_digest", logicalTypeOptions={"pattern": "^.+$"}), "pattern of checkpoint_digest is '^.+$', it"),
    (drop("score", "customProperties"), "score is not finite, it was True"),
    (drop("logits[]", "customProperties"), "logits[] is not finite, it was True"),
    (drop("doc_id", "primaryKey"), "the key is (), it was (doc_id)"),
    (keyed, "the key is (doc_id, run_id), it was (doc_id)"),
    (law(implementation="TRUE"), "law scored_within_document was dropped: num_tokens_scored <= num_tokens"),
    (lambda text: text["schema"][0]["quality"].pop(0), "law scored_within_document was dropped"),
    (lambda text: text.update(id="belt.other"), "the id is belt.other, it was belt.predictions"),
    (lambda text: text["schema"][0].update(name="answers"), "the table is answers, it was predictions"),
]
MINOR: list[tuple[Callable[[Document], Any], str]] = [
    (added(""), "column new is new"),
    (added("top_chunk"), "field top_chunk.new is new"),
    (added("scores[]"), "field scores[].new is new"),
    (put("num_chunks", logicalTypeOptions={"minimum": 2}), "minimum of num_chunks is 2, it was 1"),
    (put("label", logicalTypeOptions={"minLength": 1}), "minLength of label is 1, it was none"),
    (put("label", enum=[{"value": "a", "description": "A."}]), "label has an enum now"),
    (
        lambda text: text["schema"][0]["quality"].append({"name": "new", "implementation": "TRUE"}),
        "law new is new: TRUE",
    ),
]
PATCH: list[tuple[Callable[[Document], Any], str]] = [
    (put("label", description="The best class."), "words or the order of columns changed"),
    (put("top_chunk.stop_char", description="The end."), "words or the order of columns changed"),
    (lambda text: text["description"].update(usage="Read it."), "words or the order of columns changed"),
    (lambda text: text["schema"][0]["properties"].reverse(), "words or the order of columns changed"),
    (law(name="within"), "words or the order of columns changed"),
]
ONE = [(*case, level) for level, cases in (("major", MAJOR), ("minor", MINOR), ("patch", PATCH)) for case in cases]
VERSIONS = {"major": "2.0.0", "minor": "1.1.0", "patch": "1.0.1"}


@pytest.mark.parametrize(("change", "expected", "level"), ONE, ids=[f"{case[2]}: {case[1]}" for case in ONE])
def test_one_change(change: Callable[[Document], Any], expected: str, level: str) -> None:
    before = document() | {"version": "1.0.0"}
    after = deepcopy(before)
    change(after)

    found = changes(parsed(before), parsed(after))

    assert [each.level for each in found][:1] == [level]
    assert found[0].message.startswith(expected)
    told = faults(parsed(before), parsed(after))
    assert told[0].startswith(f"predictions: {expected}") or level != "major"
    assert told[0].endswith(f"needs a new {level} version, 1.0.0 -> {VERSIONS[level]} or higher, got 1.0.0")
    for raised, version in VERSIONS.items():
        is_enough = list(VERSIONS).index(raised) <= list(VERSIONS).index(level)
        assert (faults(parsed(before), parsed(after | {"version": version})) == []) == is_enough, version


def test_an_enum() -> None:
    more = document("rejected")
    less = deepcopy(more)
    del column(less, "reason")["enum"][3]
    none = deepcopy(more)
    del column(none, "reason")["enum"]

    assert changes(parsed(less), parsed(more)) == [Change("major", "reason may be 'text_null'")]
    assert changes(parsed(more), parsed(less)) == [Change("minor", "reason is never 'text_null' any more")]
    assert changes(parsed(more), parsed(none)) == [Change("major", "reason may have any value, it had an enum")]


def test_all_changes_are_told_at_once_and_a_major_version_admits_to_all() -> None:
    before = document() | {"version": "1.2.3"}
    after = deepcopy(before)
    for change in (removed("label"), added(""), drop("score", "required")):
        change(after)

    told = faults(parsed(before), parsed(after | {"version": "1.3.0"}))

    needs = "needs a new major version, 1.2.3 -> 2.0.0 or higher, got 1.3.0"
    assert told == [
        f"predictions: column label was removed: {needs}",
        f"predictions: score may be null, it was required: {needs}",
    ]
    assert faults(parsed(before), parsed(after | {"version": "2.0.0"})) == []


@pytest.mark.parametrize("version", ["1.2.2", "0.9.9"])
def test_a_version_never_falls(version: str) -> None:
    before, after = document() | {"version": "1.2.3"}, document() | {"version": version}

    assert faults(parsed(before), parsed(after)) == [f"predictions: version {version} is below the released 1.2.3"]


@pytest.mark.parametrize("version", ["1", "1.0", "1.0.0-rc1", "v1.0.0"])
def test_a_version_has_three_numbers(version: str) -> None:
    with pytest.raises(ValueError, match=r"^predictions: version must be MAJOR\.MINOR\.PATCH, got "):
        faults(parsed(document()), parsed(document() | {"version": version}))


# --- the law --------------------------------------------------------------------------------------

NUMBERS = [None, -math.inf, -2.0, -1.0, 0.0, 1.0, 2.0, math.inf, math.nan]
STRINGS = [None, "", "a", "b", "aa", "c"]
CHOICES = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, unique=True)


@st.composite
def number_columns(draw: st.DrawFn) -> Document:
    options = draw(st.sampled_from([{}, {"minimum": -1}, {"minimum": 0}, {"minimum": 1}]))
    finite = draw(
        st.sampled_from([[], [{"property": "finite", "value": True}], [{"property": "finite", "value": False}]])
    )
    required = draw(st.booleans())
    laws = {"logicalTypeOptions": options, "customProperties": finite, "required": required}
    return {"name": "c", "logicalType": "number", "physicalType": "double"} | laws


@st.composite
def string_columns(draw: st.DrawFn) -> Document:
    options = draw(
        st.fixed_dictionaries({}, optional={"minLength": st.integers(0, 2), "pattern": st.sampled_from("abc")})
    )
    chosen = draw(st.none() | CHOICES)
    laws = {"logicalTypeOptions": options, "required": draw(st.booleans())}
    if chosen is not None:
        laws["enum"] = [{"value": value, "description": "A value."} for value in chosen]
    return {"name": "c", "logicalType": "string", "physicalType": "string"} | laws


def contract_of(columns: list[Document]) -> OpenDataContractStandard:
    whole = {"apiVersion": "v3.2.0", "kind": "DataContract", "id": "t", "name": "t", "version": "1.0.0"}
    return parsed(whole | {"schema": [{"name": "t", "properties": columns}]})


def lawful(contract: OpenDataContractStandard, values: list[Any], dtype: type[pl.DataType]) -> set[str]:
    """Those values that the contract's one column may have, as texts: NaN does not equal itself."""
    (column,) = (contract.schema_ or [])[0].properties or []
    schema = new_class("T", (dy.Schema,), exec_body=lambda body: body.update(c=loader._column(column, keys=False)))
    good, _ = schema.filter(pl.DataFrame({"c": values}, schema={"c": dtype}))
    return {str(value) for value in good["c"].to_list()}


@pytest.mark.parametrize("kind", ["number", "string"])
@given(data=st.data())
def test_no_value_surprises_a_reader_but_in_a_new_major_version(kind: str, data: st.DataObject) -> None:
    """What rows may hold after a change that is not major, they might hold before."""
    columns = number_columns() if kind == "number" else string_columns()
    values, dtype = (NUMBERS, pl.Float64) if kind == "number" else (STRINGS, pl.String)
    before, after = contract_of([data.draw(columns)]), contract_of([data.draw(columns)])
    surprises = lawful(after, values, dtype) - lawful(before, values, dtype)

    is_major = any(change.level == "major" for change in changes(before, after))

    assert is_major or not surprises, surprises


@given(
    columns=st.lists(st.sampled_from("abcdef"), unique=True), others=st.lists(st.sampled_from("abcdef"), unique=True)
)
def test_columns_come_and_go(columns: list[str], others: list[str]) -> None:
    def of(names: list[str]) -> OpenDataContractStandard:
        return contract_of([{"name": name, "logicalType": "string", "physicalType": "string"} for name in names])

    found = changes(of(columns), of(others))

    assert {each.message for each in found if each.level == "major"} == {
        f"column {name} was removed" for name in set(columns) - set(others)
    }
    assert {each.message for each in found if each.level == "minor"} == {
        f"column {name} is new" for name in set(others) - set(columns)
    }


# --- the released contracts -----------------------------------------------------------------------


@pytest.fixture
def in_work(tmp_path: Path) -> Path:
    """A copy of the contracts, released as they are."""
    for path in release.IN_WORK.glob("*.odcs.yaml"):
        shutil.copy(path, tmp_path)
    release.release(tmp_path)
    return tmp_path


def rewrite(path: Path, change: Callable[[Document], Any]) -> None:
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(text)
    path.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")


def test_a_breaking_change_is_released_with_a_major_version_only(in_work: Path) -> None:
    path = in_work / "predictions.odcs.yaml"
    rewrite(path, removed("label"))

    assert [fault.partition(": needs")[0] for fault in release.faults(in_work)] == [
        "predictions: column label was removed"
    ]
    with pytest.raises(ValueError, match="column label was removed: needs a new major version"):
        release.release(in_work)
    assert "name: label\n" in (in_work / "released" / path.name).read_text()

    rewrite(path, lambda text: text.update(version="9.0.0"))
    release.release(in_work)
    assert (in_work / "released" / path.name).read_text() == path.read_text()
    assert release.faults(in_work) == []


def test_a_contract_does_not_vanish_and_a_new_one_may_come(in_work: Path) -> None:
    (in_work / "chunks.odcs.yaml").rename(in_work / "pieces.odcs.yaml")

    assert release.faults(in_work) == [
        "chunks: the contract was removed; if so it shall be, remove it from the released ones too"
    ]
    (in_work / "released" / "chunks.odcs.yaml").unlink()
    assert release.faults(in_work) == []


def test_the_command_releases_what_may_be_released(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("data_contracts", "tests/contracts"):
        shutil.copytree(release.IN_WORK.parent / folder, checkout / folder)
    path = checkout / "data_contracts" / "predictions.odcs.yaml"

    def run() -> tuple[int, str]:
        command = [sys.executable, "-m", "tests.contracts.release"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, check=False, text=True)
        return done.returncode, done.stderr

    rewrite(path, lambda text: text.update(version="7.0.0"))
    assert run() == (0, "")
    assert (checkout / "data_contracts" / "released" / path.name).read_text() == path.read_text()
    rewrite(path, removed("label"))
    code, told = run()
    assert (code, told.partition(":")[2].strip()[:24]) == (1, "column label was removed")
