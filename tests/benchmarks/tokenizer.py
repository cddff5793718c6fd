"""How fast documents become tokens on one core, two, four, ...: what an encoder can be fed with.

Each number of cores is measured in a process of its own, several rounds in turn, medians.

    python -m tests.benchmarks.tokenizer [--encoder DIR] [--corpus FILE.parquet]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

from belt_tasks.demo import demo_encoder
from belt_tasks.tokens import load_tokenizer

ROOT = Path(__file__).parents[2]
NUM_CHARACTERS = 4_000_000
NUM_ROUNDS = 5
SENTENCE = "the tokenizer reads whole documents, one after the other; unbelievable (but true) 3.14159 naïve café! "


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--encoder", default=str(demo_encoder()), help="whose tokenizer (default: the demo's)")
    parser.add_argument("--corpus", help="Parquet with a column text (default: made-up sentences)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.encoder, options.corpus)))
        return
    print(table(rates(sys.argv[1:])))


def rates(arguments: list[str]) -> dict[int, float]:
    """Tokens per second by number of cores."""
    cores = [1]
    while cores[-1] * 2 <= len(os.sched_getaffinity(0)):
        cores.append(cores[-1] * 2)
    found: dict[int, list[float]] = {num: [] for num in cores}
    for _ in range(NUM_ROUNDS):
        for num in cores:
            environment = os.environ | {"RAYON_NUM_THREADS": str(num), "TOKENIZERS_PARALLELISM": "true"}
            command = [sys.executable, "-m", "tests.benchmarks.tokenizer", *arguments, "--child"]
            child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
            found[num].append(json.loads(child.stdout))
    return {num: statistics.median(several) for num, several in found.items()}


def table(tokens_per_s: dict[int, float]) -> str:
    """The measurements in Markdown."""
    rows = [f"| {num} | {rate:,.0f} | {rate / tokens_per_s[1]:.2f} |" for num, rate in tokens_per_s.items()]
    return "\n".join(["| cores | tokens per second | of one core |", "| ---: | ---: | ---: |", *rows])


def measure(encoder: str, corpus: str | None) -> float:
    """Tokens per second of this process."""
    tokenizer = load_tokenizer(encoder)
    texts = [SENTENCE * 40] * 1000 if corpus is None else pl.read_parquet(corpus, columns=["text"])["text"].to_list()
    wanted, num_characters = [], 0
    for text in texts:
        if text and num_characters < NUM_CHARACTERS:
            wanted.append(text)
            num_characters += len(text)
    tokenizer.tokenize(wanted[:10])
    start = time.perf_counter()
    tokens = tokenizer.tokenize(wanted)
    return len(tokens.input_ids_T) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
