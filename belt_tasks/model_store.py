"""The model store: checkpoints in a registry, copied once, named by their digest and never changed.

REGISTRY/checkpoints/DIGEST/...    the checkpoint's files, its card last
REGISTRY/models/DIGEST.json        what it is and who added it; written when the copy was read back and found whole
"""

from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime

from belt_tasks import checkpoint as checkpoints
from belt_tasks import encoder, registry, storage
from belt_tasks.errors import ConfigError
from belt_tasks.registry import Digest, Entry, Words
from belt_tasks.specs import Head, Spec
from belt_tasks.stored import read_json


class ModelRecord(Spec):
    """A checkpoint of a registry."""

    digest: Digest
    head: Head
    source_uri: str
    """Where it was copied from."""
    metrics: dict[str, Any]
    """Of its best epoch on the documents that its fine-tuning held out; empty where belt did not fine-tune it."""
    who: Words
    at: AwareDatetime


class ModelList(Spec):
    """What a registry holds."""

    registry_uri: str
    aliases: dict[str, Entry]
    models: tuple[ModelRecord, ...]
    """The latest first."""
    history: tuple[Entry, ...]
    """The latest first."""


def add(registry_uri: str, checkpoint_uri: str, *, who: str) -> ModelRecord:
    """Copy a checkpoint into a registry, unless it is there.

    Args:
        registry_uri: the registry; it is made where there is none.
        checkpoint_uri: whatever can be scored with.
        who: adds it.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged, or what was copied is.
    """
    source_uri = storage.absolute(checkpoints.resolve(checkpoint_uri))
    card = checkpoints.read_card(source_uri)
    with storage.local_directory(source_uri) as folder:
        digest = checkpoints.whole_digest(folder, card, source_uri)
        record = find(registry_uri, digest)
        if record is not None:
            return record
        head = encoder.finished_head(folder) if card is None else card.head
        target_uri = registry.checkpoint_uri(registry_uri, digest)
        names = checkpoints.file_names(folder)
        if not any(name.endswith(".safetensors") for name in names):
            raise ConfigError(f"{source_uri}: no weights as safetensors there; pickles are not taken in")
        last = "config.json" if card is None else checkpoints.CARD_NAME
        storage.put_directory(folder, target_uri, last=last, names=names)
    check(registry_uri, digest)
    record = ModelRecord(
        digest=digest,
        head=head,
        source_uri=source_uri,
        metrics={} if card is None else card.metrics,
        who=who,
        at=datetime.now(UTC),
    )
    data = (record.model_dump_json(indent=1) + "\n").encode()
    if storage.create_bytes(registry.model_uri(registry_uri, digest), data):
        return record
    return find(registry_uri, digest) or record  # somebody else added the same


def check(registry_uri: str, digest: str) -> None:
    """Read a checkpoint's copy, and see that it is the checkpoint.

    Raises:
        ConfigError: it is damaged.
    """
    uri = registry.checkpoint_uri(registry_uri, digest)
    card = checkpoints.read_card(uri)
    with storage.local_directory(uri) as folder:
        checkpoints.whole_digest(folder, card, uri)


def find(registry_uri: str, digest: str) -> ModelRecord | None:
    """The record of a checkpoint; None where it is not in the registry.

    Raises:
        ConfigError: the record is not one that this belt reads.
    """
    uri = registry.model_uri(registry_uri, digest)
    return _read(uri) if storage.exists(uri) else None


def list_models(registry_uri: str) -> ModelList:
    """Everything that a registry holds.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    folder = storage.join(storage.absolute(registry_uri), "models")
    if not storage.is_directory(folder):
        raise ConfigError(f"{registry_uri}: no registry of models there (no folder models)")
    records = [_read(file.uri) for file in storage.list_files(folder, suffix=".json")]
    entries = registry.history(registry_uri)
    return ModelList(
        registry_uri=registry_uri,
        aliases=dict(sorted(registry.aliases(entries).items())),
        models=tuple(sorted(records, key=lambda record: record.at, reverse=True)),
        history=tuple(reversed(entries)),
    )


def _read(uri: str) -> ModelRecord:
    return read_json(uri, ModelRecord, "the record of a model")
