"""What it takes to find out what changed in a large corpus: seconds and peak memory of planning a night.

Every plan is made in a process of its own, against the same published state. Documents are of 100 characters, and none
is scored: the state is that of a night whose predictions are left out.

    python -m tests.benchmarks.planning [--documents 10000000] [--files 200]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from belt_tasks import score_corpus, score_planning, score_tables
from belt_tasks.specs import CorpusSpec, ScoreSpec
from tests.benchmarks.memory import ROOT, make_checkpoint
from tests.benchmarks.worker import peak_rss_bytes

SHARE_CHANGED = 0.001
CORPUS, SPEC = CorpusSpec(), ScoreSpec(device="cpu")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--child", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(plan(options.child)))
    else:
        print(table(measure(options.documents, options.files)))


def measure(num_documents: int, num_files: int) -> list[dict[str, Any]]:
    """Plan a night after each kind of change."""
    numbers, share = np.arange(num_documents), f"{SHARE_CHANGED:.1%} of the documents"
    is_changed = np.random.default_rng(0).random(num_documents) < SHARE_CHANGED
    in_one_file = numbers < num_documents // num_files
    nights: dict[str, Callable[[Path], None]] = {
        "nothing": lambda _: None,
        f"{share} of one file": lambda work: write(work, numbers, is_changed & in_one_file, num_files, only_first=True),
        f"{share}, in every file": lambda work: write(work, numbers, is_changed, num_files),
        f"{share}, and all dealt out anew among the files": lambda work: write(
            work, np.random.default_rng(1).permutation(num_documents), is_changed, num_files
        ),
    }
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "model")
        write(work, numbers, np.zeros(num_documents, dtype=bool), num_files)
        publish_nothing(work)
        for name, change in nights.items():
            change(work)
            command = [sys.executable, "-m", "tests.benchmarks.planning", "--child", str(work)]
            child = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            measured.append({"changed": name, **json.loads(child.stdout)})
    return measured


def write(
    work: Path, numbers_D: np.ndarray, is_changed: np.ndarray, num_files: int, *, only_first: bool = False
) -> None:
    """A corpus whose documents are in this order."""
    (work / "corpus").mkdir(exist_ok=True)
    for i, numbers in enumerate(np.array_split(numbers_D, num_files)[: 1 if only_first else None]):
        number = pl.Series("number", numbers)
        frame = number.to_frame().select(
            pl.format("document-{}", pl.col("number").cast(pl.String).str.zfill(9)).alias("doc_id"),
            pl.concat_str(
                [pl.col("number").hash(seed).cast(pl.String).str.zfill(20) for seed in range(4)]
                + [pl.lit(pl.Series(np.where(is_changed[numbers], "an edition of today ", "an older edition    ")))]
            ).alias("text"),
        )
        frame.write_parquet(work / "corpus" / f"{i:04}.parquet")


def publish_nothing(work: Path) -> None:
    """The state after a first night, without its predictions."""
    planned = score_planning.plan_scoring(*places(work), CORPUS, SPEC)
    manifest = score_corpus.complete(planned, [], corpus_uri=places(work)[0], started_at=datetime.now(UTC))
    score_tables.publish_tables(planned.run, manifest, base_version=None)


def plan(work: Path) -> dict[str, Any]:
    """Plan a night in this process."""
    started = time.perf_counter()
    planned = score_planning.plan_scoring(*places(work), CORPUS, SPEC)
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_rss_bytes() / 2**20,
        "num_to_score": planned.num_rows_to_score,
    }


def places(work: Path) -> tuple[str, str, str]:
    """Corpus, checkpoint and output."""
    return str(work / "corpus"), str(work / "model"), str(work / "output")


def table(measured: list[dict[str, Any]]) -> str:
    """The measurements in Markdown."""
    rows = [
        f"| {row['changed']} | {row['num_to_score']:,} | {row['seconds']:.1f} s | {row['peak_mib']:,.0f} |"
        for row in measured
    ]
    return "\n".join(["| changed | to score | planned in | peak RSS, MiB |", "| --- | ---: | ---: | ---: |", *rows])


if __name__ == "__main__":
    main()
