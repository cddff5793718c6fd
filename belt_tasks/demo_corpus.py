"""The demo corpus: docstrings of libraries that belt depends on, so every machine has it without a download.

A document is one module: its docstrings (module, classes, functions, in source order), joined by blank lines.
Its label is the library. Source files are read and parsed; no library is imported.

Three things to know before trusting a number measured on it:

- It is easy on purpose. About half the documents name their own library, and nothing hides that.
- It is a sample. Tests, vendored copies of other projects and modules that this Python cannot parse are left
  out; a draw that depends on the module's name decides about the rest.
- Most documents are cut, always between two docstrings. Where the cut falls is drawn as well, seldom far into
  the module, so that lengths spread as in an archive: most documents within a page, few beyond ten.
"""

import ast
import hashlib
import importlib.util
import os
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
from pydantic import Field, model_validator

from belt_tasks.errors import ConfigError
from belt_tasks.specs import Fraction, Spec

DEMO_CORPUS_SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),  # dotted path of the module
        pa.field("text", pa.string(), nullable=False),  # "" for a module without docstrings
        pa.field("label", pa.string(), nullable=False),  # name of the library
        pa.field("split", pa.string(), nullable=False),  # train | test
    ]
)

# tests, and other projects' code inside a library: left in, one text would appear under two labels
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "testing", "_testing"} | {"_vendor", "vendor", "externals", "array_api_compat", "array_api_extra"}
)


