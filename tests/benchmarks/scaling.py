"""What more workers give: one against two on this machine, what a shard costs beside its documents, what feeds a GPU.

Ray's workers have one core each, and both have loaded the model before anything is timed. One and two of them take
turns, so that what else the machine does meets both; how busy it was is printed.

    python -m tests.benchmarks.scaling [--documents 160] [--rounds 5] [--shards 100]
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")

import numpy as np
import polars as pl
from prefect import flow, unmapped

from belt_tasks import checkpoint, prepare, score_planning, shard_scoring
from belt_tasks.corpus import ShardRef
from belt_tasks.demo import demo_encoder
from belt_tasks.receipts import Stopwatch
from belt_tasks.score_planning import ScorePlan
from belt_tasks.score_store import Claims, ScoreStore
from belt_tasks.scoring import Scorer
from belt_tasks.specs import CorpusSpec, RaySpec, Runner, ScoreSpec
from flows import runners, tasks
from flows.local_server import local_server
from flows.ray_workers import ray_workers
from tests.benchmarks.corpora import demo_cuts, drawn, save_random_head

CORPUS, SPEC = CorpusSpec(), ScoreSpec(device="cpu", precision="fp32")
NUM_SHARDS = 16  # of about equal work, so that two workers end at about the same time
NUM_WARM = 4


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=100, help="tiny ones, to see what each costs by itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, local_server():
        work = Path(folder)
        save_random_head(str(demo_encoder()), work / "model")
        num_tokens = write_corpora(work, num_documents=options.documents, num_shards=options.shards)
        print(scaling_table(work, num_tokens, num_rounds=options.rounds), end="\n\n")
        print(overhead_table(work), end="\n\n")
        print(feeding_table(work, num_tokens, num_rounds=options.rounds))


def write_corpora(work: Path, *, num_documents: int, num_shards: int) -> int:
    """Long documents in shards of about equal length, and shards of a few words; returns the tokens of the former."""
    _, table = next(demo_cuts(documents_per_library=num_documents))
    corpus = drawn("long", table, str(demo_encoder()), num_documents=num_documents)
    order = np.argsort(-corpus.num_tokens_D)
    for name, frames in {
        "long": [pl.DataFrame(corpus.table)[order[i::NUM_SHARDS]] for i in range(NUM_SHARDS)],
        "tiny": [pl.DataFrame({"doc_id": [str(i)], "text": [f"number {i}"]}) for i in range(num_shards + NUM_WARM)],
    }.items():
        (work / name).mkdir()
        for i, frame in enumerate(frames):
            frame.write_parquet(work / name / f"{i:05d}.parquet")
    return int(corpus.num_tokens_D.sum())


def plan(work: Path, name: str) -> ScorePlan:
    """A run over a corpus, as if it were the first."""
    output = tempfile.mkdtemp(dir=work)
    return score_planning.plan_scoring(str(work / name), str(work / "model"), output, CORPUS, SPEC)


def arguments(planned: ScorePlan, shard: ShardRef) -> dict[str, object]:
    """Of `score_shard`."""
    return {
        "shard": shard,
        "corpus": CORPUS,
        "spec": planned.spec,
        "run": planned.run,
        "checkpoint_uri": planned.checkpoint_uri,
        "checkpoint_digest": planned.checkpoint_digest,
        "scoring_fingerprint": planned.scoring_fingerprint,
        "rows_uri": planned.run.rows_uri(shard.key),
    }


def scaling_table(work: Path, num_tokens: int, *, num_rounds: int) -> str:
    """Seconds of the same shards on one worker and on two."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    loads = []
    with ray_workers(RaySpec(num_workers=2, num_cpus=1)) as workers:

        def run(num_workers: int) -> float:
            planned = plan(work, "long")
            with ThreadPoolExecutor(num_workers) as threads:
                start = time.perf_counter()
                done = [
                    threads.submit(workers().call, shard_scoring.score_shard, **arguments(planned, shard))
                    for shard in planned.shards
                ]
                for each in done:
                    each.result()
                return time.perf_counter() - start

        run(2)
        for _ in range(num_rounds):
            loads.append(os.getloadavg()[0])
            for num_workers, its in seconds.items():
                its.append(run(num_workers))
    efficiency = [one / (2 * two) for one, two in zip(seconds[1], seconds[2], strict=True)]
    lines = ["| workers of one core | seconds (median) | tokens/s |", "| ---: | ---: | ---: |"]
    lines += [
        f"| {number} | {statistics.median(its):.2f} | {num_tokens / statistics.median(its):,.0f} |"
        for number, its in seconds.items()
    ]
    each = ", ".join(f"{value:.0%}" for value in efficiency)
    lines += ["", f"efficiency, t1 / (2 * t2): {statistics.median(efficiency):.0%} (rounds: {each})"]
    lines += [
        f"load average before each round, of {os.cpu_count()} cores: {', '.join(f'{load:.1f}' for load in loads)}"
    ]
    return "\n".join(lines)


