"""What a second process gives a fine-tuning: one against two on this machine, each on one core, taking turns.

python -m tests.benchmarks.data_parallel [--documents 32] [--rounds 3]
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch

from belt_tasks import demo
from belt_tasks.demo_corpus import DemoCorpusSpec
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.specs import ChunkSpec, TrainSpec
from tests.fine_tuned import fine_tuned

SPEC = TrainSpec(
    chunks=ChunkSpec(chunk_size=254, stride=254, maximal_text_length=508),
    device="cpu",
    epochs=1,
    documents_per_batch=8,
    dropout=0.0,
    validation_fraction=0.0,
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=32, help="of each of two libraries")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/corpus"
        libraries = DemoCorpusSpec(libraries=("numpy", "polars"), documents_per_library=options.documents, num_long=0)
        demo.write_demo_corpus(corpus, libraries)
        runs: dict[int, list[FineTuningReceipt]] = {1: [], 2: []}
        for number in range(options.rounds):
            for num_devices, its in runs.items():
                spec = SPEC.model_copy(update={"num_devices": num_devices})
                its.append(fine_tuned(corpus, demo.demo_encoder(), Path(folder) / f"{number}-{num_devices}", spec))
    seconds = {num_devices: [each.training_s for each in its] for num_devices, its in runs.items()}
    print("| processes of one core | seconds (median) | tokens/s | training loss |\n| ---: | ---: | ---: | ---: |")
    for num_devices, its in runs.items():
        median, one = statistics.median(seconds[num_devices]), its[0]
        rate, loss = one.num_tokens_encoded / median, one.epochs[0].training_loss
        print(f"| {num_devices} | {median:.2f} | {rate:,.0f} | {loss:.5f} |")
    efficiency = [one / (2 * two) for one, two in zip(seconds[1], seconds[2], strict=True)]
    each = ", ".join(f"{value:.0%}" for value in efficiency)
    print(f"\nefficiency, t1 / (2 * t2): {statistics.median(efficiency):.0%} (rounds: {each})")
    print(f"load average at the end, of {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
