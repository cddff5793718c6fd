"""Which numbers dropout drops: a hash of the key of a row and of the place in it, and nothing else.

Random bits by counting instead of by a stream: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; the
mixing is multiply-and-shift hashing.

Shape letters: R rows of a tensor (all but its last dimension).
"""

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose products wrap
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_PLACE, _LOW, _HIGH = 0x9E3779B9 - 2**32, 0x21F0AAAD, 0x735A2D97  # as int32
_KERNELS = {torch.float32: "belt_drop_fp32", torch.bfloat16: "belt_drop_bf16"}


def mixed(*parts: Tensor | int) -> Tensor:
    """One int64 from several, by SplitMix64's finish after each (Steele et al. 2014); tensors broadcast."""
    found = torch.zeros((), dtype=torch.int64)
    for part in parts:
        found = (found.to(part.device) if isinstance(part, Tensor) else found) * 31 + part + _GOLDEN
        found = (found ^ _shifted(found, 30)) * _FIRST
        found = (found ^ _shifted(found, 27)) * _SECOND
        found = found ^ _shifted(found, 31)
    return found


def dropped(values: Tensor, key_R: Tensor, p: float) -> Tensor:
    """Numbers divided by 1 - p, or zero with probability p.

    Args:
        values: any float dtype; R is the product of all its dimensions but the last.
        key_R: of its rows, int64.
        p: from 0 to 1.
    """
    return _drop(values.contiguous(), torch.empty(values.shape, dtype=values.dtype, device=values.device), key_R, p)


def drop_(values: Tensor, key_R: Tensor, p: float) -> Tensor:
    """As `dropped`, in the place of the numbers, which lie one behind the other."""
    return _drop(values, values, key_R, p)


def _drop(values: Tensor, output: Tensor, key_R: Tensor, p: float) -> Tensor:
    scale, threshold, size = 1.0 / (1.0 - p), min(round(p * 2**32), 2**32 - 1), values.shape[-1]
    kernel = _load_kernel() if values.device.type == "cpu" else None
    if kernel is None:
        is_kept = (_bits(key_R, size) >= threshold - 2**31).view(values.shape)
        return torch.mul(values * scale, is_kept, out=output)
    key_R = key_R.contiguous()
    if values.dtype in _KERNELS:
        drop = getattr(kernel, _KERNELS[values.dtype])
        drop(values.data_ptr(), output.data_ptr(), key_R.data_ptr(), len(key_R), size, threshold, scale)
        return output
    mask = torch.empty(values.shape, dtype=torch.bool)
    kernel.belt_keep(mask.data_ptr(), key_R.data_ptr(), len(key_R), size, threshold)
    return torch.mul(values * scale, mask, out=output)


def _bits(key_R: Tensor, size: int) -> Tensor:
    """32 bits of each number, as int32 whose order is that of the unsigned number less 2^31: [R, size]."""
    low_R1 = key_R.to(torch.int32)[:, None]
    high_R1 = (key_R >> 32).to(torch.int32)[:, None]
    bits = low_R1 + torch.arange(size, dtype=torch.int32, device=key_R.device) * _PLACE
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * _LOW ^ high_R1
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * _HIGH
    return torch.bitwise_xor(bits ^ (bits >> 15 & 0x1FFFF), -(2**31))


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shifted right as if it were unsigned."""
    return torch.bitwise_and(torch.bitwise_right_shift(values, by), 2 ** (64 - by) - 1)


@functools.cache
def _load_kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where belt was installed without a C compiler."""
    spec = importlib.util.find_spec("belt_tasks._dropout_cpu")
    if spec is None or spec.origin is None:
        return None
    kernel = ctypes.CDLL(spec.origin)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for name in _KERNELS.values():
        getattr(kernel, name).argtypes = [pointer, pointer, pointer, number, number, ctypes.c_uint32, ctypes.c_float]
    kernel.belt_keep.argtypes = [pointer, pointer, number, number, ctypes.c_uint32]
    return kernel
