"""Refusal: a run that put too many rows aside publishes nothing, and shows them to whoever mends the corpus."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from belt_tasks import examples, pages, report_contents, storage
from belt_tasks.errors import RejectedError
from belt_tasks.publishing import RunRef
from belt_tasks.receipts import Counts, ShardReceipt, in_words, total


def check_rejected_share(run: RunRef, receipts: Sequence[ShardReceipt], *, num_rows: int, limit: float) -> None:
    """Refuse a run whose input is mostly broken.

    Args:
        run: where it writes.
        receipts: of all that it wrote so far, its plan included.
        num_rows: good and bad rows of the files that it read.
        limit: share of rejected rows above which it ends.

    Raises:
        RejectedError: there are more. The page that it names shows them.
    """
    words = _too_many(total(receipts), num_rows=num_rows, limit=limit)
    if words is None:
        return
    files = [file for receipt in receipts for file in receipt.files]
    contents = report_contents.of_quality(
        run=run.model_dump() | {"belt_version": version("belt"), "finished_at": datetime.now(UTC).isoformat()},
        rejected=examples.rejected_rows(run.output_uri, files),
        refusal=words,
    )
    storage.write_bytes(run.quality_uri, pages.render("rejected.html.j2", contents))
    raise RejectedError(_what_to_do(run, words), quality_uri=run.quality_uri)


def refusal(run: RunRef, counts: Counts, *, num_rows: int, limit: float) -> str | None:
    """What `check_rejected_share` says of a run, without a full stop; None where it is not refused.

    Args:
        run: where it writes.
        counts: of all that it wrote so far.
        num_rows: good and bad rows of the files that it read.
        limit: share of rejected rows above which it is refused.
    """
    words = _too_many(counts, num_rows=num_rows, limit=limit)
    return None if words is None else _what_to_do(run, words)


def _too_many(counts: Counts, *, num_rows: int, limit: float) -> str | None:
    if counts.num_rejected <= limit * num_rows:
        return None
    return (
        f"{counts.num_rejected:,} of {num_rows:,} rows ({counts.num_rejected / num_rows:.1%}) were rejected, more than "
        f"max_rejected_share allows ({limit:.1%}): {in_words(counts.rejected_by_reason)}; nothing was published"
    )


def _what_to_do(run: RunRef, words: str) -> str:
    return (
        f"{words}. They are shown in {run.quality_uri}, and all of them are in {storage.join(run.uri, 'rejected')}; "
        "mend the corpus, or allow more and run again; nothing is done twice"
    )