class DemoCorpusSpec(Spec):
    """Which modules the demo corpus samples, and how long its documents get.

    A document has room for `minimal_words / u**2` words (separated by white space), u drawn uniformly from
    (0, 1]. It keeps its first docstring in any case, and those after it up to the first that does not fit.
    """

    libraries: tuple[str, ...] = Field(
        default=("matplotlib", "numpy", "polars", "prefect", "scipy", "sklearn", "torch", "transformers"),
        min_length=1,
    )
    """Top-level import names; each is one label."""

    documents_per_library: int = Field(default=70, ge=1)
    """Documents of each library, or all it has where it has fewer."""

    empty_per_library: int = Field(default=2, ge=0)
    """Of these, at most this many from modules without docstrings; more would have nothing to teach."""

    minimal_words: int = Field(default=50, ge=1)
    """Every document has room for this many words, half of them for 4 times that, a tenth for 100 times."""

    num_long: int = Field(default=2, ge=0)
    """Of the whole corpus, this many modules with the largest source files are cut at maximal_words only."""

    maximal_words: int = Field(default=12_000, ge=1)
    """No document has room for more words than this, whatever is drawn."""

    test_fraction: Fraction = 0.25
    """Share of documents in split "test"; drawn from doc_id alone, so that a document never changes sides."""

    seed: int = Field(default=0, ge=0)
    """Another seed samples other modules and cuts them elsewhere."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        repeated = sorted({name for name in self.libraries if self.libraries.count(name) > 1})
        if repeated:
            raise ValueError(f"libraries must be distinct, got twice or more: {_quoted(repeated)}")
        return self


@dataclass(frozen=True, kw_only=True)
class _Module:
    doc_id: str
    label: str
    source_bytes: int
    docstrings: list[str]


def build_demo_corpus(spec: DemoCorpusSpec) -> pa.Table:
    """Sample, read and cut the corpus; the same spec and installed versions give the same table.

    Returns:
        One row per document, sorted by doc_id; columns as in `DEMO_CORPUS_SCHEMA`.

    Raises:
        ConfigError: a library is not installed, or has no Python source.
    """
    paths = {library: _module_paths(library) for library in spec.libraries}
    missing = [library for library, found in paths.items() if not found]
    if missing:
        raise ConfigError(
            f"demo corpus: no Python source found for {len(missing)} of {len(paths)} libraries: "
            f"{_quoted(missing)}; install them or take them out of `libraries`"
        )
    modules = [module for library, found in paths.items() for module in _sample(library, found, spec)]
    modules.sort(key=lambda module: module.doc_id)
    by_size = sorted(modules, key=lambda module: (-module.source_bytes, module.doc_id))
    long_ids = {module.doc_id for module in by_size[: spec.num_long]}
    rows = [_row(module, spec, is_long=module.doc_id in long_ids) for module in modules]
    return pa.Table.from_pylist(rows, schema=DEMO_CORPUS_SCHEMA)


def _row(module: _Module, spec: DemoCorpusSpec, *, is_long: bool) -> dict[str, str]:
    room = spec.minimal_words / _draw("cut", spec.seed, module.doc_id) ** 2
    if is_long or room > spec.maximal_words:
        room = spec.maximal_words
    return {
        "doc_id": module.doc_id,
        "text": "\n\n".join(_cut(module.docstrings, room)),
        "label": module.label,
        "split": "test" if _draw("split", module.doc_id) <= spec.test_fraction else "train",
    }


def _module_paths(library: str) -> dict[str, Path]:
    """Source files of a top-level package by dotted module path; empty where there is no such package."""
    if not library.isidentifier():
        return {}  # to find a dotted name would import its parent
    found = importlib.util.find_spec(library)
    if found is None or found.submodule_search_locations is None:
        return {}
    paths = {}
    for root in found.submodule_search_locations:
        for folder, subfolders, files in os.walk(root):
            # in place, which is how os.walk learns where not to go
            subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in LEFT_OUT_FOLDERS]
            package = (library, *Path(folder).relative_to(root).parts)
            for file in files:
                stem = file.removesuffix(".py")
                if stem == file or not stem.isidentifier() or stem.startswith("test_") or stem == "conftest":
                    continue
                # x/__init__.py is met after x.py and replaces it, as it does on import
                paths[".".join(package if stem == "__init__" else (*package, stem))] = Path(folder, file)
    return paths


def _sample(library: str, paths: dict[str, Path], spec: DemoCorpusSpec) -> Iterator[_Module]:
    """Read modules in an order that depends on each doc_id and the seed alone, until there are enough."""
    num_left, num_empty_left = spec.documents_per_library, spec.empty_per_library
    for doc_id in sorted(paths, key=lambda doc_id: (_draw("sample", spec.seed, doc_id), doc_id)):
        if num_left == 0:
            return
        docstrings = read_docstrings(paths[doc_id])
        if docstrings is None or (not docstrings and num_empty_left == 0):
            continue
        num_left -= 1
        num_empty_left -= not docstrings
        source_bytes = paths[doc_id].stat().st_size
        yield _Module(doc_id=doc_id, label=library, source_bytes=source_bytes, docstrings=docstrings)


def read_docstrings(path: Path) -> list[str] | None:
    """Docstrings of a source file in source order, without running it; None where it cannot be parsed."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as source:
            warnings.simplefilter("ignore")  # "\d" in a docstring and the like; not ours to mend
            tree = ast.parse(source.read())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # a newer Python's syntax, a wrong encoding, a null byte, too deep a nesting
    docstrings = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                # an escape such as "\ud800" is legal in Python and illegal in UTF-8: it becomes "?"
                docstrings.append(docstring.encode(errors="replace").decode())
        children = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)  # expressions define nothing
        ]
        pending.extend(reversed(children))
    return docstrings


def _cut(docstrings: list[str], room: float) -> list[str]:
    """The first docstring, and those after it up to the first that would exceed `room` words."""
    num_words = 0
    for position, docstring in enumerate(docstrings):
        num_words += len(docstring.split())
        if position > 0 and num_words > room:
            return docstrings[:position]
    return docstrings


def _draw(*key: str | int) -> float:
    """A number in (0, 1] that is the same for the same key on every machine and in every run."""
    digest = hashlib.blake2b("\n".join(map(str, key)).encode(), digest_size=6).digest()
    return (int.from_bytes(digest) + 1) / 2**48  # 48 bits: exact in a float


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))
