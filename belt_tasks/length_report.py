"""Length report: does reading further pay? The head, head and tail, and all of the same documents, scored and compared.

    OUTPUT/runs/RUN_ID/evaluation/length.html    the page
    OUTPUT/runs/RUN_ID/evaluation/length.json    the numbers
    OUTPUT/runs/RUN_ID/evaluation/length.parquet ROWS of them: a number of a group of documents each, with its interval
    OUTPUT/length/runs/...                       what the ways scored: each is a run, found again by the next attempt or
                                                 report; none is published, so that no table shows any of it

The way in which the evaluation itself has read is not scored twice.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from belt_tasks import checkpoint as checkpoints
from belt_tasks import evaluation, length_contents, pages, publishing, storage
from belt_tasks.errors import ConfigError
from belt_tasks.evaluation import LabelledScores
from belt_tasks.length_comparison import (
    LengthReport,
    Reading,
    Scores,
    length_groups,
    length_rows,
    tokens_encoded,
)
from belt_tasks.planning import EvaluationPlan
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.resampling import METRICS
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, LengthSpec, ScoreSpec, Selection, Spec

ROWS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("min_tokens", pa.int64(), nullable=False),
        pa.field("max_tokens", pa.int64()),
        pa.field("num_documents", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("selection", pa.string(), nullable=False),
        pa.field("compared_with", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("lower", pa.float64()),
        pa.field("upper", pa.float64()),
        pa.field("num_tokens_encoded", pa.int64(), nullable=False),
    ]
)
"""Of a report's table: the fields of `LengthRow`."""


class Way(Spec):
    """A selection, and what scores it."""

    selection: Selection
    checkpoint_uri: str
    trained_with: ChunkSpec | None
    """Windows that the checkpoint was fine-tuned with; None where that is not known."""
    output_uri: str
    """Where its run is, if the evaluation's own will not do."""
    spec: ScoreSpec


def plan_ways(
    plan: EvaluationPlan,
    output_uri: str,
    spec: ScoreSpec,
    head_checkpoint_uri: str | None = None,
    head_tail_checkpoint_uri: str | None = None,
) -> tuple[Way, ...]:
    """Find out what the ways are, before anything is scored; the one that reads all is the last.

    Args:
        plan: of the evaluation, whose checkpoint scores every way that has none of its own.
        output_uri: of the evaluation.
        spec: of the evaluation; the ways differ in their selection alone.
        head_checkpoint_uri: fine-tuned to read the head alone; None where there is none.
        head_tail_checkpoint_uri: fine-tuned to read head and tail; None where there is none.

    Raises:
        ConfigError: a checkpoint is not there, or has another task or other labels.
    """
    card = checkpoints.read_card(plan.checkpoint_uri)
    chunks = spec.chunks or (ChunkSpec() if card is None else card.chunks)
    own: dict[Selection, str | None] = {"head": head_checkpoint_uri, "head_tail": head_tail_checkpoint_uri, "all": None}
    ways = []
    for selection, named in own.items():
        uri = plan.checkpoint_uri
        if named is not None:
            uri = checkpoints.resolve(named)
            _check_head(f"{selection}_checkpoint_uri", named, checkpoints.read_head(uri), plan)
        found = card if named is None else checkpoints.read_card(uri)
        ways.append(
            Way(
                selection=selection,
                checkpoint_uri=uri,
                trained_with=None if found is None else found.chunks,
                output_uri=storage.join(storage.absolute(output_uri), "length"),
                spec=spec.model_copy(
                    update={
                        "chunks": chunks.model_copy(update={"selection": selection}),
                        "evidence": "none",
                        "evidence_text": False,
                        "export": False,
                        "full": False,
                        "publish_every": None,
                        "removed": "delete",
                    }
                ),
            )
        )
    return tuple(ways)


def is_done_by(way: Way, run: RunRef) -> bool:
    """Whether a published run is that of a way: the same checkpoint and rules, and all documents scored by it alone."""
    manifest = publishing.read_run_manifest(run)
    spec, change = ScoreSpec.model_validate_json(manifest.run["spec"]), manifest.change
    return (
        change is not None
        and change.replaces_all
        and change.is_last
        and manifest.run["checkpoint_uri"] == storage.absolute(way.checkpoint_uri)
        and spec.chunks == way.spec.chunks
        and way.spec.pooling in (None, spec.pooling)
        and spec.threshold == way.spec.threshold
    )


