"""The machine's own limit: floating-point operations per second in matrix products of the model's own shapes.

With nothing around them, on all cores: the faster of PyTorch's linear and a pre-packed oneDNN one. No peer can do
better without computing something else.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from transformers import AutoConfig

from tests.benchmarks.protocol import Setup

MEASURE_S = 0.02
NUM_ROWS = (512, 2048)  # tokens per product: some kernels prefer what fits the cache
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Product = Callable[[], object]


def ceiling(setup: Setup) -> Callable[[], dict[str, float | None]]:
    """A measurement of operations per second by precision, None where the CPU does not compute in it."""
    config = AutoConfig.from_pretrained(setup.checkpoint)
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or config.hidden_dim
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    computed = {"fp32": True, "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported()}

    def measure() -> dict[str, float | None]:
        return {
            name: flops_per_s(shapes, dtype, num_threads=setup.num_threads) if computed[name] else None
            for name, dtype in DTYPES.items()
        }

    return measure


def flops_per_s(shapes: list[tuple[int, int]], dtype: torch.dtype, *, num_threads: int) -> float:
    """Operations per second over matrix products of some shapes, each at its best, weighted by their operations."""
    weights = [columns * rows for columns, rows in shapes]
    rates = [_best_rate(*shape, dtype, num_threads) for shape in shapes]
    return sum(weights) / sum(weight / rate for weight, rate in zip(weights, rates, strict=True))


def _best_rate(columns: int, rows: int, dtype: torch.dtype, num_threads: int) -> float:
    best = 0.0
    for num_rows in NUM_ROWS:
        for products in _products(columns, rows, num_rows, dtype, num_threads):
            flops = 2.0 * num_rows * columns * rows
            best = max(best, flops * _one_by_one(products[0], num_threads), flops * _side_by_side(products))
    torch.set_num_threads(num_threads)
    return best


def _products(columns: int, rows: int, num_rows: int, dtype: torch.dtype, num: int) -> list[list[Product]]:
    """Ways to form a product, each once per thread: own inputs, the same weights."""
    weight = torch.randn(rows, columns).to(dtype)
    bias = torch.zeros(rows, dtype=dtype)
    inputs = [torch.randn(num_rows, columns).to(dtype) for _ in range(num)]
    ways = [[lambda x=x: torch.nn.functional.linear(x, weight, bias) for x in inputs]]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        ways.append([lambda x=x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "") for x in inputs])
    return ways


def _one_by_one(product: Product, num_threads: int) -> float:
    """Products per second, all threads in each."""
    torch.set_num_threads(num_threads)
    return _per_second(product)


def _side_by_side(products: list[Product]) -> float:
    """Products per second, one thread in each."""
    if len(products) == 1:
        return 0.0  # the same as one by one
    barrier = Barrier(len(products))

    def run(product: Product) -> float:
        torch.set_num_threads(1)
        barrier.wait()
        return _per_second(product)

    torch.set_num_threads(1)
    with ThreadPoolExecutor(len(products)) as pool:
        return sum(pool.map(run, products))


def _per_second(product: Product) -> float:
    with torch.inference_mode():
        product()
        started, num = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < MEASURE_S:
            product()
            num += 1
    return num / elapsed
