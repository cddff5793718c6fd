"""A fine-tuning from a corpus to its receipt, without Prefect."""

from pathlib import Path

from belt_tasks import planning, training_set
from belt_tasks.fine_tuning import FineTuningReceipt, fine_tune_prepared
from belt_tasks.planning import TrainPlan
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import CorpusSpec, TrainSpec

CORPUS = CorpusSpec()


def prepared(corpus: str, encoder: Path, output: Path, spec: TrainSpec) -> tuple[TrainPlan, list[ShardReceipt]]:
    """The plan, and its prepared shards."""
    plan = planning.plan_fine_tuning(corpus, str(encoder), str(output), CORPUS, spec)
    receipts = [
        training_set.prepare_shard(
            shard,
            CORPUS,
            run=plan.run,
            encoder=plan.encoder,
            label_role=plan.label_role,
            duplicates_uri=plan.duplicates_uri,
        )
        for shard in plan.shards
    ]
    return plan, receipts


def fine_tuned(corpus: str, encoder: Path, output: Path, spec: TrainSpec) -> FineTuningReceipt:
    """The whole of it."""
    return fine_tune_prepared(*prepared(corpus, encoder, output, spec), CORPUS, spec)
