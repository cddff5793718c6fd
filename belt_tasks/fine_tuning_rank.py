"""A process that takes part in another's fine-tuning.

`data_parallel.ranks` starts it on the same machine and tells it by a pipe what to do: it reads one line of JSON from
standard input, and exits when standard input closes, that is, when its parent ends. A launcher may start it anywhere;
then rank 0 tells it through the process group (`follow`).
"""

import json
import sys
from contextlib import AbstractContextManager
from typing import Any

import joblib
import torch

from belt_tasks import data_parallel, fine_tuning, fitting, object_stores
from belt_tasks.data_parallel import Ranks
from belt_tasks.errors import BeltError
from belt_tasks.planning import TrainPlan
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import TrainSpec
from belt_tasks.training_set import TrainingSet


def main() -> None:
    """Do the job of a pipe."""
    job = json.loads(sys.stdin.readline())
    data_parallel.end_with_parent(sys.stdin, job["folder"])
    torch.set_num_threads(max(1, joblib.cpu_count() // job["size"]))
    try:
        object_stores.configure(job["storage"])
        with _training_set(job) as (training_set, _):
            print(data_parallel.READY, flush=True)  # noqa: T201 - rank 0 waits for it
            with data_parallel.joined(job["rank"], job["size"], _spec(job), job["folder"]) as ranks:
                _fit(job, training_set, ranks)
    except BeltError as error:
        sys.exit(f"{data_parallel.SAID}{error}")


def follow(device: str, precision: Any) -> None:  # noqa: ANN401 - as typed on the command line
    """Do the job of rank 0, which a launcher started elsewhere with the same command.

    Raises:
        ConfigError: the training set or the encoder cannot be read from here.
    """
    with data_parallel.launched(device, precision) as ranks:
        job = data_parallel.told()
        if not job:  # the run is complete already
            return
        with _training_set(job) as (training_set, _):
            _fit(job, training_set, ranks)


def _spec(job: dict[str, Any]) -> TrainSpec:
    return TrainSpec.model_validate(job["spec"])


def _training_set(job: dict[str, Any]) -> AbstractContextManager[tuple[TrainingSet, str | None]]:
    receipts, validation_receipts = (
        [ShardReceipt.model_validate(receipt) for receipt in job[name]] for name in ("receipts", "validation_receipts")
    )
    plan = TrainPlan.model_validate(job["plan"])
    return fine_tuning.load(plan, receipts, validation_receipts, tokens_path=job["tokens"])


def _fit(job: dict[str, Any], training_set: TrainingSet, ranks: Ranks) -> None:
    plan = TrainPlan.model_validate(job["plan"])
    fitting.fit(training_set, _spec(job), encoder_source=plan.encoder, ranks=ranks, run=plan.run)


if __name__ == "__main__":
    main()
