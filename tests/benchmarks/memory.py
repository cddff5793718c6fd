"""Peak memory of scoring against the size of the corpus and the length of its longest document.

Each corpus is scored in a process of its own, by a tiny random encoder, so that what is measured is belt's and not the
model's: memory must grow with neither. Random words are tokenized by the demo model's tokenizer.

    python tests/benchmarks/memory.py [--documents 1500]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from belt_tasks import checkpoint, demo, encoder
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec

WORDS_PER_DOCUMENT = 700
LONG_DOCUMENT_WORDS = 600_000
NUM_WORDS = 5_000


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=1500, help="of the smaller corpus; the larger has ten times")
    parser.add_argument("--child", nargs=2, metavar=("CORPUS", "CHECKPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(score(*options.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "checkpoint")
        corpora = {
            f"{options.documents:,} documents": [WORDS_PER_DOCUMENT] * options.documents,
            f"{options.documents * 10:,} documents": [WORDS_PER_DOCUMENT] * options.documents * 10,
            f"{options.documents:,} documents and one of {LONG_DOCUMENT_WORDS:,} words": [
                LONG_DOCUMENT_WORDS,
                *[WORDS_PER_DOCUMENT] * options.documents,
            ],
        }
        print("| corpus | tokens | peak RSS, MiB | of the first |\n| --- | ---: | ---: | ---: |")
        first = None
        for name, lengths in corpora.items():
            corpus = work / "corpus.parquet"
            write_corpus(corpus, lengths)
            command = [sys.executable, __file__, "--child", str(corpus), str(work / "checkpoint")]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            first = first or measured["peak_mib"]
            ratio = measured["peak_mib"] / first
            print(f"| {name} | {measured['num_tokens']:,} | {measured['peak_mib']:,.0f} | {ratio:.2f} |", flush=True)


def make_checkpoint(folder: Path) -> None:
    """A tiny random BERT with the demo model's tokenizer."""
    source = demo.demo_encoder()
    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads = 32, 64, 2, 2
    body_folder = folder.parent / "encoder"
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(body_folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(body_folder)
    checkpoint.save_checkpoint(
        encoder.ChunkModel(encoder.load_body(body_folder), num_logits=2, pooling=PoolingSpec()),
        str(folder),
        tokenizer_source=str(body_folder),
        head=Head(task="multiclass", labels=("no", "yes")),
        chunks=ChunkSpec(),
        pooling=PoolingSpec(),
        data_fingerprint="",
        metrics={},
        training={},
    )


def write_corpus(path: Path, lengths: list[int]) -> None:
    """Documents of random words; the words are the same whatever the corpus."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(NUM_WORDS)])
    texts = [" ".join(rng.choice(words, size=length)) for length in lengths]
    pl.DataFrame({"doc_id": [f"{i:07d}" for i in range(len(texts))], "text": texts}).write_parquet(
        path, row_group_size=2_000
    )


def score(corpus_uri: str, checkpoint_uri: str) -> dict[str, float]:
    """Score a corpus in this process; its peak memory and what it read."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = score_corpus(corpus_uri, checkpoint_uri, folder, CorpusSpec(), ScoreSpec(device="cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak / 1024, "num_tokens": manifest.run["num_tokens"]}


if __name__ == "__main__":
    main()
