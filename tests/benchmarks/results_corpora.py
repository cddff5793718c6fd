"""Corpora of the results: which there are, how each is fine-tuned on, and whether a folder has them as they should be.

DIR/NAME.parquet or DIR/NAME is a Parquet file or a folder of them, with COLUMNS; `split` is train or test.
"""

from pathlib import Path

import numpy as np
import polars as pl

from belt_tasks import storage
from belt_tasks.errors import ConfigError
from belt_tasks.specs import (
    BatchSpec,
    ChunkSpec,
    CorpusSpec,
    Fraction,
    PoolingSpec,
    PoolingStrategy,
    Precision,
    Selection,
    Spec,
    TaskKind,
    TrainSpec,
)

COLUMNS = ("doc_id", "text", "label", "split")
SPLITS = ("train", "test")
SELECTIONS: tuple[Selection, ...] = ("head", "head_tail", "all")
SEED = 0


class Settings(Spec):
    """How an encoder is fine-tuned on a corpus: the same for every selection."""

    epochs: int = 3
    learning_rate: float = 5e-5
    documents_per_batch: int = 8
    pooling_strategy: PoolingStrategy = "mean"
    maximal_text_length: int | None = None
    """Tokens; None reads whole documents."""
    chunk_size: int = 510
    """Tokens; the stride too."""
    validation_fraction: Fraction = 0.1
    """Of the training documents; they choose the epoch, by the metric that is compared."""
    precision: Precision = "fp32"
    """Of training and scoring."""
    device: str = "auto"

    def train_spec(self, selection: Selection, task: TaskKind | None, *, seed: int) -> TrainSpec:
        """How one selection is fine-tuned."""
        return TrainSpec(
            task=task,
            chunks=ChunkSpec(
                chunk_size=self.chunk_size,
                stride=self.chunk_size,
                maximal_text_length=self.maximal_text_length,
                selection=selection,
            ),
            pooling=PoolingSpec(pooling_strategy=self.pooling_strategy),
            batches=BatchSpec(),
            device=self.device,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            documents_per_batch=self.documents_per_batch,
            precision=self.precision,
            validation_fraction=self.validation_fraction,
            metric_for_best_model="mse" if task == "regression" else "accuracy",
            seed=seed,
        )


class Known(Spec):
    """A corpus that the results may be of."""

    about: str
    """What is told of it in the README."""
    task: TaskKind | None = None
    """None where the label column says it."""
    settings: Settings = Settings()
    in_default: bool = True
    """Part of a run that names no corpus."""


CORPORA: dict[str, Known] = {
    "movie_reviews": Known(about="film reviews, positive or negative (Pang and Lee 2004, polarity v2.0)"),
    "imdb_stars_long": Known(
        about="stars of IMDB reviews longer than a chunk (from Maas et al. 2011)",
        task="regression",
    ),
    "novel_chapters_author": Known(
        about="chapters of public-domain novels, by author; the novels of the test are not among those of the training "
        "(Zenodo 3462535)",
        settings=Settings(epochs=5, learning_rate=1e-4),
    ),
    "imdb": Known(
        about="IMDB reviews, positive or negative (Maas et al. 2011, its own split)",
        settings=Settings(documents_per_batch=16),
        in_default=False,
    ),
}
"""In the order of the table."""


class Found(Spec):
    """A corpus in a folder, checked."""

    name: str
    uri: str
    """A Parquet file, or a folder of them."""
    files: tuple[Path, ...]

    @property
    def known(self) -> Known:
        """What it is."""
        return CORPORA[self.name]

    @property
    def digest(self) -> str:
        """64 hex digits over its files."""
        folder = self.files[0].parent if len(self.files) == 1 else Path(self.uri)
        return storage.sha256_of_files(folder, [str(file.relative_to(folder)) for file in self.files])

    def rows(self) -> pl.DataFrame:
        """All of its rows."""
        return pl.scan_parquet(list(self.files)).select(COLUMNS).collect()


def columns(split: str) -> CorpusSpec:
    """The rows of a split, as belt reads them."""
    return CorpusSpec(split_column="split", split=split)


def find(folder: Path, only: tuple[str, ...] | None) -> list[Found]:
    """The corpora of a folder that were asked for; without names, all that it has but those in need of a GPU.

    Raises:
        ConfigError: one is unknown, is not there, or is not as it should be.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: must be a folder with corpora, there is no such folder")
    unknown = [name for name in only or () if name not in CORPORA]
    if unknown or only == ():
        raise ConfigError(f"--only must name some of {', '.join(CORPORA)}, got {', '.join(unknown) or 'none'}")
    found = []
    for name, known in CORPORA.items():
        if not (name in only if only is not None else known.in_default):
            continue
        path = next((path for path in (folder / f"{name}.parquet", folder / name) if path.exists()), None)
        if path is not None:
            found.append(_checked(name, path))
        elif only is not None:
            raise ConfigError(f"{folder}: --only names {name}, but there is neither {name}.parquet nor a folder {name}")
    if not found:
        names = [f"{name}.parquet" for name, known in CORPORA.items() if known.in_default]
        raise ConfigError(f"{folder}: must have some of {', '.join(names)}, has none")
    return found


def sample(found: Found, num_documents: int, path: Path) -> Found:
    """So many documents of each split, written to a file; the same every time, and the file stays if it is there."""
    if not path.exists():  # a new file would be a new run
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = found.rows().sort("doc_id")
        parts = [_drawn(rows.filter(split=split), num_documents) for split in SPLITS]
        storage.write_parquet(str(path), pl.concat(parts).to_arrow())
    return Found(name=found.name, uri=str(path.absolute()), files=(path.absolute(),))


def _drawn(rows: pl.DataFrame, number: int) -> pl.DataFrame:
    return rows[np.sort(np.random.default_rng(SEED).permutation(len(rows))[:number])]


def _checked(name: str, path: Path) -> Found:
    path = path.absolute()
    files = tuple(sorted(path.rglob("*.parquet"))) if path.is_dir() else (path,)
    if not files:
        raise ConfigError(f"{path}: must hold Parquet files, has none")
    try:
        names = pl.scan_parquet(list(files)).collect_schema().names()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"{path}: must be Parquet: {str(error).splitlines()[0]}") from error
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise ConfigError(
            f"{path}: a corpus must have the columns {', '.join(COLUMNS)}, lacks {', '.join(missing)}; "
            f"it has {', '.join(names)}"
        )
    splits = pl.scan_parquet(list(files)).select(pl.col("split").cast(pl.String).unique()).collect()["split"].to_list()
    absent = [split for split in SPLITS if split not in splits]
    if absent:
        raise ConfigError(f"{path}: column split must hold train and test, has no row of {' or '.join(absent)}")
    return Found(name=name, uri=str(path), files=files)
