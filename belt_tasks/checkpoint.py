"""Checkpoints: a directory with weights, tokenizer, specs, label names, metrics, data fingerprint and one digest.

belt's own:
    config.json, model.safetensors    encoder body, as transformers saves it
    head.safetensors                  belt's head
    tokenizer.json, ...               tokenizer, as transformers saves it
    belt.json                         everything else; written last, so its presence means the rest is there

A finished `AutoModelForSequenceClassification` directory is a checkpoint too, with belt's default specs.
"""

import hashlib
import logging
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from belt_tasks import encoder, heads, publishing, registry, storage
from belt_tasks.calibration import Calibration, calibrated
from belt_tasks.engine import ChunkEncoder, build_encoder
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec, Precision, Spec
from belt_tasks.stored import read_json
from belt_tasks.tokens import DocumentTokenizer, load_tokenizer

log = logging.getLogger(__name__)

CARD_NAME = "belt.json"
HEAD_NAME = "head.safetensors"
NEVER_READ = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".npz"}
"""Pickles, states of optimizers and weights for other libraries, which often lie beside the safetensors."""
NUM_KEPT = 2


class CheckpointCard(Spec):
    """What belt.json says of a checkpoint."""

    head: Head
    """Task and labels."""
    chunks: ChunkSpec
    """Windows that it was fine-tuned with."""
    pooling: PoolingSpec
    """Pooling that it was fine-tuned with."""
    calibration: Calibration | None = None
    """What pooled logits go through before they become probabilities; None leaves them."""
    digest: str
    """sha256 over what is above and all other files, 64 hex digits."""
    data_fingerprint: str
    """Hash of the training documents, in order."""
    metrics: dict[str, Any]
    """Metrics of the best epoch on the held-out documents, as the checkpoint scores them; `uncalibrated` has what
    calibration changed."""
    training: dict[str, Any]
    """The TrainSpec that made it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint, ready to score."""

    model: nn.Module
    """Maps (input_ids [B, T], attention_mask [B, T]) to chunk outputs [B, K]; in eval mode, fp32, on the CPU."""
    tokenizer: DocumentTokenizer
    head: Head
    chunks: ChunkSpec
    pooling: PoolingSpec
    digest: str
    """64 hex digits that change when weights, tokenizer or config do."""
    uri: str
    calibration: Calibration | None = None
    _encoders: dict[tuple[str, Precision], ChunkEncoder] = field(default_factory=dict)

    def scores(self, logits_DL: Tensor) -> Tensor:
        """Calibrated probabilities of pooled logits, float64 [D, len(labels)]; of regression the values."""
        return heads.scores(calibrated(logits_DL.double(), self.calibration), self.head)

    def encoder(self, device: torch.device, precision: Precision) -> ChunkEncoder:
        """The model made ready for a device; built once."""
        key = (str(device), precision)
        if key not in self._encoders:
            self._encoders[key] = build_encoder(self.model, device=device, precision=precision)
        return self._encoders[key]


