"""Encoders: Hugging Face bodies with belt's head, or finished classifiers with their own.

Everything about a model is asked of its config and modules, never assumed: special tokens, padding id, hidden size
and how many positions it can read. Weights are safetensors; code from a model repository never runs.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from belt_tasks import storage
from belt_tasks.errors import ConfigError
from belt_tasks.specs import ChunkSpec, Head, PoolingSpec
from belt_tasks.tokens import SpecialTokens, model_files


class ChunkHead(nn.Module):
    """A linear head on the first token; for attention pooling it also scores the chunk."""

    def __init__(self, hidden_size: int, *, num_logits: int, pooling: PoolingSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_logits)
        self.attention = (
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 1))
            if pooling.pooling_strategy == "attention"
            else None
        )

    def forward(self, first_token_BH: Tensor) -> Tensor:
        """Chunk outputs [B, K]: L logits and, for attention pooling, one score behind them."""
        logits_BL: Tensor = self.linear(first_token_BH)
        if self.attention is None:
            return logits_BL
        return torch.cat([logits_BL, self.attention(first_token_BH)], dim=1)


class ChunkModel(nn.Module):
    """An encoder body and belt's head: chunks in, chunk outputs out."""

    def __init__(self, body: PreTrainedModel, *, num_logits: int, pooling: PoolingSpec) -> None:
        super().__init__()
        self.body = body
        self.head = ChunkHead(body.config.hidden_size, num_logits=num_logits, pooling=pooling)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Chunk outputs [B, K]."""
        output = self.body(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
        outputs_BK: Tensor = self.head(output.last_hidden_state[:, 0])
        return outputs_BK


class FinishedClassifier(nn.Module):
    """A fine-tuned `AutoModelForSequenceClassification` as it is, with its own head."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Chunk logits [B, L]."""
        logits: Tensor = self.classifier(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits
        return logits


def load_body(source: str | Path, *, dropout: float | None = None) -> PreTrainedModel:
    """The encoder body of a local directory or hub name, in fp32.

    Args:
        source: where it is.
        dropout: for every dropout that the config names; None keeps them.

    Raises:
        ConfigError: there is none, or its weights are not safetensors.
    """
    with model_files(source):
        config = AutoConfig.from_pretrained(source)
        if dropout is not None:
            for name, value in config.to_dict().items():
                if "dropout" in name and isinstance(value, float | int):
                    setattr(config, name, dropout)
        body: PreTrainedModel = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True
        )
    if getattr(body, "pooler", None) is not None:
        # belt's head reads the first token itself; this layer would cost time and learn nothing
        setattr(body, "pooler", None)  # noqa: B010 - the attribute is declared as a module
    if not isinstance(getattr(body.config, "hidden_size", None), int):
        raise ConfigError(
            f"{source}: a {body.config.model_type} model has no hidden_size, so belt cannot put a head on it"
        )
    return body


def load_finished_classifier(source: str | Path) -> tuple[FinishedClassifier, Head]:
    """A finished sequence classifier and the head that its config describes.

    Raises:
        ConfigError: there is none, or its weights are not safetensors.
    """
    head = finished_head(source)
    with model_files(source):
        classifier = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True
        )
    return FinishedClassifier(classifier), head


def finished_head(source: str | Path) -> Head:
    """The head that a finished classifier's config describes, without reading its weights.

    Raises:
        ConfigError: there is no config, or it describes an encoder without a head.
    """
    with model_files(source):
        config = AutoConfig.from_pretrained(source)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ConfigError(
            f"{source}: an encoder without a head (no belt.json, and config.json names no *ForSequenceClassification); "
            "fine-tune it first"
        )
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    if config.problem_type == "regression" or config.num_labels == 1:
        return Head(task="regression", labels=labels)
    return Head(
        task="multilabel" if config.problem_type == "multi_label_classification" else "multiclass", labels=labels
    )


def num_positions(model: nn.Module) -> int | None:
    """Most tokens, special ones included, that the encoder can read at once; None where there is no such limit.

    RoBERTa and MPNet number positions from padding_idx + 1, so they read fewer tokens than their table has rows.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    pretrained = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return getattr(pretrained.config, "max_position_embeddings", None)


def num_positions_of_source(source: str | Path) -> int | None:
    """The same of a local directory or hub name, from its config alone: no weight is read."""
    with model_files(source):
        config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        return num_positions(AutoModel.from_config(config))  # type: ignore[no-untyped-call]


def source_fingerprint(source: str | Path) -> str:
    """What tells one encoder from another: the digest of a local directory's files, or a hub name's commit."""
    folder = Path(source)
    if folder.is_dir():
        return storage.sha256_of_files(folder, [path.name for path in folder.iterdir() if path.is_file()])
    with model_files(source):
        return f"{source}@{AutoConfig.from_pretrained(source)._commit_hash}"  # noqa: SLF001 - its only home


def check_chunk_size(chunks: ChunkSpec, special: SpecialTokens, readable: int | None, *, source: str) -> None:
    """Refuse chunks that the encoder cannot read.

    Raises:
        ConfigError: chunk_size plus special tokens exceeds the encoder's positions.
    """
    if readable is not None and chunks.chunk_size + special.num_tokens > readable:
        raise ConfigError(
            f"chunk_size must be at most {readable - special.num_tokens} for {source} (it reads {readable} tokens, "
            f"{special.num_tokens} of them special), got {chunks.chunk_size}"
        )


def device_name(device: torch.device) -> str:
    """What people call a device: `cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_device(device: str) -> torch.device:
    """The device that a spec names; `auto` is CUDA where there is one, otherwise the CPU.

    Raises:
        ConfigError: it is not a device, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen
