"""A scoring run in a process of its own, which a test may kill.

To be quick, everything is imported before the process is forked. What is forked, multiprocessing's server of forks,
does nothing but import this module: threads, above all those of the runtimes behind object stores, survive no fork.
"""

import os
import resource
from collections.abc import Mapping
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers.models.bert.modeling_bert
from transformers import conversion_mapping

import data_contracts
from belt_tasks import lake, publishing, score_corpus, shard_scoring
from belt_tasks.errors import BeltError
from belt_tasks.specs import ChunkSpec, ScoreSpec

# what each process would otherwise find out anew
for _name in ("evidence", "inventory", "predictions", "rejected", "runs", "sources"):
    data_contracts.arrow_schema(_name)
conversion_mapping.get_checkpoint_conversion_mapping(transformers.models.bert.modeling_bert.BertConfig.model_type)


def run(
    arguments: tuple[str, str, str],
    spec: Mapping[str, Any],
    environment: Mapping[str, str],
    told: Connection,
    *,
    clock_behind_s: float = 0,
    most_file_bytes: int | None = None,
) -> None:
    """Score, and tell the run's id or the error.

    Args:
        arguments: corpus, checkpoint and output.
        spec: of the scoring; `size` is that of chunks.
        environment: where the store is.
        told: gets ("done", run id) or the error's class and message.
        clock_behind_s: by how much this process's clock is wrong.
        most_file_bytes: local files cannot grow beyond, as on a disk that is full.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    if clock_behind_s:
        _set_clock_back(clock_behind_s)
    if most_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, most_file_bytes))
    try:
        manifest = score_corpus.score_corpus(*arguments, spec=score_spec(**spec))
    except BeltError as error:
        told.send((type(error).__name__, str(error)))
    else:
        told.send(("done", manifest.run["run_id"]))


def score_spec(*, size: int = 30, **more: Any) -> ScoreSpec:
    """By chunk size, which decides the scores."""
    return ScoreSpec(chunks=ChunkSpec(chunk_size=size, stride=size), device="cpu", max_rejected_share=1.0, **more)


def _set_clock_back(seconds: float) -> None:
    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, datetime)

    class Late(datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(seconds=seconds)

    for module in (lake, publishing, score_corpus, shard_scoring):
        module.datetime = Late