def save_checkpoint(
    model: encoder.ChunkModel,
    uri: str,
    *,
    tokenizer_source: str,
    head: Head,
    chunks: ChunkSpec,
    pooling: PoolingSpec,
    data_fingerprint: str,
    metrics: dict[str, Any],
    training: dict[str, Any],
    calibration: Calibration | None = None,
) -> CheckpointCard:
    """Write a checkpoint directory; the card goes last."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder)
        model.body.save_pretrained(local)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in model.head.state_dict().items()},
            local / HEAD_NAME,
        )
        AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(local)
        card = CheckpointCard(
            head=head,
            chunks=chunks,
            pooling=pooling,
            calibration=calibration,
            digest=_digest(local, head, chunks, pooling, calibration),
            data_fingerprint=data_fingerprint,
            metrics=metrics,
            training=training,
        )
        (local / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
        storage.put_directory(local, uri, last=CARD_NAME)
    return card


def resolve(uri: str) -> str:
    """The checkpoint directory itself, where `uri` is the output of a fine-tuning, or REGISTRY@ALIAS.

    An alias may be elsewhere the next moment, so that whoever has resolved one goes on with the directory.

    Raises:
        ConfigError: there is no checkpoint.
    """
    pinned = registry.pin(uri)
    if pinned is not None:
        return pinned
    if storage.exists(storage.join(uri, CARD_NAME)) or storage.exists(storage.join(uri, "config.json")):
        return uri
    if storage.exists(storage.join(uri, "published.json")):
        run_id = str(publishing.read_manifest(uri).run["run_id"])
        nested = storage.join(uri, "runs", run_id, "checkpoint")
        if storage.exists(storage.join(nested, CARD_NAME)):
            return nested
    raise ConfigError(
        f"{uri}: no checkpoint there (looked for {CARD_NAME}, config.json, and the published.json of a fine-tuning)"
        + registry.hint(uri)
    )


def read_card(uri: str) -> CheckpointCard | None:
    """The card of belt's own checkpoint; None for a finished Hugging Face classifier.

    Raises:
        ConfigError: the card is not one that this belt reads.
    """
    card_uri = storage.join(uri, CARD_NAME)
    return read_json(card_uri, CheckpointCard, "the card of a checkpoint") if storage.exists(card_uri) else None


def read_head(uri: str) -> Head:
    """Task and labels of a checkpoint, without reading its weights.

    Raises:
        ConfigError: there is no checkpoint.
    """
    card = read_card(uri)
    if card is not None:
        return card.head
    with storage.local_directory(uri) as folder:
        return encoder.finished_head(folder)


def load_checkpoint(uri: str) -> Checkpoint:
    """Load a checkpoint onto the CPU and check that it is whole.

    Raises:
        ConfigError: it is not there, cannot be loaded, or its files are not those that were saved.
    """
    card = read_card(uri)
    with storage.local_directory(uri) as folder:
        digest = whole_digest(folder, card, uri)
        if card is None:
            return _finished(folder, uri, digest)
        model = encoder.ChunkModel(encoder.load_body(folder), num_logits=card.head.num_logits, pooling=card.pooling)
        missing, unexpected = model.head.load_state_dict(load_file(folder / HEAD_NAME), strict=False)
        if missing or unexpected:
            raise ConfigError(f"{uri}: {HEAD_NAME} does not fit the head: missing {missing}, unexpected {unexpected}")
        return Checkpoint(
            model=model.eval(),
            tokenizer=load_tokenizer(folder),
            head=card.head,
            chunks=card.chunks,
            pooling=card.pooling,
            calibration=card.calibration,
            digest=digest,
            uri=uri,
        )


def _finished(folder: Path, uri: str, digest: str) -> Checkpoint:
    model, head = encoder.load_finished_classifier(folder)
    return Checkpoint(
        model=model.eval(),
        tokenizer=load_tokenizer(folder),
        head=head,
        chunks=ChunkSpec(),
        pooling=PoolingSpec(),
        digest=digest,
        uri=uri,
    )


class CheckpointCache:
    """Loaded checkpoints of this process by URI and digest: one load, however many shards are scored."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], Checkpoint] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str, digest: str) -> Checkpoint:
        """The checkpoint.

        Raises:
            ConfigError: it cannot be loaded, or is no longer the one with this digest.
        """
        key = (uri, digest)
        with self._lock:
            if key not in self._kept:
                checkpoint = load_checkpoint(uri)
                if checkpoint.digest != digest:
                    raise ConfigError(
                        f"{uri}: the checkpoint changed during the run, from {digest} to {checkpoint.digest}"
                    )
                log.info("loaded checkpoint %s, digest %s", uri, digest)
                self._kept[key] = checkpoint
                while len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


cache = CheckpointCache()


def whole_digest(folder: Path, card: CheckpointCard | None, uri: str) -> str:
    """The digest of a checkpoint's local files, which must be what its card, and its place in a registry, say.

    Raises:
        ConfigError: they are not those that were saved.
    """
    digest = _digest_with(card, folder)
    said = {CARD_NAME: None if card is None else card.digest, "its registry": registry.digest_of(uri)}
    for who, expected in said.items():
        if expected not in (None, digest):
            raise ConfigError(f"{uri}: damaged checkpoint: digest of its files is {digest}, {who} says {expected}")
    return digest


def checkpoint_digest(uri: str) -> str:
    """The digest of a checkpoint, without loading the model."""
    card = read_card(uri)
    with storage.local_directory(uri) as folder:
        return _digest_with(card, folder)


def file_names(folder: Path) -> list[str]:
    """The files that a checkpoint consists of; others that lie around belong to nobody."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix not in NEVER_READ
    )


def _digest_with(card: CheckpointCard | None, folder: Path) -> str:
    return _digest(folder) if card is None else _digest(folder, card.head, card.chunks, card.pooling, card.calibration)


def _digest(folder: Path, *card: Spec | None) -> str:
    """Over every file but the card, and over what the card says that decides scores and their names."""
    files = storage.sha256_of_files(folder, [name for name in file_names(folder) if name != CARD_NAME])
    said = [spec.model_dump_json() for spec in card if spec is not None]
    return hashlib.sha256("\n".join([files, *said]).encode()).hexdigest()
