"""Cost: the floating-point operations that a result needs, and what a device could do at best."""

import re

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

# Dense bf16 and fp16 matrix products, FLOP/s, as the makers' data sheets give them, by words of the device's name.
GPU_PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
}


def needed_flops(config: object, num_tokens_C: Int64) -> float | None:
    """Floating-point operations that first-token outputs of some chunks need; one multiply-add is two.

    Matrix products only, and only those that no exact method can leave out: of the last layer just the first token,
    whose scores and weighted sum can be taken over the layer's inputs, without keys and values, unless positions are
    rotations (ModernBERT), which come between a token's input and its key.

    Args:
        config: the encoder's.
        num_tokens_C: tokens of each chunk, special tokens included, padding excluded.

    Returns:
        None where the config does not say how large the encoder is.
    """
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    num_heads = getattr(config, "num_attention_heads", None)
    if hidden is None or inner is None or num_layers is None or num_heads is None:
        return None
    rotates = getattr(config, "model_type", None) == "modernbert"
    num_maps = 3 if rotates else 2  # its feed-forward is gated
    per_token = 2 * (4 * hidden**2 + num_maps * hidden * inner)
    num_tokens = float(num_tokens_C.sum())
    windows = _windows(config, num_layers)
    pairs = sum(float(_pairs(num_tokens_C, window).sum()) for window in windows[:-1])
    inner_layers = (num_layers - 1) * num_tokens * per_token + 4 * pairs * hidden
    if rotates:
        seen = float((num_tokens_C if windows[-1] is None else np.minimum(num_tokens_C, windows[-1] + 1)).sum())
        last_layer = 4 * seen * hidden**2 + 4 * seen * hidden + len(num_tokens_C) * (per_token - 4 * hidden**2)
    else:
        last_layer = 4 * num_tokens * hidden * num_heads + len(num_tokens_C) * per_token
    return float(inner_layers + last_layer)


def peak_flops(device_name: str | None, precision: str | None) -> float | None:
    """What a device multiplies at best, FLOP/s; None where belt does not know."""
    if device_name is None or precision not in ("bf16", "fp16"):
        return None
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [name for name in GPU_PEAKS if words >= set(name.split())]
    return GPU_PEAKS[max(known, key=len)] if known else None


def _windows(config: object, num_layers: int) -> list[int | None]:
    """How far a token of each layer sees to either side; None is all the way."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    return [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]


def _pairs(num_tokens_C: Int64, window: int | None) -> Int64:
    """Pairs of tokens of which one sees the other, in each chunk."""
    if window is None:
        return num_tokens_C**2
    reach_C = np.minimum(window, num_tokens_C - 1)
    pairs_C: Int64 = num_tokens_C * (2 * reach_C + 1) - reach_C * (reach_C + 1)
    return pairs_C