def write_length_report(
    plan: EvaluationPlan,
    ways: Sequence[Way],
    runs: Sequence[RunRef],
    evaluated: RunRef,
    corpus: CorpusSpec,
    spec: LengthSpec = LengthSpec(),  # noqa: B008 - frozen
) -> LengthReport:
    """Compare the ways, and write the page and the numbers into the folder of the evaluation.

    Args:
        plan: of the evaluation.
        ways: of `plan_ways`.
        runs: in which they were scored.
        evaluated: the run of the evaluation, which may be one of them.
        corpus: columns, and the split whose rows were scored.
        spec: how they are compared.

    Raises:
        ConfigError: there is no document that all ways have scored, or they do not have the same tokenizer.
    """
    manifests = [publishing.read_run_manifest(run) for run in runs]
    found = [
        evaluation.labelled_scores(plan, corpus, manifest, is_published=run == evaluated)
        for run, manifest in zip(runs, manifests, strict=True)
    ]
    rows_DW, num_left_out = _common(found)
    num_tokens_D = _same_tokens(ways, found, rows_DW)
    scores = [
        Scores(
            selection=way.selection,
            scores_DL=each.scores_DL[rows_D],
            num_tokens_encoded_D=tokens_encoded(num_tokens_D, _chunks(way)),
        )
        for way, each, rows_D in zip(ways, found, rows_DW.T, strict=True)
    ]
    groups = length_groups(num_tokens_D, _chunks(ways[-1]).chunk_size, min_documents=spec.min_bucket_documents)
    folder = storage.join(evaluated.uri, "evaluation")
    report = LengthReport(
        run_id=evaluated.run_id,
        report_uri=storage.join(folder, "length.html"),
        numbers_uri=storage.join(folder, "length.json"),
        table_uri=storage.join(folder, "length.parquet"),
        head=plan.head,
        metric=METRICS[plan.head.task][0],
        num_documents=len(rows_DW),
        num_left_out=num_left_out,
        readings=tuple(
            _reading(way, manifest, each) for way, manifest, each in zip(ways, manifests, scores, strict=True)
        ),
        groups=tuple(groups),
        rows=tuple(
            length_rows(
                groups,
                scores,
                head=plan.head,
                target=found[-1].target[rows_DW[:, -1]],
                num_tokens_D=num_tokens_D,
                threshold=found[-1].threshold,
                spec=spec,
            )
        ),
        spec=spec,
    )
    contents = length_contents.of_length_report(report, publishing.read_run_manifest(evaluated).run)
    storage.write_bytes(report.report_uri, pages.render("length.html.j2", contents))
    storage.write_bytes(report.numbers_uri, (report.model_dump_json(indent=1) + "\n").encode())
    storage.write_parquet(
        report.table_uri, pa.Table.from_pylist([row.model_dump() for row in report.rows], schema=ROWS)
    )
    return report


def _check_head(name: str, uri: str, head: Head, plan: EvaluationPlan) -> None:
    if head != plan.head:
        wanted, got = (f"{each.task} of {', '.join(each.labels)}" for each in (plan.head, head))
        raise ConfigError(
            f"{name}: must have the task and the labels of {plan.checkpoint_uri} ({wanted}), got {got} of {uri}"
        )


def _chunks(way: Way) -> ChunkSpec:
    if way.spec.chunks is None:
        raise AssertionError("plan_ways() leaves nothing open")
    return way.spec.chunks


def _common(found: Sequence[LabelledScores]) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], int]:
    """Rows of the documents that all ways have scored with the same text, a column a way; and how many are left out.

    Raises:
        ConfigError: there is none.
    """
    frames = [
        pl.DataFrame({"doc_id": each.doc_ids, "text": each.fingerprints}).with_row_index(f"row_{number}")
        for number, each in enumerate(found)
    ]
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.join(frame, on=["doc_id", "text"], how="inner")
    num_ids = pl.concat([frame["doc_id"] for frame in frames]).n_unique()
    if len(joined) == 0:
        raise ConfigError(
            f"nothing to compare: of {num_ids:,} documents none was scored in every way with the same text"
        )
    rows = joined.sort("doc_id").select(pl.selectors.starts_with("row_")).to_numpy().astype(np.int64)
    return rows, num_ids - len(joined)


def _same_tokens(
    ways: Sequence[Way], found: Sequence[LabelledScores], rows_DW: np.ndarray[tuple[int, int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Content tokens of the documents.

    Raises:
        ConfigError: the ways do not agree on them.
    """
    tokens_DW = np.stack([each.num_tokens_D[rows_D] for each, rows_D in zip(found, rows_DW.T, strict=True)], axis=1)
    differs_D, differs_W = np.nonzero(tokens_DW != tokens_DW[:, -1:])
    if len(differs_D):
        row, way = int(differs_D[0]), int(differs_W[0])
        doc_id = found[-1].doc_ids[rows_DW[row, -1]]
        raise ConfigError(
            f"checkpoints must have the same tokenizer to be compared by length, got {tokens_DW[row, way]:,} tokens of "
            f"document {doc_id!r} by {ways[way].checkpoint_uri} and {tokens_DW[row, -1]:,} by {ways[-1].checkpoint_uri}"
        )
    return tokens_DW[:, -1]


def _reading(way: Way, manifest: Manifest, scores: Scores) -> Reading:
    run = manifest.run
    return Reading(
        selection=way.selection,
        checkpoint_uri=way.checkpoint_uri,
        checkpoint_digest=run["checkpoint_digest"],
        trained_with=way.trained_with,
        chunks=_chunks(way),
        run_id=run["run_id"],
        output_uri=run["output_uri"],
        device=run["device"],
        precision=run["precision"],
        num_tokens_encoded=int(scores.num_tokens_encoded_D.sum()),
        encode_s=run["encode_s"],
    )
