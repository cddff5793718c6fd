"""Changes: what a corpus has become since the run whose predictions are published, document by document.

A corpus is known by its files' inventories. Only those of files that changed, or whose duplicates did, are compared,
some millions of rows at a time, so that neither time nor memory depends on what stayed as it was.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

from belt_tasks import columns, inventory
from belt_tasks.inventory import Inventories, SourceRef
from belt_tasks.specs import CorpusSpec, Spec

ROWS_AT_ONCE = 2_000_000

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CorpusState:
    """A corpus at one moment."""

    sources: tuple[SourceRef, ...]
    """In the order in which belt reads them."""
    duplicates: pl.DataFrame
    """source_uri, row_index, doc_id, reason and detail of rows whose doc_id came before."""
    inventories: Inventories
    spec: CorpusSpec

    @cached_property
    def by_uri(self) -> dict[str, SourceRef]:
        """The files."""
        return {source.source_uri: source for source in self.sources}

    @cached_property
    def duplicates_by_uri(self) -> dict[str, pl.DataFrame]:
        """The duplicates of each file that has some."""
        parts = self.duplicates.partition_by("source_uri", as_dict=True)
        return {str(uri): rows for (uri,), rows in parts.items()}

    @cached_property
    def num_documents(self) -> int:
        """Documents fit for use, each once."""
        repeated = len(self.duplicates) - self.duplicates["reason"].count()
        return sum(source.num_documents for source in self.sources) - repeated

    def documents(self, uris: Collection[str], *, part: tuple[int, int] = (0, 1)) -> pl.DataFrame:
        """Documents of some files.

        Args:
            uris: the files.
            part: (i, n) gives the i-th of n parts of the documents, cut by their ids.

        Returns:
            source: int32 (position among the sources), row_index, doc_id, content_fingerprint.
        """
        names = ["row_index", "doc_id", "content_fingerprint"]
        chosen = {i: source for i, source in enumerate(self.sources) if source.source_uri in uris}
        wanted = (pl.col("doc_id").hash() % part[1] == part[0]) & pl.col("content_fingerprint").is_not_null()
        frames = inventory.read_all(chosen.values(), self.inventories, names, lambda frame: frame.filter(wanted))
        nothing = pl.DataFrame(schema={name: pl.Int64 if name == "row_index" else pl.String for name in names})
        whole = [
            self._without_duplicates(self.sources[i].source_uri, frame).with_columns(source=pl.lit(i, pl.Int32))
            for i, frame in zip(chosen, frames, strict=True)
        ]
        return pl.concat(whole) if whole else nothing.with_columns(source=pl.lit(0, pl.Int32))

    def rows(self, uri: str) -> Int64:
        """Positions in a file of its documents, ascending."""
        frame = self.inventories.read(self.by_uri[uri].inventory_key, ["row_index", "reason"])
        frame = self._without_duplicates(uri, frame.filter(pl.col("reason").is_null()))
        return frame["row_index"].sort().to_numpy()

    def rejected(self, uri: str) -> pl.DataFrame:
        """The rows of a file that are put aside: row_index, doc_id, reason, detail."""
        names = ["row_index", "doc_id", "reason", "detail"]
        frame = self.inventories.read(self.by_uri[uri].inventory_key, names).filter(pl.col("reason").is_not_null())
        duplicates = self.duplicates_by_uri.get(uri)
        if duplicates is None:
            return frame
        earlier = columns.in_words("doc_id_duplicate", self.spec)
        worded = duplicates.select(
            "row_index",
            "doc_id",
            pl.lit("doc_id_duplicate").alias("reason"),
            pl.concat_str(pl.lit(earlier), pl.col("detail"), separator="; ", ignore_nulls=True).alias("detail"),
        )
        return pl.concat([frame.join(worded, on="row_index", how="anti"), worded]).sort("row_index")

    def _without_duplicates(self, uri: str, frame: pl.DataFrame) -> pl.DataFrame:
        duplicates = self.duplicates_by_uri.get(uri)
        return frame if duplicates is None else frame.join(duplicates.select("row_index"), on="row_index", how="anti")


class ChangeCounts(Spec):
    """How many documents a run finds in which state."""

    num_new: int
    num_changed: int
    num_unchanged: int
    num_removed: int


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a run has to do."""

    counts: ChangeCounts
    rows_to_score: Mapping[str, Int64]
    """By file, positions of its rows, ascending."""
    removed: pl.Series
    """Ids of documents that are gone, ascending; empty where everything else is scored anew anyway."""


