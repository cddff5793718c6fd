"""Fixtures that every test may use: tiny random encoders of each family, real weights, and corpora on disk."""

import atexit
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# before anything imports prefect or transformers: nothing leaves this machine
os.environ["HF_HUB_OFFLINE"] = "1"
if "PREFECT_HOME" not in os.environ:
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="belt-prefect-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ.pop("COLUMNS", None)  # pytest-xdist speaks of a terminal that is not there
os.environ["TOKENIZERS_PARALLELISM"] = "true"
# tiny models gain nothing from threads, and lose a lot where threads wait for each other on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from open_data_contract_standard.model import OpenDataContractStandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from belt_tasks import object_stores
from data_contracts import loader
from tests.s3_server import BUCKET, S3Server
from tests.s3_server import s3_server as run_s3_server

# how long an example takes is the machine's affair
hypothesis.settings.register_profile("belt", deadline=None)
hypothesis.settings.load_profile("belt")

SLOWEST_FIRST = (
    "rehearsal/test_rehearsal.py",
    "rehearsal/test_runbooks.py",
    "flows/test_ray.py",
    "integration/",
    "flows/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: next((i for i, name in enumerate(SLOWEST_FIRST) if name in item.nodeid), 99))


FAMILIES = ("bert", "roberta", "distilbert", "mpnet", "modernbert")
NUM_POSITIONS = 64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "A window covers some tokens; the next window begins a stride later!",
    "Crème brûlée costs 12.50 euros in Zürich (naïve café prices).",
    "def pool(chunks): return sum(chunks) / len(chunks)  # mean pooling",
    "numbers 0 1 2 3 4 5 6 7 8 9 and punctuation . , ; : ! ? - _ ( ) [ ] { }",
]


def words(num_words: int, seed: int = 0) -> str:
    """A text of random words from SENTENCES."""
    pool = " ".join(SENTENCES).split()
    return " ".join(np.random.default_rng(seed).choice(pool, size=num_words)) if num_words else ""


def wordpiece_tokenizer() -> Tokenizer:
    """As BERT has: [CLS] ... [SEP], lower case, whitespace and punctuation apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_level_tokenizer(special: Sequence[str], template: tuple[str, str]) -> Tokenizer:
    """As RoBERTa and ModernBERT have: bytes, a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    first, last = template
    ids = [(token, tokenizer.token_to_id(token)) for token in template]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=ids
    )
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """As XLM-RoBERTa has: pieces with a leading underline for the space, special tokens inside the vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA_NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}


def save_tokenizer(folder: Path, tokenizer: Tokenizer, names: dict[str, str]) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_tiny_encoder(folder: Path, family: str, *, seed: int = 0, dropout: float = 0.1, **config: Any) -> Path:
    """A random two-layer encoder of a family with its tokenizer, as a Hugging Face directory."""
    torch.manual_seed(seed)
    tokenizer, names, build = _parts(family, dropout)
    save_tokenizer(folder, tokenizer, names)
    built = build(tokenizer.get_vocab_size(), **config)
    model = transformers.AutoModel.from_config(built)
    with torch.no_grad():  # larger weights than at initialisation, so that documents differ
        for weight in model.parameters():
            weight.mul_(4.0) if weight.ndim > 1 else None
    model.save_pretrained(folder)
    return folder


def _parts(family: str, dropout: float) -> tuple[Tokenizer, dict[str, str], Callable[..., Any]]:
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    match family:
        case "bert":
            return (
                wordpiece_tokenizer(),
                BERT_NAMES,
                lambda size, **more: transformers.BertConfig(
                    vocab_size=size,
                    pad_token_id=0,
                    **({"max_position_embeddings": NUM_POSITIONS} | drop | SIZES | more),
                ),
            )
        case "distilbert":
            return (
                wordpiece_tokenizer(),
                BERT_NAMES,
                lambda size, **more: transformers.DistilBertConfig(
                    vocab_size=size,
                    max_position_embeddings=NUM_POSITIONS,
                    dim=32,
                    n_layers=2,
                    n_heads=4,
                    hidden_dim=64,
                    dropout=dropout,
                    attention_dropout=dropout,
                    pad_token_id=0,
                    **more,
                ),
            )
        case "roberta" | "mpnet" | "xlm-roberta":
            config = type(transformers.AutoConfig.for_model(family))
            return (
                byte_level_tokenizer(ROBERTA_SPECIAL, ("<s>", "</s>")),
                ROBERTA_NAMES,
                lambda size, **more: config(
                    vocab_size=size,
                    pad_token_id=1,
                    **({"max_position_embeddings": NUM_POSITIONS + 2} | drop | SIZES | more),
                ),
            )
        case "modernbert":
            special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            return (
                byte_level_tokenizer(special, ("[CLS]", "[SEP]")),
                BERT_NAMES,
                lambda size, **more: transformers.ModernBertConfig(
                    vocab_size=size,
                    max_position_embeddings=NUM_POSITIONS,
                    pad_token_id=0,
                    cls_token_id=2,
                    sep_token_id=3,
                    bos_token_id=2,
                    eos_token_id=3,
                    mlp_dropout=dropout,
                    embedding_dropout=dropout,
                    attention_dropout=dropout,
                    global_attn_every_n_layers=2,
                    local_attention=16,
                    **(SIZES | more),
                ),
            )
    raise AssertionError(family)


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random encoder of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_encoder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_encoder(tiny_encoders) -> Path:
    """A tiny random BERT that reads 64 tokens."""
    return tiny_encoders("bert")


def save_tiny_checkpoint(folder: Path, tiny_encoder: Path, labels: tuple[str, ...], *, task: str = "multiclass") -> str:
    """A checkpoint with a random head: one logit a label, chunks of 30 tokens; returns its path."""
    from belt_tasks import checkpoint, encoder
    from belt_tasks.specs import ChunkSpec, Head, PoolingSpec

    torch.manual_seed(1)
    checkpoint.save_checkpoint(
        encoder.ChunkModel(encoder.load_body(tiny_encoder), num_logits=len(labels), pooling=PoolingSpec()),
        str(folder),
        tokenizer_source=str(tiny_encoder),
        head=Head(task=task, labels=labels),
        chunks=ChunkSpec(chunk_size=30, stride=30),
        pooling=PoolingSpec(),
        data_fingerprint="0" * 64,
        metrics={},
        training={},
    )
    return str(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_encoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved checkpoint: the tiny BERT, three classes, chunks of 30 tokens."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_encoder, ("ham", "other", "spam"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2."""
    from belt_tasks.demo import demo_encoder

    return demo_encoder()


