"""Cost: the floating-point operations that a result needs, and what a device could do at best."""

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

# Dense bf16 and fp16 matrix products, FLOP/s, as the makers' data sheets give them, by a part of the device's name.
GPU_PEAKS = {
    "H200": 989e12,
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
    attended = sum(float((num_tokens_C * span_C).sum()) for span_C in _attended(config, num_tokens_C, num_layers - 1))
    inner_layers = (num_layers - 1) * num_tokens * per_token + 4 * attended * hidden
    if rotates:
        seen = float(_attended(config, num_tokens_C, num_layers)[-1].sum())
        last_layer = 4 * seen * hidden**2 + 4 * seen * hidden + len(num_tokens_C) * (per_token - 4 * hidden**2)
    else:
        last_layer = 4 * num_tokens * hidden * num_heads + len(num_tokens_C) * per_token
    return float(inner_layers + last_layer)


def peak_flops(device_name: str | None, precision: str | None) -> float | None:
    """What a device multiplies at best, FLOP/s; None where belt does not know."""
    if device_name is None or precision not in ("bf16", "fp16"):
        return None
    return next((peak for name, peak in GPU_PEAKS.items() if name in device_name), None)


def _attended(config: object, num_tokens_C: Int64, num_layers: int) -> list[Int64]:
    """How many tokens a token of each chunk attends to, layer by layer."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(config, "local_attention", None)
    return [
        num_tokens_C if kind == "full_attention" or window is None else np.minimum(num_tokens_C, window + 1)
        for kind in kinds[:num_layers]
    ]
