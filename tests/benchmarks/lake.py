"""What the lake costs: a whole run beside the model's work alone, and the publishing of many predictions.

Both write to a real S3 server on this machine. The two ways of scoring take turns, so that what else the machine does
meets both; predictions that are published and reported were not scored, only made up.

    python -m tests.benchmarks.lake [--documents 600] [--rounds 5] [--predictions 1000000]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

import data_contracts
from belt_tasks import checkpoint, score_tables, sorted_files, storage
from belt_tasks.demo import demo_encoder
from belt_tasks.publishing import Manifest, RunRef, TableChange, complete
from belt_tasks.receipts import Counts, FileReceipt, ShardReceipt
from belt_tasks.score_corpus import score_corpus
from belt_tasks.scoring import score_texts
from belt_tasks.specs import ScoreSpec
from tests.benchmarks.corpora import Corpus, demo_cuts, drawn, save_random_head
from tests.s3_server import BUCKET, s3_server

SHARD_ROWS = 50_000
LABELS = ("a", "b")
SPEC = ScoreSpec(device="cpu")


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--predictions", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "s3") as server, environment(server):
        work = Path(folder)
        save_random_head(str(demo_encoder()), work / "model")
        print(overhead_table(work, num_documents=options.documents, num_rounds=options.rounds))
        print()
        print(publishing_table(options.predictions))
        print()
        print(report_table(options.predictions))


@contextmanager
def environment(server) -> Iterator[None]:
    """The server, as belt finds it."""
    os.environ.update(server.environment())
    try:
        yield
    finally:
        for name in server.environment():
            del os.environ[name]


def overhead_table(work: Path, *, num_documents: int, num_rounds: int) -> str:
    """Seconds of a whole run from S3 to S3, and of tokenizing, encoding and pooling the same texts in memory."""
    lines = [
        "| corpus | documents | tokens | model alone | whole run | overhead |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, table in demo_cuts(documents_per_library=num_documents):
        corpus = drawn(name, table, str(demo_encoder()), num_documents=num_documents)
        alone, whole = measure_overhead(work, corpus, num_rounds=num_rounds)
        overhead = statistics.median(w / a for a, w in zip(alone, whole, strict=True)) - 1
        cells = [name, f"{corpus.table.num_rows:,}", f"{corpus.num_tokens_D.sum():,}"]
        cells += [f"{statistics.median(alone):.2f} s", f"{statistics.median(whole):.2f} s", f"{overhead:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_overhead(work: Path, corpus: Corpus, *, num_rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both ways, round by round; the first round warms up and is not told."""
    texts = corpus.table["text"].to_pylist()
    uri = f"s3://{BUCKET}/{corpus.name}/corpus.parquet"
    storage.write_parquet(uri, corpus.table)
    model = checkpoint.load_checkpoint(str(work / "model"))
    alone, whole = [], []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        score_texts(texts, model, SPEC)
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        score_corpus(uri, str(work / "model"), f"s3://{BUCKET}/{corpus.name}/{uuid.uuid4().hex}", spec=SPEC)
        whole.append(time.perf_counter() - started)
    return alone[1:], whole[1:]


