"""The engine: mini-batches of chunks to chunk outputs, by the fastest way that is right for a model and a device.

Every way is a `ChunkEncoder`. `build_encoder` chooses one: the packed forward where the encoder's family, the device
and the precision have one and it agrees with the model's own forward, otherwise that forward itself.
"""

import copy
import logging
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from belt_tasks import packed
from belt_tasks.batches import MiniBatch
from belt_tasks.errors import ConfigError
from belt_tasks.families import EncoderWeights, read_weights
from belt_tasks.specs import Precision

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_TOKENS = 2048
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.05}


class ChunkEncoder(Protocol):
    """Chunks in, chunk outputs out; safe to call from several threads."""

    device: torch.device
    batch_tokens: int
    """Tokens of a mini-batch that serve it best."""
    pads: bool
    """Whether it computes padding: chunks x longest chunk positions rather than those of the tokens alone."""

    def encode(self, batch: MiniBatch) -> Tensor:
        """Chunk outputs, float32 [B, K] on the device."""
        ...


class PlainEncoder:
    """The model's own forward, on padded chunks."""

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.batch_tokens = BATCH_TOKENS
        self.pads = True
        weight = next(model.parameters())
        is_there = (weight.device.type, weight.dtype) == (device.type, dtype)
        self._model = model if is_there else copy.deepcopy(model).to(device=device, dtype=dtype)

    def encode(self, batch: MiniBatch) -> Tensor:
        """See `ChunkEncoder`."""
        input_ids_BT, attention_mask_BT = batch.padded()
        outputs_BK: Tensor = self._model(
            input_ids_BT.to(self.device, non_blocking=True), attention_mask_BT.to(self.device, non_blocking=True)
        )
        return outputs_BK.float()


class PackedCpuEncoder:
    """The packed forward on the CPU, and the model's head in fp32."""

    def __init__(self, weights: EncoderWeights, *, dtype: torch.dtype) -> None:
        self.device = torch.device("cpu")
        self.batch_tokens = BATCH_TOKENS
        self.pads = False
        self._encoder = packed.PackedEncoder(weights, dtype)
        self._head = weights.head

    def encode(self, batch: MiniBatch) -> Tensor:
        """See `ChunkEncoder`."""
        outputs_BK: Tensor = self._head(self._encoder.first_tokens(batch))
        return outputs_BK


def build_encoder(model: nn.Module, *, device: torch.device, precision: Precision) -> ChunkEncoder:
    """The fastest encoder for a model that agrees with its own forward.

    Args:
        model: maps (input_ids [B, T], attention_mask [B, T]) to chunk outputs [B, K]; in eval mode, fp32, on the CPU.
        device: where to encode.
        precision: of weights and activations; the head is always fp32 on the packed path.
    """
    dtype = DTYPES[precision]
    weights = read_weights(model) if device.type == "cpu" and packed.supported(dtype) else None
    if weights is not None:
        fast = PackedCpuEncoder(weights, dtype=dtype)
        difference = largest_difference(fast, PlainEncoder(model, device=device, dtype=torch.float32), weights)
        if difference <= TOLERANCE[precision]:
            return fast
        log.warning(
            "the packed forward differs from the model's own by %.2g in %s, so the slower one is used",
            difference,
            precision,
        )
    return PlainEncoder(model, device=device, dtype=dtype)


def largest_difference(fast: ChunkEncoder, plain: ChunkEncoder, weights: EncoderWeights) -> float:
    """Between two encoders' outputs for some chunks of random tokens, relative to the largest output if that is > 1."""
    rng = np.random.default_rng(0)
    longest = min(len(weights.position_PH), packed.LONG + 8)
    num_tokens_B = np.array([longest, max(longest // 3, 2), 2])
    batch = MiniBatch(
        rows_B=np.arange(3),
        input_ids_T=torch.from_numpy(rng.integers(len(weights.word_VH) // 2, len(weights.word_VH), num_tokens_B.sum())),
        num_tokens_B=num_tokens_B,
        pad_id=0,
    )
    with torch.inference_mode():
        expected_BK = plain.encode(batch)
        difference = (fast.encode(batch) - expected_BK).abs().max() / expected_BK.abs().max().clamp_min(1.0)
    return float(difference)


def choose_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """The precision that a spec names; None is fp32 on a CPU and bf16, or fp16 where that is missing, on a GPU.

    Raises:
        ConfigError: the device has no fast instructions for it.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise ConfigError("precision must be fp32 or bf16 on a CPU, got 'fp16'")
        if wanted == "bf16" and not packed.has_bf16():
            raise ConfigError(
                "precision bf16 needs a processor with avx512_bf16 or AMX, which this one lacks: it would be slower "
                "than fp32 and less exact"
            )
        return wanted or "fp32"
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not has_bf16:
        raise ConfigError(f"precision bf16: {torch.cuda.get_device_name(device)} has none; choose fp16")
    return wanted or ("bf16" if has_bf16 else "fp16")