@pytest.fixture
def living_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[threading.Thread]]]:
    """Those threads still alive that the test has started, directly or not; when it ends, none may be."""
    started, start = {threading.current_thread()}, threading.Thread.start

    def recorded(thread: threading.Thread) -> None:
        if threading.current_thread() in started:  # others in this process are not the test's
            started.add(thread)
        start(thread)

    def living() -> list[threading.Thread]:
        return [thread for thread in started if thread.is_alive() and thread is not threading.current_thread()]

    monkeypatch.setattr(threading.Thread, "start", recorded)
    yield living
    assert living() == []


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Write rows as Parquet files of a corpus; returns its path."""

    def write(rows: pl.DataFrame | pa.Table | dict[str, Any], *, num_files: int = 1, name: str = "corpus") -> str:
        table = rows.to_arrow() if isinstance(rows, pl.DataFrame) else rows
        table = pa.table(table) if isinstance(table, dict) else table
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        size = -(-max(table.num_rows, 1) // num_files)
        for i in range(num_files):
            pq.write_table(table.slice(i * size, size), folder / f"part-{i}.parquet")
        return str(folder)

    return write


def labelled_rows(num_documents: int, *, seed: int = 0, most_words: int = 120) -> pl.DataFrame:
    """Documents whose label shows in their words, of 0 to `most_words` words."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_documents):
        label = ["fox", "window"][i % 2]
        text = words(int(rng.integers(0, most_words)), seed=seed * 1000 + i)
        text = " ".join([label, *(f"{word} {label}" for word in text.split())])
        rows.append((f"doc-{i:04d}", text, label, "test" if i % 5 == 0 else "train"))
    return pl.DataFrame(rows, schema=["doc_id", "text", "label", "split"], orient="row")


@contextmanager
def other_contract(name: str, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Within the block a table's contract is another: its columns by name, changed in place."""
    document = loader.contract(name).model_dump(by_alias=True, exclude_none=True)
    (table,) = document["schema"]
    columns = {column["name"]: column for column in table["properties"]}
    change(columns)
    table["properties"] = list(columns.values())
    other = OpenDataContractStandard.model_validate(document)
    cached = loader.arrow_schema
    with pytest.MonkeyPatch.context() as patch:
        really = loader.contract
        patch.setattr(loader, "contract", lambda wanted: other if wanted == name else really(wanted))
        cached.cache_clear()
        yield
    cached.cache_clear()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    """A real S3 server with one bucket."""
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator[S3Server]:
    """The server, which belt finds by the environment."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    object_stores.configure({})
    yield s3_server
    object_stores.configure({})


@pytest.fixture
def s3_root(s3) -> str:  # noqa: ARG001 - finds the server by the environment
    """An empty prefix on the server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def output(request, tmp_path) -> str:
    """An empty place to publish to."""
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_root")