@flow(name="overhead", task_runner=tasks.one_worker)
def time_shards(planned: ScorePlan, runner: Runner, ray: RaySpec) -> float:
    """Seconds of all shards of a plan but the first, which load the model."""
    with runners.scoring(runner, ray) as stages:

        def run(shards: tuple[ShardRef, ...]) -> None:
            each = [arguments(planned, shard) for shard in shards]
            mapped = {name: [of[name] for of in each] for name in ("shard", "rows_uri")}
            same = {name: unmapped(value) for name, value in each[0].items() if name not in mapped}
            tasks.gather(stages.score_shards(**mapped, **same))

        run(planned.shards[:NUM_WARM])
        start = time.perf_counter()
        run(planned.shards[NUM_WARM:])
        return time.perf_counter() - start


def overhead_table(work: Path) -> str:
    """What a shard costs beside its documents: reading, four objects, a task of Prefect's, and the way to a worker."""
    lines = ["| runner | shards of one document | ms each |", "| --- | ---: | ---: |"]
    for name, runner, ray in (
        ("threads", "threads", RaySpec()),
        ("ray, 1 worker", "ray", RaySpec(num_workers=1)),
        ("ray, 2 workers", "ray", RaySpec(num_workers=2)),
    ):
        planned = plan(work, "tiny")
        number = len(planned.shards) - NUM_WARM
        lines.append(f"| {name} | {number} | {time_shards(planned, runner, ray) / number * 1000:.0f} |")
    return "\n".join(lines)


def prepare_only(planned: ScorePlan) -> float:
    """Seconds to read, tokenize, cut and plan all shards, as ahead of an encoder that is infinitely fast."""
    loaded = checkpoint.cache.get(planned.checkpoint_uri, planned.checkpoint_digest)
    scorer = Scorer.of(loaded, planned.spec)
    start = time.perf_counter()
    for shard in planned.shards:
        watch = Stopwatch()
        blocks = prepare.token_blocks(shard, CORPUS, loaded.tokenizer, stopwatch=watch)
        for _ in shard_scoring.planned_blocks(blocks, scorer, Claims(ScoreStore()), watch):
            pass
    return time.perf_counter() - start


def feeding_table(work: Path, num_tokens: int, *, num_rounds: int) -> str:
    """Tokens a second that one worker can hand to its encoder."""
    lines = ["| cores of a worker | tokens/s ready for the encoder |", "| ---: | ---: |"]
    planned = plan(work, "long")
    for num_cpus in (1, 2):
        with ray_workers(RaySpec(num_workers=1, num_cpus=num_cpus)) as workers:
            seconds = [
                workers().call(prepare_only, planned) for _ in range(1 + num_rounds)
            ]  # the first loads the model
            fastest = min(seconds[1:])
        lines.append(f"| {num_cpus} | {num_tokens / fastest:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
