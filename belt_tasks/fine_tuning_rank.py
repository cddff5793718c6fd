"""A process that takes part in another's fine-tuning: started by `data_parallel.ranks`, told by a pipe what to do.

It reads one line of JSON from standard input, and exits when standard input closes, that is, when its parent ends.
"""

import json
import sys

import joblib
import torch

from belt_tasks import data_parallel, fine_tuning, object_stores
from belt_tasks.errors import BeltError
from belt_tasks.planning import TrainPlan
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import CorpusSpec, TrainSpec


def main() -> None:
    """Do the job."""
    job = json.loads(sys.stdin.readline())
    data_parallel.end_with_parent(sys.stdin, job["folder"])
    torch.set_num_threads(max(1, joblib.cpu_count() // job["size"]))
    spec = TrainSpec.model_validate(job["spec"])
    plan = TrainPlan.model_validate(job["plan"])
    try:
        object_stores.configure(job["storage"])
        training_set = fine_tuning.load(
            plan,
            [ShardReceipt.model_validate(receipt) for receipt in job["receipts"]],
            CorpusSpec.model_validate(job["corpus"]),
        )
        print(data_parallel.READY, flush=True)  # noqa: T201 - rank 0 waits for it
        with data_parallel.joined(job["rank"], job["size"], spec.device, job["folder"]) as ranks:
            fine_tuning.fit(training_set, spec, encoder_source=plan.encoder, ranks=ranks)
    except BeltError as error:
        sys.exit(f"{data_parallel.SAID}{error}")


if __name__ == "__main__":
    main()
