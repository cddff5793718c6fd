"""Peak memory of scoring against the size of the corpus and the length of its longest document.

Each corpus is scored in a process of its own, by a tiny random encoder, so that what is measured is belt's and not the
model's: memory must grow with neither. Random words are tokenized by the demo model's tokenizer.

    python -m tests.benchmarks.memory [--documents 3000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from belt_tasks import checkpoint, demo, encoder
from belt_tasks.score_corpus import score_corpus
from belt_tasks.specs import ChunkSpec, CorpusSpec, Head, PoolingSpec, ScoreSpec
from tests.benchmarks.worker import peak_rss_bytes

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 3_000  # seven million tokens: more than all stages hold at once
WORDS_PER_DOCUMENT = 700
LONG_DOCUMENT_WORDS = 600_000
NUM_WORDS = 5_000


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=NUM_DOCUMENTS, help="of the smaller; the larger has ten times")
    parser.add_argument("--child", nargs=2, metavar=("CORPUS", "CHECKPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(score(*options.child)))
    else:
        print(table(measure(options.documents)))


def measure(num_documents: int) -> list[dict[str, Any]]:
    """Peak memory of scoring a corpus, one ten times as large, and the first with one very long document."""
    corpora = {
        f"{num_documents:,} documents": [WORDS_PER_DOCUMENT] * num_documents,
        f"{num_documents * 10:,} documents": [WORDS_PER_DOCUMENT] * num_documents * 10,
        f"{num_documents:,} documents and one of {LONG_DOCUMENT_WORDS:,} words": [
            LONG_DOCUMENT_WORDS,
            *[WORDS_PER_DOCUMENT] * num_documents,
        ],
    }
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "checkpoint")
        for name, lengths in corpora.items():
            write_corpus(work / "corpus.parquet", lengths)
            command = [sys.executable, "-m", "tests.benchmarks.memory"]
            arguments = ["--child", str(work / "corpus.parquet"), str(work / "checkpoint")]
            child = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True, cwd=ROOT)
            measured.append({"corpus": name, **json.loads(child.stdout)})
    return measured


def table(measured: list[dict[str, Any]]) -> str:
    """The measurements in Markdown."""
    first = measured[0]["peak_mib"]
    rows = [
        f"| {row['corpus']} | {row['num_tokens']:,} | {row['peak_mib']:,.0f} | {row['peak_mib'] / first:.2f} |"
        for row in measured
    ]
    return "\n".join(["| corpus | tokens | peak RSS, MiB | of the first |", "| --- | ---: | ---: | ---: |", *rows])


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
    return {"peak_mib": peak_rss_bytes() / 2**20, "num_tokens": manifest.run["num_tokens"]}


if __name__ == "__main__":
    main()
