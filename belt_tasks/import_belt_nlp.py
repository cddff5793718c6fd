"""Import: a model that belt-nlp saved becomes a checkpoint, and nothing that is pickled in it runs.

    DIR/model.bin      the whole network, pickled by torch.save
    DIR/params.json    what it was made with
    DIR/tokenizer...   its tokenizer, as transformers saves it

PyTorch's own unpickler for weights reads the file. Of the classes that the network is of, known names alone are let in,
and none of them is imported: each object becomes a `_Part`, which holds what was pickled and does nothing.
"""

import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from belt_tasks import checkpoint as checkpoints
from belt_tasks import encoder, storage
from belt_tasks.checkpoint import CheckpointCard
from belt_tasks.encoder import ChunkModel
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec
from belt_tasks.tokens import SpecialTokens, load_tokenizer

MODEL, PARAMS = "model.bin", "params.json"
NETWORK = "belt_nlp.bert.BertNN"
ALLOWED = re.compile(
    rf"{re.escape(NETWORK)}"
    r"|torch\.nn\.modules\.\w+\.\w+"
    r"|torch\._C\._nn\.gelu"
    r"|transformers\.activations\.\w+"
    r"|transformers\.models\.\w+\.(configuration|modeling)_\w+\.\w+"
)
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
MOST_NAMES = 5
TRUNCATED_TOKENS = 512  # special ones included: what belt-nlp's classes without pooling read
BERT_IDS = ((101,), (102,))
"""What belt-nlp puts around a chunk, whatever the model."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint that was made of belt-nlp's model."""

    card: CheckpointCard
    checkpoint_uri: str
    has_other_special_tokens: bool
    """Whether belt-nlp put ids around chunks that are not this tokenizer's: then scores are others."""


def import_belt_nlp(folder: str, checkpoint_uri: str, labels: tuple[str, ...] = ()) -> Imported:
    """Make a checkpoint of what a classifier or regressor of belt-nlp saved.

    Args:
        folder: local directory with model.bin, params.json and the tokenizer.
        checkpoint_uri: directory to write, where no model is yet.
        labels: names of the classes, or of a regression's target; without them 0, 1, ... or target.

    Raises:
        ConfigError: it is no such directory, its pickle names what is not let in, or the labels do not fit.
    """
    if any(storage.exists(storage.join(checkpoint_uri, name)) for name in (checkpoints.CARD_NAME, "config.json")):
        raise ConfigError(f"{checkpoint_uri}: holds a model already; choose another output")
    params = _read_params(Path(folder))
    network = _unpickled(Path(folder) / MODEL)
    head, pooling = _head(params, labels), _pooling(params)
    model = _model(network, head, pooling, where=folder)
    with tempfile.TemporaryDirectory() as source:  # belt-nlp keeps the tokenizer without a config
        model.body.config.save_pretrained(source)
        _tokenizer(folder).save_pretrained(source)
        special = load_tokenizer(source).special
        chunks = _chunks(params, special)
        encoder.check_chunk_size(chunks, special, encoder.num_positions(model), source=folder)
        card = checkpoints.save_checkpoint(
            model,
            checkpoint_uri,
            tokenizer_source=source,
            head=head,
            chunks=chunks,
            pooling=pooling,
            data_fingerprint="",
            metrics={},
            training={"belt_nlp": params},
        )
    around = (tuple(special.prefix_ids), tuple(special.suffix_ids))
    return Imported(
        card=card,
        checkpoint_uri=checkpoint_uri,
        has_other_special_tokens="chunk_size" in params and around != BERT_IDS,
    )


class _Part:
    """An object of the pickle: holds its attributes, and does nothing."""

    pickled_as = ""