def publishing_table(num_predictions: int) -> str:
    """Seconds and memory of showing that many predictions, and a tenth of them."""
    lines = ["| predictions | published in | peak RSS, MiB |", "| ---: | ---: | ---: |"]
    for number in (num_predictions // 10, num_predictions):
        run = RunRef(output_uri=f"s3://{BUCKET}/published-{number}", run_id=uuid.uuid4().hex[:16])
        manifest = make_up(run, number)
        started = time.perf_counter()
        score_tables.publish_tables(run, manifest, base_version=None)
        seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lines.append(f"| {number:,} | {seconds:.1f} s | {peak:,.0f} |")
    return "\n".join(lines)


def report_table(num_predictions: int) -> str:
    """Seconds and memory of counting, comparing and reporting that many predictions, and a tenth of them."""
    lines = ["| predictions | reported in | of cores | peak RSS, MiB |", "| ---: | ---: | ---: | ---: |"]
    for number in (num_predictions // 10, num_predictions):
        run = RunRef(output_uri=f"s3://{BUCKET}/reported-{number}", run_id=uuid.uuid4().hex[:16])
        manifest = make_up(run, number, with_evidence=True)
        command = [sys.executable, "-c", REPORT, run.model_dump_json(), manifest.model_dump_json()]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, cpu_s, peak = map(float, told.split())
        lines.append(f"| {number:,} | {seconds:.1f} s | {cpu_s:.1f} s | {peak:,.0f} |")
    return "\n".join(lines)


REPORT = """
import resource, sys, time
from belt_tasks.publishing import Manifest, RunRef
from belt_tasks.report import score_report
run, manifest = RunRef.model_validate_json(sys.argv[1]), Manifest.model_validate_json(sys.argv[2])
started, started_cpu = time.perf_counter(), time.process_time()
score_report(run, manifest)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.perf_counter() - started, time.process_time() - started_cpu, peak)
"""


def make_up(run: RunRef, number: int, *, with_evidence: bool = False) -> Manifest:
    """A complete run with predictions of no document, each with three chunks of evidence perhaps."""
    receipts, schema = [], data_contracts.arrow_schema("predictions")
    for first in range(0, number, SHARD_ROWS):
        rows = predictions(run, first, min(SHARD_ROWS, number - first))
        path = run.path_of("predictions", f"{first:016x}")
        sorted_files.put_sorted(storage.join(run.output_uri, path), rows.cast(schema), by=["doc_id"])
        files = [FileReceipt(table="predictions", path=path, num_rows=len(rows))]
        if with_evidence:
            path, shown = run.path_of("evidence", f"{first:016x}"), evidence(rows)
            sorted_files.put_sorted(storage.join(run.output_uri, path), shown, by=["doc_id", "rank"])
            files.append(FileReceipt(table="evidence", path=path, num_rows=len(shown)))
        counts = Counts(num_documents=len(rows), num_tokens=200 * len(rows))
        receipts.append(ShardReceipt(shard_key=f"{first:016x}", files=tuple(files), counts=counts))
    row = {"flow": "score", "corpus_uri": "made up", "spec": SPEC.model_dump_json()}
    row |= {"scoring_fingerprint": "0" * 16, "checkpoint_digest": "0" * 64}
    change = TableChange(base_run_id=None, replaces_all=True)
    return complete(run, receipts, row=row, labels=LABELS, started_at=datetime.now(UTC), change=change)


def predictions(run: RunRef, first: int, number: int) -> pa.Table:
    """Rows whose ids are interleaved with those of other shards."""
    rng = np.random.default_rng(first)
    score_D = rng.random(number)
    pairs = [[{"label": "a", "score": score}, {"label": "b", "score": 1 - score}] for score in score_D.tolist()]
    ids = sorted(f"{(first + i) * 2_654_435_761 % 2**32:010d}" for i in range(number))
    digits = rng.bytes(32 * number).hex()
    same = {
        "label": "a",
        "labels": ["a"],
        "num_tokens": 200,
        "num_tokens_scored": 200,
        "num_chunks": 1,
        "top_chunk": {"chunk_index": 0, "start_char": 0, "stop_char": 1_000},
        "checkpoint_digest": "0" * 64,
        "scoring_fingerprint": "0" * 16,
        "run_id": run.run_id,
        "scored_at": datetime.now(UTC),
        "removed_at": None,
    }
    columns = {
        "doc_id": ids,
        "score": score_D,
        "scores": pairs,
        "logits": rng.random((number, 2)).astype(np.float32).tolist(),
        "content_fingerprint": [digits[64 * i : 64 * (i + 1)] for i in range(number)],
    }
    schema = data_contracts.arrow_schema("predictions")
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(same[field.name], field.type), number)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def evidence(rows: pa.Table) -> pa.Table:
    """Three chunks of each prediction."""
    number = len(rows)
    schema = data_contracts.arrow_schema("evidence")
    same = {"label": "a", "text": None, "score": 0.5, "start_token": 0, "stop_token": 100, "start_char": 0}
    columns = {
        "doc_id": rows["doc_id"].take(np.repeat(np.arange(number), 3)),
        "rank": np.tile([1, 2, 3], number).astype(np.int32),
        "chunk_index": np.tile([0, 1, 2], number).astype(np.int32),
        "contribution": np.random.default_rng(number).random(3 * number),
        "run_id": rows["run_id"].take(np.repeat(np.arange(number), 3)),
    }
    arrays = [
        columns[field.name]
        if field.name in columns
        else pa.repeat(pa.scalar(same.get(field.name, 1_000), field.type), 3 * number)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


if __name__ == "__main__":
    main()
