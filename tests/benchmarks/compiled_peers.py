"""Peers that run the exported model: ONNX Runtime and OpenVINO, over sorted batches of a token budget.

Neither says how many requests at once and how large a batch are best on a CPU, so each tries a few.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from belt_tasks.batches import plan_batches
from tests.benchmarks import documents
from tests.benchmarks.documents import Int64
from tests.benchmarks.protocol import Configurations, Precision, Score, Setup, UnavailableError, Work

ONNX_NAME, OPENVINO_NAME = "model.onnx", "model.xml"
INPUT_NAMES = ["input_ids", "attention_mask"]
MAX_BATCH_TOKENS = (512, 2048)

Logits = npt.NDArray[np.float32]


class Exported(nn.Module):
    """What is exported: token ids and mask to chunk logits."""

    def __init__(self, checkpoint: str, *, attention: str) -> None:
        super().__init__()
        from tests.benchmarks import torch_peers

        self.body, self.linear = torch_peers.load_encoder(checkpoint, attention=attention)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Chunk logits, [B, L]."""
        body = self.body(input_ids=input_ids, attention_mask=attention_mask)
        logits_BL: Tensor = self.linear(body.last_hidden_state[:, 0])
        return logits_BL


def export_onnx(setup: Setup) -> None:
    """Write the model for ONNX Runtime.

    With eager attention and the exporter that traces: the one graph in which ONNX Runtime recognises attention and
    fuses it, twice as fast as what it makes of the others.
    """
    torch.onnx.export(
        Exported(setup.checkpoint, attention="eager").eval(),
        _example(setup.checkpoint),
        str(Path(setup.exports) / ONNX_NAME),
        input_names=INPUT_NAMES,
        output_names=["logits"],
        dynamic_axes={name: {0: "chunks", 1: "tokens"} for name in INPUT_NAMES} | {"logits": {0: "chunks"}},
        opset_version=17,
        dynamo=False,
    )


def export_openvino(setup: Setup) -> None:
    """Write the model for OpenVINO, through its own reader of PyTorch models, which keeps attention whole."""
    openvino = _import_openvino()
    model = Exported(setup.checkpoint, attention="sdpa").eval()
    converted = openvino.convert_model(model, example_input=_example(setup.checkpoint))
    openvino.save_model(converted, Path(setup.exports) / OPENVINO_NAME, compress_to_fp16=False)


def onnxruntime(setup: Setup) -> Configurations:
    """ONNX Runtime: all threads in one request, or one request per thread."""
    import onnxruntime as ort

    def configured(num_requests: int, max_batch_tokens: int) -> Score:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = max(setup.num_threads // num_requests, 1)
        options.enable_mem_pattern = False  # a pattern is good for one shape, and shapes vary
        path = str(Path(setup.exports) / ONNX_NAME)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(inputs: tuple[Int64, Int64]) -> Logits:
            logits_BL: Logits = session.run(None, dict(zip(INPUT_NAMES, inputs, strict=True)))[0]
            return logits_BL

        def run_all(batches: Iterator[tuple[Int64, tuple[Int64, Int64]]], logits_CL: Logits) -> None:
            def one(batch: tuple[Int64, tuple[Int64, Int64]]) -> None:
                logits_CL[batch[0]] = run(batch[1])

            if num_requests == 1:
                for batch in batches:
                    one(batch)
                return
            with ThreadPoolExecutor(num_requests) as pool:
                list(pool.map(one, batches))

        return _sorted_batches(setup, max_batch_tokens, run_all)

    return {
        f"{requests} x {setup.num_threads // requests} threads, {budget} tokens": (
            lambda requests=requests, budget=budget: configured(requests, budget)
        )
        for requests in sorted({1, setup.num_threads})
        for budget in MAX_BATCH_TOKENS
    }


def openvino(setup: Setup, *, precision: Precision) -> Configurations:
    """OpenVINO: its latency hint, one request at a time, or its throughput hint, as many as it likes.

    Raises:
        UnavailableError: the processor computes no bf16.
    """
    ov = _import_openvino()
    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this CPU computes no bf16")

    def configured(hint: str, max_batch_tokens: int) -> Score:
        settings = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": setup.num_threads,
        }
        compiled = core.compile_model(core.read_model(Path(setup.exports) / OPENVINO_NAME), "CPU", settings)

        def run_all(batches: Iterator[tuple[Int64, tuple[Int64, Int64]]], logits_CL: Logits) -> None:
            def keep(request: "ov.InferRequest", rows_B: Int64) -> None:
                logits_CL[rows_B] = request.get_output_tensor(0).data

            requests = ov.AsyncInferQueue(compiled)
            requests.set_callback(keep)
            for rows_B, inputs in batches:
                requests.start_async(dict(enumerate(inputs)), rows_B)
            requests.wait_all()

        return _sorted_batches(setup, max_batch_tokens, run_all)

    return {
        f"{hint.lower()} hint, {budget} tokens": (lambda hint=hint, budget=budget: configured(hint, budget))
        for hint in ("LATENCY", "THROUGHPUT")
        for budget in MAX_BATCH_TOKENS
    }


def _sorted_batches(
    setup: Setup,
    max_batch_tokens: int,
    run_all: Callable[[Iterator[tuple[Int64, tuple[Int64, Int64]]], Logits], None],
) -> Score:
    """Score with a function that writes the logits of (rows, inputs) where they belong."""

    def score(work: Work) -> None:
        chunks = documents.cut(work, setup.checkpoint)
        plan = plan_batches(chunks.num_tokens_C, max_batch_tokens=max_batch_tokens)
        num_labels = documents.num_labels(setup.checkpoint)
        logits_CL = np.empty((chunks.windows.num_chunks, num_labels), dtype=np.float32)
        run_all(((rows_B, chunks.padded(rows_B)) for rows_B in plan), logits_CL)
        probabilities_DL = documents.pool(logits_CL, chunks.windows.doc_of_chunk_C, len(chunks.doc_ids))
        documents.write_scores(work.output, chunks.doc_ids, probabilities_DL)

    return score


def _example(checkpoint: str) -> tuple[Tensor, Tensor]:
    """Two chunks of different lengths, so that nothing about either is taken for fixed."""
    special = documents.tokenizer_of(checkpoint).special
    short = [*special.prefix_ids, *special.suffix_ids]
    long = [*special.prefix_ids, *special.suffix_ids * 7]
    padding = len(long) - len(short)
    input_ids_BT = torch.tensor([long, short + [special.pad_id] * padding])
    attention_mask_BT = torch.tensor([[1] * len(long), [1] * len(short) + [0] * padding])
    return input_ids_BT, attention_mask_BT


def _import_openvino():
    # OpenVINO reports its use to its maker, and leaves files in the home folder, unless this module is missing
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino
