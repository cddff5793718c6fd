"""Changes: what a corpus has become since the run whose predictions are published, document by document.

A corpus is known by its files' inventories. Only those of files that changed, or whose duplicates did, are compared,
some millions of rows at a time, so that neither time nor memory depends on what stayed as it was.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

from belt_tasks import columns, inventory
from belt_tasks.inventory import Inventories, SourceRef
from belt_tasks.specs import CorpusSpec, Spec
from belt_tasks.threads import Threads

ROWS_AT_ONCE = 2_000_000

DOCUMENTS = pl.Schema(
    {"source": pl.Int32, "row_index": pl.Int64, "doc_id": pl.String, "content_fingerprint": pl.String}
)
"""A document: its file's position among the sources, its row there, its id and what its text is."""

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
    def _positions(self) -> dict[str, int]:
        return {source.source_uri: i for i, source in enumerate(self.sources)}

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

    def documents(self, uri: str, *, part: tuple[int, int] = (0, 1)) -> pl.DataFrame:
        """Documents of a file, none where there is no such file.

        Args:
            uri: the file.
            part: (i, n) gives the i-th of n parts of the documents, cut by their ids.

        Returns:
            Columns of DOCUMENTS.
        """
        i = self._positions.get(uri)
        if i is None:
            return DOCUMENTS.to_frame()
        names = [name for name in DOCUMENTS if name != "source"]
        frame = self.inventories.read(self.sources[i].inventory_key, names)
        wanted = (pl.col("doc_id").hash() % part[1] == part[0]) & pl.col("content_fingerprint").is_not_null()
        frame = self._without_duplicates(uri, frame.filter(wanted)).select(pl.lit(i, pl.Int32).alias("source"), *names)
        return frame if part[1] == 1 else _compact(frame)

    def rows(self, uri: str) -> pl.Series:
        """Positions in a file of its documents."""
        frame = self.inventories.read(self.by_uri[uri].inventory_key, ["row_index", "reason"])
        frame = self._without_duplicates(uri, frame.filter(pl.col("reason").is_null()))
        return frame["row_index"]

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

    def with_removed(self, more: pl.Series) -> "Changes":
        """The same, and more documents go."""
        removed = pl.concat([self.removed, more]).unique().sort()
        counts = self.counts.model_copy(update={"num_removed": self.counts.num_removed + len(more)})
        return replace(self, removed=removed, counts=counts)


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
    difference = _differ(DOCUMENTS.to_frame(), DOCUMENTS.to_frame())
    if before is None:
        num_new, to_rescore = now.num_documents, now.by_uri
    else:
        difference = _find_difference(before, now, touched(before, now), never_scored)
        num_new = len(difference.new)
    to_score = pl.concat([difference.new, difference.changed]).select("source", "row_index")
    parts = to_score.partition_by("source", as_dict=True)
    rows = {now.sources[int(source)].source_uri: part["row_index"] for (source,), part in parts.items()}
    with Threads(inventory.NUM_THREADS) as threads:
        rows |= dict(zip(to_rescore, threads.map(now.rows, to_rescore), strict=True))
    return Changes(
        counts=ChangeCounts(
            num_new=num_new,
            num_changed=len(difference.changed),
            num_unchanged=now.num_documents - num_new - len(difference.changed),
            num_removed=len(difference.gone),
        ),
        rows_to_score={uri: positions.sort().to_numpy() for uri, positions in rows.items() if len(positions)},
        removed=difference.gone["doc_id"].sort(),
    )


def _compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same without the rows that it was filtered from, which its strings would keep in memory."""
    return pl.DataFrame(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How documents differ from earlier ones; columns of DOCUMENTS."""

    new: pl.DataFrame
    changed: pl.DataFrame
    """As they are now."""
    gone: pl.DataFrame
    """As they were."""


def _differ(old: pl.DataFrame, new: pl.DataFrame) -> _Difference:
    both = new.join(old.select("doc_id", "content_fingerprint"), on="doc_id", how="left", suffix="_before")
    is_new = pl.col("content_fingerprint_before").is_null()
    is_changed = (pl.col("content_fingerprint_before") != pl.col("content_fingerprint")).fill_null(value=False)
    return _Difference(
        new=both.filter(is_new).drop("content_fingerprint_before"),
        changed=both.filter(is_changed).drop("content_fingerprint_before"),
        gone=old.join(new, on="doc_id", how="anti"),
    )


def _find_difference(before: CorpusState, now: CorpusState, files: set[str], never_scored: pl.Series) -> _Difference:
    """Compare file by file first, where most documents stayed in theirs, and then what is left across files.

    What is left is compared part by part where it is much, which reads the files once more for each part.
    """

    def of_file(uri: str, part: tuple[int, int]) -> _Difference:
        old = before.documents(uri, part=part)
        return _differ(old.filter(~pl.col("doc_id").is_in(never_scored.implode())), now.documents(uri, part=part))

    def of_part(part: tuple[int, int], most: float = math.inf) -> _Difference | None:
        """What differs; None where more documents than `most` are left over."""
        nothing = DOCUMENTS.to_frame()
        new, changed, gone, num_left = [nothing], [nothing], [nothing], 0
        with Threads(inventory.NUM_THREADS) as threads:
            for found in threads.map(lambda uri: of_file(uri, part), sorted(files)):
                num_left += max(len(found.new), len(found.gone))
                if num_left > most:
                    return None
                changed.append(found.changed)
                new.append(found.new)
                gone.append(found.gone)
        across = _differ(pl.concat(gone), pl.concat(new))
        found = replace(across, changed=pl.concat([*changed, across.changed]))
        return _Difference(new=_compact(found.new), changed=_compact(found.changed), gone=_compact(found.gone))

    num_moved = max(
        _num_documents(before, files - now.by_uri.keys()), _num_documents(now, files - before.by_uri.keys())
    )
    whole = of_part((0, 1), ROWS_AT_ONCE) if num_moved <= ROWS_AT_ONCE else None
    if whole is not None:
        return whole
    num_most = max(_num_documents(before, files), _num_documents(now, files))
    num_parts = -(-num_most // ROWS_AT_ONCE)
    parts = [found for i in range(num_parts) if (found := of_part((i, num_parts)))]
    return _Difference(
        new=pl.concat(part.new for part in parts),
        changed=pl.concat(part.changed for part in parts),
        gone=pl.concat(part.gone for part in parts),
    )


def _num_documents(state: CorpusState, files: Collection[str]) -> int:
    return sum(state.by_uri[uri].num_documents for uri in files if uri in state.by_uri)


def _key(state: CorpusState, uri: str) -> str | None:
    source = state.by_uri.get(uri)
    return None if source is None else source.inventory_key


def _duplicates(state: CorpusState, uri: str) -> list[int]:
    rows = state.duplicates_by_uri.get(uri)
    return [] if rows is None else rows["row_index"].to_list()
