"""Length contents: the words, numbers and pictures of a length report's page, as values for its template."""

from typing import Any

from belt_tasks import length_pictures, length_words, metrics
from belt_tasks.length_comparison import LengthGroup, LengthReport, LengthRow, Reading

MOST_LABELS = 50


def of_length_report(report: LengthReport, run: dict[str, Any]) -> dict[str, Any]:
    """What the page shows.

    Args:
        report: the numbers.
        run: of the evaluation.
    """
    first = length_words.verdict(report.row(report.group("all"), "all", "head"))
    tone = "good" if "gain" in first else "bad" if "loss" in first else ""
    everything = report.group("all")
    return {
        "run": run,
        "tone": tone,
        "answer": length_words.answer(report),
        "caveats": length_words.caveats(report),
        "metric": metrics.IN_WORDS[report.metric],
        "confidence": f"{100 * report.spec.confidence:g} %",
        "figures": _figures(report),
        "ways": [length_words.SELECTIONS[reading.selection] for reading in report.readings],
        "others": [length_words.SELECTIONS[reading.selection] for reading in report.readings[:-1]],
        "costs": [_cost(report, reading) for reading in report.readings],
        "measured": [
            _of_row(report.row(everything, reading.selection, metric=row.metric))
            for row in report.rows
            if row.kind == "all" and row.selection == report.readings[0].selection and row.compared_with is None
            for reading in report.readings
        ],
        "differences": [_of_row(row) for row in report.rows if row.kind == "all" and row.compared_with is not None],
        "lengths": [_of_group(report, group) for group in (*report.buckets, report.group("longer"))],
        "min_bucket_documents": report.spec.min_bucket_documents,
        "pictures": length_pictures.of_length_report(report),
        "readings": [_of_reading(reading) for reading in report.readings],
        "origin": _origin(report, run),
    }


def _figures(report: LengthReport) -> list[dict[str, str]]:
    longer, times = report.group("longer"), length_words.ratio(report, "head")
    size = report.reading("all").chunks.chunk_size
    return [
        {
            "name": "documents compared",
            "value": f"{report.num_documents:,}",
            "more": f"{report.num_left_out:,} left out" if report.num_left_out else "",
        },
        {
            "name": f"longer than {size:,} tokens",
            "value": f"{longer.num_documents:,}",
            "more": f"{longer.num_documents / report.num_documents:.1%}",
        },
        {
            "name": "cost of all, against the head",
            "value": "not known" if times is None else f"{times:.1f} times",
            "more": "in tokens encoded",
        },
    ]


def _cost(report: LengthReport, reading: Reading) -> dict[str, Any]:
    less = report.reading("head").num_tokens_encoded
    return {
        "way": length_words.SELECTIONS[reading.selection],
        "num_tokens_encoded": reading.num_tokens_encoded,
        "times": "" if less == 0 else f"{reading.num_tokens_encoded / less:.2f}",
        "seconds": reading.encode_s,
        "device": f"{reading.device}, {reading.precision}",
    }


def _of_row(row: LengthRow) -> dict[str, str]:
    told = length_words.number if row.compared_with is None else length_words.change
    return {
        "metric": metrics.IN_WORDS[row.metric],
        "way": length_words.SELECTIONS[row.compared_with or row.selection],
        "value": told(row.metric, row.value),
        "interval": length_words.interval(row),
        "verdict": "" if row.compared_with is None else length_words.verdict(row),
    }


def _of_group(report: LengthReport, group: LengthGroup) -> dict[str, Any]:
    ways = [reading.selection for reading in report.readings]
    return {
        "name": length_words.group_name(group),
        "num_documents": group.num_documents,
        "is_too_small": group.is_too_small,
        "is_sum": group.kind != "bucket",
        "values": [_of_row(report.row(group, way)) for way in ways],
        "differences": [_of_row(report.row(group, ways[-1], way)) for way in ways[:-1]],
    }


def _of_reading(reading: Reading) -> dict[str, str]:
    return {
        "way": length_words.SELECTIONS[reading.selection],
        "checkpoint_uri": reading.checkpoint_uri,
        "digest": reading.checkpoint_digest[:12],
        "trained_with": length_words.trained_with(reading),
        "is_at_home": "yes" if reading.is_at_home else "no: biased against it",
        "run": f"{reading.run_id} in {reading.output_uri}",
    }


def _origin(report: LengthReport, run: dict[str, Any]) -> list[tuple[str, str]]:
    chunks, labels = report.reading("all").chunks, report.head.labels
    more = f", and {len(labels) - MOST_LABELS:,} more" if len(labels) > MOST_LABELS else ""
    return [
        ("corpus uri", run["corpus_uri"]),
        ("task", report.head.task),
        ("labels", ", ".join(labels[:MOST_LABELS]) + more),
        ("chunk_size", f"{chunks.chunk_size:,}"),
        ("stride", f"{chunks.stride:,}"),
        ("maximal_text_length", "none" if chunks.maximal_text_length is None else f"{chunks.maximal_text_length:,}"),
        ("minimal_chunk_length", f"{chunks.minimal_chunk_length:,}"),
        ("resamples", f"{report.spec.num_resamples:,}, seed {report.spec.resampling_seed}"),
    ]
