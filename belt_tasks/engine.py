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

from belt_tasks import encoder, packed_cpu, packed_gpu, packed_modern
from belt_tasks.batches import MiniBatch
from belt_tasks.errors import ConfigError
from belt_tasks.families import body_and_head, read_weights
from belt_tasks.specs import Precision

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# how far the packed forward's outputs may be from the model's own in fp32, relative to the largest if that is above 1
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.05}

CPU_BATCH_TOKENS = 1024
LONGEST_CHECKED = 264  # tokens; more than a block of any kernel
# a GPU's mini-batches: as large as memory allows, up to where larger ones are no faster
MOST_GPU_TOKENS = 65_536
PROBE_TOKENS = 4096
MEMORY_SHARE = 0.8


class ChunkEncoder(Protocol):
    """Chunks in, chunk outputs out; safe to call from several threads."""

    device: torch.device
    batch_tokens: int
    """Tokens of a mini-batch that serve it best."""
    pads: bool
    """Whether it computes padding: chunks x longest chunk positions rather than those of the tokens alone."""

    def encode(self, batch: MiniBatch) -> Tensor:
        """Chunk outputs, float32 [B, K] on the device, possibly still being computed."""
        ...


class Forward(Protocol):
    """What a packed forward does."""

    def first_tokens(self, batch: MiniBatch) -> Tensor:
        """The last hidden state of each chunk's first token, float32 [B, H] on the device."""
        ...


class PlainEncoder:
    """The model's own forward, on padded chunks."""

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.batch_tokens = CPU_BATCH_TOKENS
        self.pads = True
        weight = next(model.parameters())
        is_there = (weight.device.type, weight.dtype) == (device.type, dtype)
        self._model = model if is_there else copy.deepcopy(model).to(device=device, dtype=dtype)

    def encode(self, batch: MiniBatch) -> Tensor:
        """See `ChunkEncoder`."""
        input_ids_BT, attention_mask_BT = (packed_gpu.send(part, self.device) for part in batch.padded())
        outputs_BK: Tensor = self._model(input_ids_BT, attention_mask_BT)
        return outputs_BK.float()


class PackedEncoder:
    """A packed forward, and the model's head in fp32."""

    def __init__(self, forward: Forward, head: nn.Module, *, device: torch.device) -> None:
        self.device = device
        self.batch_tokens = CPU_BATCH_TOKENS
        self.pads = False
        self._forward = forward
        self._head = head if device.type == "cpu" else copy.deepcopy(head).to(device)

    def encode(self, batch: MiniBatch) -> Tensor:
        """See `ChunkEncoder`."""
        outputs_BK: Tensor = self._head(self._forward.first_tokens(batch))
        return outputs_BK


def build_encoder(model: nn.Module, *, device: torch.device, precision: Precision) -> ChunkEncoder:
    """The fastest encoder for a model that agrees with its own forward, with a budget that fits the device.

    Args:
        model: maps (input_ids [B, T], attention_mask [B, T]) to chunk outputs [B, K]; in eval mode, fp32.
        device: where to encode.
        precision: of weights and activations; the head is always fp32 on the packed path.
    """
    chosen: ChunkEncoder | None = _packed_encoder(model, device, DTYPES[precision])
    if chosen is not None:
        difference = largest_difference(chosen, PlainEncoder(model, device=device, dtype=torch.float32), model)
        if not difference <= TOLERANCE[precision]:
            log.warning(
                "the packed forward differs from the model's own by %.2g in %s, so the slower one is used",
                difference,
                precision,
            )
            chosen = None
    if chosen is None:
        chosen = PlainEncoder(model, device=device, dtype=DTYPES[precision])
    if device.type == "cuda":
        chosen.batch_tokens = measured_batch_tokens(chosen, model)
    return chosen


