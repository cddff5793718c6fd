import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from belt_tasks.demo_corpus import DEMO_CORPUS_SCHEMA, DemoCorpusSpec, build_demo_corpus, read_docstrings
from belt_tasks.errors import ConfigError

EXPLODE = "raise RuntimeError('a demo library was imported')\n"

WriteLibrary = Callable[..., str]


@pytest.fixture
def write_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteLibrary:
    """Writes a package of the given files, {relative path: source}, that cannot be imported, only read."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, files: dict[str, str | bytes]) -> str:
        for path, source in {"__init__.py": EXPLODE, **files}.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source if isinstance(source, bytes) else source.encode())
        return name

    return write


def spec_for(*libraries: str, **changes: object) -> DemoCorpusSpec:
    return DemoCorpusSpec.model_validate({"libraries": libraries, **changes})


def texts(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def splits(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["doc_id"].to_pylist(), table["split"].to_pylist(), strict=True))


def many_modules(numbers: range) -> dict[str, str | bytes]:
    return {f"m{number}.py": f'"""Module number {number}."""\n' for number in numbers}


def test_docstrings_come_in_source_order_from_every_depth(tmp_path: Path) -> None:
    file = tmp_path / "nested.py"
    file.write_text(
        '''"""1 module"""
x = "not a docstring"
class Outer:
    """2 outer"""
    async def fetch(self):
        """3 async method"""
        def local():
            """4 local function"""
    class Inner:
        """5 inner class"""
        def method(self):
            """6 method
                indented

            last line
            """
if x:
    def either(): "7 under if"
else:
    def other(): "8 under else"
try:
    def attempt(): "9 under try"
except ImportError:
    def attempt(): "10 under except"
match x:
    case _:
        async def matched(): "11 under case"
def undocumented(): return 1
def blank(): """   """
async def last():
    """12 async function"""
'''
    )

    docstrings = read_docstrings(file)

    assert docstrings is not None
    assert [int(docstring.split()[0]) for docstring in docstrings] == list(range(1, 13))
    assert docstrings[5] == "6 method\n    indented\n\nlast line"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"x = 1\n", [], id="no docstring"),
        pytest.param('# coding: latin-1\n"""na\xefve"""\n'.encode("latin-1"), ["na\xefve"], id="latin-1 cookie"),
        pytest.param(b'\xef\xbb\xbf"""after a mark"""', ["after a mark"], id="byte order mark"),
        pytest.param(rb'"""a \ud800 b \udfff"""', ["a ? b ?"], id="lone surrogates"),
        pytest.param(rb'"""a \U0001f600"""', ["a \U0001f600"], id="beyond the basic plane"),
        pytest.param(rb'"""matches \d+ and \."""', [r"matches \d+ and \."], id="invalid escape"),
        pytest.param(b'"""one\r\ntwo"""\r\n', ["one\ntwo"], id="windows line ends"),
        pytest.param(b'f"""{1}"""', [], id="f-string"),
        pytest.param(b'b"""bytes"""', [], id="bytes"),
    ],
)
def test_odd_sources_are_read(tmp_path: Path, source: bytes, expected: list[str]) -> None:
    file = tmp_path / "odd.py"
    file.write_bytes(source)

    assert read_docstrings(file) == expected


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(b'"""fine"""\ndef broken(:\n', id="syntax error"),
        pytest.param('"""caf\xe9"""'.encode("latin-1"), id="not the declared encoding"),
        pytest.param(b'"""fine"""\n\n\nx = "caf\xe9"', id="not the declared encoding, further down"),
        pytest.param(b"# coding: no-such-codec\n", id="unknown encoding"),
        pytest.param(b'"""a\0b"""', id="null byte"),
        pytest.param(b"x = " + b"(" * 5000 + b")" * 5000, id="too deeply nested"),
        pytest.param(b"x = " + b"-" * 100_000 + b"1", id="far too deeply nested"),
    ],
)
def test_sources_that_cannot_be_parsed_have_no_docstrings(tmp_path: Path, source: bytes) -> None:
    file = tmp_path / "odd.py"
    file.write_bytes(source)

    assert read_docstrings(file) is None


def test_corpus_is_read_without_import(write_library: WriteLibrary) -> None:
    name = write_library(
        "beltdemo_odd",
        {
            "__init__.py": f'"""The package."""\n{EXPLODE}',
            "alpha.py": f'{EXPLODE}\ndef f():\n    """First."""\n\nclass C:\n    """Second."""\n',
            "deep/er/module.py": '"""Below."""\n',
            "silent.py": EXPLODE,
            "surrogate.py": rb'"""A \udc80 escape."""',
            "broken.py": '"""Fine."""\ndef broken(:\n',
        },
    )

    table = build_demo_corpus(spec_for(name))

    assert table.schema == DEMO_CORPUS_SCHEMA
    assert texts(table) == {
        "beltdemo_odd": "The package.",
        "beltdemo_odd.alpha": "First.\n\nSecond.",
        "beltdemo_odd.deep.er.module": "Below.",
        "beltdemo_odd.silent": "",
        "beltdemo_odd.surrogate": "A ? escape.",
    }
    assert table["doc_id"].to_pylist() == sorted(table["doc_id"].to_pylist())
    assert set(table["label"].to_pylist()) == {name}
    assert name not in sys.modules


def test_tests_and_vendored_code_are_left_out(write_library: WriteLibrary) -> None:
    left_out = [
        "tests/a.py",
        "x/testing/b.py",
        "_vendor/c.py",
        "x/test_d.py",
        "conftest.py",
        "not-a-module.py",
        "e.txt",
    ]
    name = write_library("beltdemo_pruned", dict.fromkeys(["kept.py", "contests/f.py", *left_out], '"""Text."""'))

    table = build_demo_corpus(spec_for(name, empty_per_library=0))

    assert table["doc_id"].to_pylist() == ["beltdemo_pruned.contests.f", "beltdemo_pruned.kept"]


def test_a_package_hides_the_module_of_its_name(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_twice", {"x.py": '"""Module."""', "x/__init__.py": '"""Package."""'})

    table = build_demo_corpus(spec_for(name, empty_per_library=0))

    assert texts(table) == {"beltdemo_twice.x": "Package."}


def test_the_same_spec_gives_the_same_table_and_another_seed_another(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_many", many_modules(range(100)))

    table = build_demo_corpus(spec_for(name, documents_per_library=30))

    assert table.num_rows == 30
    assert table.equals(build_demo_corpus(spec_for(name, documents_per_library=30)))
    assert not table.equals(build_demo_corpus(spec_for(name, documents_per_library=30, seed=1)))


def test_a_smaller_corpus_is_part_of_a_larger_one(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_many", many_modules(range(100)))

    small = build_demo_corpus(spec_for(name, documents_per_library=20))
    large = build_demo_corpus(spec_for(name, documents_per_library=60))

    assert small.num_rows == 20
    assert texts(small).items() <= texts(large).items()


def test_a_document_keeps_its_split_whatever_else_changes(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_grows", many_modules(range(40)))
    before = splits(build_demo_corpus(spec_for(name)))
    write_library(name, many_modules(range(40, 65)))
    other = write_library("beltdemo_other", many_modules(range(10)))

    after = splits(build_demo_corpus(spec_for(other, name, seed=7)))

    assert len(after) == 40 + 25 + 10 + 2
    assert before.items() <= after.items()
    assert set(before.values()) == {"train", "test"}


def test_test_fraction_only_moves_documents_one_way(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_split", many_modules(range(300)))

    tests = [
        {doc_id for doc_id, split in splits(build_demo_corpus(spec)).items() if split == "test"}
        for spec in (spec_for(name, documents_per_library=300, test_fraction=fraction) for fraction in (0.0, 0.25, 0.5))
    ]

    assert tests[0] == set()
    assert tests[1] < tests[2]
    assert len(tests[1]) == pytest.approx(75, abs=25)


def test_at_most_so_many_documents_are_empty(write_library: WriteLibrary) -> None:
    silent: dict[str, str | bytes] = {f"s{number}.py": "x = 1\n" for number in range(50)}
    name = write_library("beltdemo_silent", {**silent, **many_modules(range(20))})

    table = build_demo_corpus(spec_for(name, documents_per_library=15, empty_per_library=3))

    assert table.num_rows == 15
    assert table["text"].to_pylist().count("") == 3


def test_documents_are_cut_between_docstrings(write_library: WriteLibrary) -> None:
    functions = "".join(f'def f{number}():\n    """{number} {"word " * 9}"""\n' for number in range(200))
    name = write_library("beltdemo_cut", {f"m{number}.py": functions for number in range(60)})

    table = build_demo_corpus(spec_for(name, minimal_words=40, maximal_words=500, num_long=0))
    lengths = sorted(len(text.split()) for text in table["text"].to_pylist() if text)

    assert all(length % 10 == 0 for length in lengths)
    assert lengths[0] >= 40
    assert lengths[-1] == 500
    assert lengths[30] == pytest.approx(160, abs=60)
    assert "\n\n1 word" in table["text"][1].as_py()


def test_a_first_docstring_is_never_cut(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_first", {"a.py": f'"""{"word " * 100}"""\ndef f():\n    """Next."""\n'})

    table = build_demo_corpus(spec_for(name, minimal_words=1, maximal_words=10, num_long=0))

    assert texts(table)["beltdemo_first.a"].split() == ["word"] * 100


def test_the_largest_sources_are_cut_at_maximal_words_only(write_library: WriteLibrary) -> None:
    functions = "".join(f'def f{number}():\n    """{"word " * 10}"""\n' for number in range(50))
    files: dict[str, str | bytes] = {f"m{number}.py": functions for number in range(20)}
    name = write_library(
        "beltdemo_long", {**files, "largest.py": functions + "# grown\n", "second.py": functions + "#\n"}
    )

    def lengths(**changes: object) -> dict[str, int]:
        table = build_demo_corpus(spec_for(name, minimal_words=1, **changes))
        return {doc_id: len(text.split()) for doc_id, text in texts(table).items()}

    without = lengths(num_long=0)
    changed = {doc_id: words for doc_id, words in lengths(num_long=2).items() if words != without[doc_id]}
    assert changed == {"beltdemo_long.largest": 500, "beltdemo_long.second": 500}
    assert lengths(num_long=1, maximal_words=300)["beltdemo_long.largest"] == 300


def test_missing_libraries_are_named_at_once(write_library: WriteLibrary) -> None:
    name = write_library("beltdemo_here", {})

    with pytest.raises(
        ConfigError,
        match=r"found for 4 of 5 libraries: 'beltdemo_gone', 'beltdemo_here\.sub', 'sys', '';",
    ):
        build_demo_corpus(spec_for("beltdemo_gone", name, "beltdemo_here.sub", "sys", ""))
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"libraries": ("numpy", "torch", "numpy")}, "distinct, got twice or more: 'numpy'"),
        ({"libraries": ()}, "at least 1 item"),
        ({"documents_per_library": 0}, "greater than or equal to 1"),
        ({"test_fraction": 1.0}, "less than 1"),
        ({"documents": 3}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DemoCorpusSpec.model_validate(values)


def test_the_default_corpus_has_documents_of_every_length() -> None:
    spec = DemoCorpusSpec()

    table = build_demo_corpus(spec)
    num_words = [len(text.split()) for text in table["text"].to_pylist()]

    assert table.num_rows == len(spec.libraries) * spec.documents_per_library
    assert pc.count_distinct(table["doc_id"]).as_py() == table.num_rows
    assert {row["values"]: row["counts"] for row in table["label"].value_counts().to_pylist()} == dict.fromkeys(
        spec.libraries, spec.documents_per_library
    )
    assert splits(table).keys() == texts(table).keys()
    assert table["split"].to_pylist().count("test") == pytest.approx(0.25 * table.num_rows, rel=0.25)
    assert 1 <= num_words.count(0) <= len(spec.libraries) * spec.empty_per_library
    assert sum(length < 100 for length in num_words) > 0.3 * table.num_rows
    assert 0.15 * table.num_rows < sum(length > 300 for length in num_words) < 0.4 * table.num_rows
    assert max(num_words) > 10_000
    assert 130_000 < sum(num_words) < 250_000