def _read_params(folder: Path) -> dict[str, Any]:
    missing = [name for name in (MODEL, PARAMS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: no {' and no '.join(missing)} there, which belt-nlp's `save` writes")
    try:
        params = json.loads((folder / PARAMS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / PARAMS}: not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ConfigError(f"{folder / PARAMS}: must be a JSON object, got {type(params).__name__}")
    return params


def _unpickled(path: Path) -> _Part:
    """The network, as parts.

    Raises:
        ConfigError: it is no file of torch.save, or names what is not let in.
    """
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path}: not a file of torch.save")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if ALLOWED.fullmatch(name) is None]
        if refused:
            more = f" and {len(refused) - MOST_NAMES} more" if len(refused) > MOST_NAMES else ""
            raise ConfigError(
                f"{path}: names {', '.join(refused[:MOST_NAMES])}{more}, which no network of belt-nlp is made of; "
                "nothing of it was run"
            )
        parts = [(type("_Part", (_Part,), {"pickled_as": name}), name) for name in names]
        with torch.serialization.safe_globals(parts):  # type: ignore[arg-type]
            network = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(network, _Part) or network.pickled_as != NETWORK:
        raise ConfigError(
            f"{path}: must hold a {NETWORK}, got {getattr(network, 'pickled_as', type(network).__name__)}"
        )
    return network


def _head(params: dict[str, Any], labels: tuple[str, ...]) -> Head:
    """Classifiers of belt-nlp say how many labels they have, regressors do not."""
    if "num_labels" not in params:
        wanted, names = 1, labels or ("target",)
    else:
        wanted = int(params["num_labels"])
        names = labels or tuple(map(str, range(wanted)))
    if len(names) != wanted:
        raise ConfigError(f"labels must be {wanted} for this model, got {len(names)}: {', '.join(names)}")
    if "num_labels" not in params:
        return Head(task="regression", labels=names)
    if wanted == 1:
        raise ConfigError("a classifier with one label decides nothing; only those with two or more are imported")
    return Head(task="multiclass", labels=names)


def _pooling(params: dict[str, Any]) -> PoolingSpec:
    with _params_errors():
        return PoolingSpec.model_validate({"pooling_strategy": params.get("pooling_strategy", "mean")})


def _chunks(params: dict[str, Any], special: SpecialTokens) -> ChunkSpec:
    """Windows; what is truncated reads the first one."""
    if "chunk_size" not in params:
        size = TRUNCATED_TOKENS - special.num_tokens
        return ChunkSpec(chunk_size=size, stride=size, selection="head")
    names = ("chunk_size", "stride", "minimal_chunk_length", "maximal_text_length")
    with _params_errors():
        return ChunkSpec.model_validate({name: params[name] for name in names if name in params})


@contextmanager
def _params_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{PARAMS}: {where}: {first['msg']}, got {first['input']!r}") from None


def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    if not any((Path(folder) / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one
        raise ConfigError(f"{folder}: no tokenizer there (none of {', '.join(VOCABULARIES)})")
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no tokenizer there: {str(error).splitlines()[0]}") from error


def _model_type(module: str) -> str:
    """What transformers calls a model whose config is of a module: xlm_roberta is that of xlm-roberta."""
    return module if module in CONFIG_MAPPING else module.replace("_", "-")


def _model(network: _Part, head: Head, pooling: PoolingSpec, *, where: str) -> ChunkModel:
    """The body and head of a network's weights.

    Raises:
        ConfigError: they do not make a model.
    """
    weights = dict(_weights(network, ""))
    pickled = vars(network).get("_modules", {}).get("model")
    config = vars(pickled).get("config") if isinstance(pickled, _Part) else None
    if not isinstance(config, _Part):
        raise ConfigError(f"{where}: the network has no encoder with a config")
    kind = _model_type(config.pickled_as.split(".")[2])
    plain = {name: value for name, value in vars(config).items() if not name.startswith("_") and _is_plain(value)}
    plain.pop("model_type", None)
    try:
        body = AutoModel.from_config(AutoConfig.for_model(kind, **plain), dtype=torch.float32)  # type: ignore[no-untyped-call]
        body.pooler = None
        model = ChunkModel(body, num_logits=head.num_logits, pooling=pooling)
        mine = {name.removeprefix("model."): weight.float() for name, weight in weights.items()}
        missing, _ = body.load_state_dict(
            {name: weight for name, weight in mine.items() if not name.startswith(("linear.", "pooler."))}, strict=False
        )
        model.head.linear.load_state_dict({name: mine[f"linear.{name}"] for name in ("weight", "bias")})
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: its weights make no {kind} model: {str(error).splitlines()[0]}") from error
    if missing:
        raise ConfigError(f"{where}: lacks weights of a {kind} model: {', '.join(missing[:MOST_NAMES])}")
    return model.eval()


def _weights(part: _Part, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, as of `state_dict`."""
    held = vars(part)
    passing = held.get("_non_persistent_buffers_set", set())
    for name, weight in [*held.get("_parameters", {}).items(), *held.get("_buffers", {}).items()]:
        if isinstance(weight, Tensor) and name not in passing:
            yield f"{prefix}{name}", weight.detach()
    for name, inner in held.get("_modules", {}).items():
        if isinstance(inner, _Part):
            yield from _weights(inner, f"{prefix}{name}.")


def _is_plain(value: object) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