def _packed_encoder(model: nn.Module, device: torch.device, dtype: torch.dtype) -> PackedEncoder | None:
    body, head = body_and_head(model)
    if body is None or head is None:
        return None
    weights = read_weights(body)
    forward: Forward | None = None
    if device.type == "cpu" and packed_cpu.supported(dtype):
        if weights is not None:
            forward = packed_cpu.PackedCpuForward(weights, dtype)
        elif packed_modern.supported(body):
            forward = packed_modern.PackedModernForward(body, dtype)
    elif device.type == "cuda" and weights is not None and packed_gpu.supported(weights, device, dtype):
        forward = packed_gpu.PackedGpuForward(weights, device=device, dtype=dtype)
    return None if forward is None else PackedEncoder(forward, head, device=device)


def largest_difference(fast: ChunkEncoder, plain: ChunkEncoder, model: nn.Module) -> float:
    """Between two encoders' outputs for some chunks, relative to the largest output if that is above 1."""
    longest = min(encoder.num_positions(model) or LONGEST_CHECKED, LONGEST_CHECKED)
    batch = probe([longest, max(longest // 3, 2), 2], model)
    with torch.inference_mode():
        expected_BK = plain.encode(batch)
        difference = (fast.encode(batch) - expected_BK).abs().max() / expected_BK.abs().max().clamp_min(1.0)
    return float(difference)


def measured_batch_tokens(chosen: ChunkEncoder, model: nn.Module) -> int:
    """Tokens of the largest mini-batch that the GPU's free memory holds, from what two smaller ones took."""
    longest = min(encoder.num_positions(model) or PROBE_TOKENS, PROBE_TOKENS)
    sizes = [longest * max(factor * PROBE_TOKENS // longest, factor) for factor in (1, 2)]
    peaks = []
    with torch.inference_mode():
        for size in sizes:
            torch.cuda.synchronize(chosen.device)
            before = torch.cuda.memory_allocated(chosen.device)
            torch.cuda.reset_peak_memory_stats(chosen.device)
            chosen.encode(probe([longest] * (size // longest), model))
            torch.cuda.synchronize(chosen.device)
            peaks.append(torch.cuda.max_memory_allocated(chosen.device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(chosen.device)
    return budget_of_memory(sizes, peaks, free=free, longest=longest)


def budget_of_memory(sizes: list[int], peaks: list[int], *, free: int, longest: int) -> int:
    """Tokens whose memory fits, on the line through two measurements.

    Args:
        sizes: tokens of a smaller and a larger mini-batch.
        peaks: bytes that each of them took.
        free: bytes.
        longest: tokens of the longest chunk; never less.
    """
    per_token = max((peaks[1] - peaks[0]) / (sizes[1] - sizes[0]), 1.0)
    fixed = max(peaks[0] - per_token * sizes[0], 0.0)
    return max(longest, min(MOST_GPU_TOKENS, int((MEMORY_SHARE * free - fixed) / per_token)))


def probe(lengths: list[int], model: nn.Module) -> MiniBatch:
    """A mini-batch of random tokens."""
    vocabulary = _vocabulary(model)
    num_tokens_B = np.array(lengths)
    # the upper half of a vocabulary holds no special tokens, whatever the family
    ids_T = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, num_tokens_B.sum())
    return MiniBatch(
        rows_B=np.arange(len(lengths)), input_ids_T=torch.from_numpy(ids_T), num_tokens_B=num_tokens_B, pad_id=0
    )


def _vocabulary(model: nn.Module) -> int:
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    return embedding.num_embeddings


def choose_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """The precision that a spec names; None is fp32 on a CPU and bf16, or fp16 where that is missing, on a GPU.

    Raises:
        ConfigError: the device has no fast instructions for it.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise ConfigError("precision must be fp32 or bf16 on a CPU, got 'fp16'")
        if wanted == "bf16" and not packed_cpu.has_bf16():
            raise ConfigError(
                "precision bf16 needs a processor with avx512_bf16 or AMX, which this one lacks: it would be slower "
                "than fp32 and less exact"
            )
        return wanted or "fp32"
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not has_bf16:
        raise ConfigError(f"precision bf16: {torch.cuda.get_device_name(device)} has none; choose fp16")
    return wanted or ("bf16" if has_bf16 else "fp16")
