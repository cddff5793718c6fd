"""The peers: ways to score the same corpus with the same model and the same windows, each as its users would.

A peer is given its best honest configuration: all cores, its own batching, and where it has settings that matter,
those that are fastest on a probe of the very corpus (see `protocol.Configurations`). What is not the same is noted.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.protocol import Configurations, Precision, Setup


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to score."""

    title: str
    load: str
    """MODULE:FUNCTION that loads the model; imported and called in the peer's own process alone."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    precision: Precision = "fp32"
    first_window_only: bool = False
    """Reads the first window of each document and nothing else: less work than the others."""
    export: str | None = None
    """The entry of `EXPORTS` that it needs."""
    in_default: bool = True
    """Part of a run without --peers and --full."""
    note: str = ""


EXPORTS = {
    "export-onnx": "compiled_peers:export_onnx",
    "export-openvino": "compiled_peers:export_openvino",
}

REFERENCE = "hf-loop"
"""The peer that probabilities are compared with."""

PEERS = {
    "belt": Peer(
        title="belt fp32",
        load="torch_peers:belt",
        options={"precision": "fp32"},
        note="contracts, digest, manifest",
    ),
    "belt-bf16": Peer(
        title="belt bf16",
        load="torch_peers:belt",
        options={"precision": "bf16"},
        precision="bf16",
        note="contracts, digest, manifest",
    ),
    "belt-nlp": Peer(
        title="belt-nlp, batch 1",
        load="torch_peers:belt_nlp",
        options={"batch_size": 1},
        in_default=False,
        note="pads chunks to 512",
    ),
    "belt-nlp-8": Peer(
        title="belt-nlp, batch 8",
        load="torch_peers:belt_nlp",
        options={"batch_size": 8},
        note="pads chunks to 512",
    ),
    "hf-loop": Peer(
        title="HF overflow loop, batch 8",
        load="torch_peers:overflow_loop",
    ),
    "sentence-transformers": Peer(
        title="sentence-transformers, batch 32",
        load="torch_peers:sentence_transformers",
        in_default=False,
        note="tokenizes chunks again: numbers differ",
    ),
    "hf-pipeline": Peer(
        title="HF pipeline, truncation",
        load="torch_peers:pipeline",
        first_window_only=True,
        in_default=False,
        note="less work: first window only",
    ),
    "onnxruntime": Peer(
        title="ONNX Runtime fp32",
        load="compiled_peers:onnxruntime",
        export="export-onnx",
        note="memory includes torch",
    ),
    "openvino": Peer(
        title="OpenVINO fp32",
        load="compiled_peers:openvino",
        options={"precision": "fp32"},
        export="export-openvino",
        note="memory includes torch",
    ),
    "openvino-bf16": Peer(
        title="OpenVINO bf16",
        load="compiled_peers:openvino",
        options={"precision": "bf16"},
        precision="bf16",
        export="export-openvino",
        note="memory includes torch",
    ),
}


def configurations(name: str, setup: Setup) -> Configurations:
    """Load a peer in this process."""
    return imported(PEERS[name].load)(setup, **PEERS[name].options)


def export(name: str, setup: Setup) -> None:
    """Write the model in the format of another runtime."""
    imported(EXPORTS[name])(setup)


def imported(reference: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names."""
    module, function = reference.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)