def touched(before: CorpusState | None, now: CorpusState) -> set[str]:
    """Files whose documents may differ: those that came, went or changed, and those whose duplicates did."""
    if before is None:
        return set(now.by_uri)
    return {
        uri
        for uri in before.by_uri.keys() | now.by_uri.keys()
        if _key(before, uri) != _key(now, uri) or _duplicates(before, uri) != _duplicates(now, uri)
    }


def compare(
    before: CorpusState | None,
    now: CorpusState,
    *,
    to_rescore: Collection[str],
    never_scored: pl.Series,
) -> Changes:
    """Compare a corpus with what was published.

    Args:
        before: what was published; None where nothing was.
        now: the corpus as it is.
        to_rescore: files all of whose documents are scored again, changed or not.
        never_scored: ids of documents of `before` that have no prediction.

    Returns:
        What to do so that the published table equals a scoring of the whole corpus.
    """
    files = touched(before, now)
    num_new = num_changed = 0
    rows: dict[str, list[Int64]] = {}
    removed = [pl.Series([], dtype=pl.String)]
    if before is None:
        num_new, to_rescore = now.num_documents, now.by_uri
    for old, new in _parts(before, now, files, never_scored):
        both = new.join(old, on="doc_id", how="left", suffix="_before")
        is_new = pl.col("content_fingerprint_before").is_null()
        is_changed = (pl.col("content_fingerprint_before") != pl.col("content_fingerprint")).fill_null(value=False)
        num_new += both.select(is_new.sum()).item()
        num_changed += both.select(is_changed.sum()).item()
        removed.append(old.join(new, on="doc_id", how="anti")["doc_id"])
        for (source,), part in both.filter(is_new | is_changed).partition_by("source", as_dict=True).items():
            uri = now.sources[int(source)].source_uri
            if uri not in to_rescore:
                rows.setdefault(uri, []).append(part["row_index"].to_numpy())
    with ThreadPoolExecutor(inventory.NUM_THREADS) as threads:
        found = zip(to_rescore, threads.map(now.rows, to_rescore), strict=True)
        rows |= {uri: [positions] for uri, positions in found}
    gone = pl.concat(removed).sort()
    return Changes(
        counts=ChangeCounts(
            num_new=num_new,
            num_changed=num_changed,
            num_unchanged=now.num_documents - num_new - num_changed,
            num_removed=len(gone),
        ),
        rows_to_score={uri: np.sort(np.concatenate(parts)) for uri, parts in rows.items() if sum(map(len, parts))},
        removed=gone,
    )


def _parts(
    before: CorpusState | None, now: CorpusState, files: Collection[str], never_scored: pl.Series
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The documents of the files, those with a prediction before and all now; those of one id always together."""
    if before is None:
        return
    num_rows = max(
        sum(source.num_rows for uri, source in state.by_uri.items() if uri in files) for state in (before, now)
    )
    num_parts = max(1, -(-num_rows // ROWS_AT_ONCE))
    for i in range(num_parts):
        old = before.documents(files, part=(i, num_parts)).select("doc_id", "content_fingerprint")
        new = now.documents(files, part=(i, num_parts))
        yield old.filter(~pl.col("doc_id").is_in(never_scored.implode())), new


def _key(state: CorpusState, uri: str) -> str | None:
    source = state.by_uri.get(uri)
    return None if source is None else source.inventory_key


def _duplicates(state: CorpusState, uri: str) -> list[int]:
    rows = state.duplicates_by_uri.get(uri)
    return [] if rows is None else rows["row_index"].to_list()
