"""A fine-tuning from a corpus to its receipt, without Prefect."""

from pathlib import Path

from belt_tasks import planning, training_set
from belt_tasks.fine_tuning import FineTuningReceipt, fine_tune_prepared
from belt_tasks.planning import PreparePlan, TrainPlan
from belt_tasks.receipts import ShardReceipt
from belt_tasks.specs import CorpusSpec, TrainSpec

CORPUS = CorpusSpec()


def prepared(
    corpus: str, encoder: Path, output: Path, spec: TrainSpec, columns: CorpusSpec = CORPUS
) -> tuple[TrainPlan, list[ShardReceipt]]:
    """The plan, and its prepared shards."""
    plan = planning.plan_fine_tuning(corpus, str(encoder), str(output), columns, spec)
    return plan, shards_of(plan.prepare)


def shards_of(plan: PreparePlan) -> list[ShardReceipt]:
    """What a plan asks for, prepared."""
    return [
        training_set.prepare_shard(
            shard,
            plan.corpus,
            run=plan.run,
            encoder=plan.encoder,
            label_role=plan.label_role,
            duplicates_uri=plan.duplicates_uri,
            vocabulary=plan.vocabulary,
        )
        for shard in plan.shards
    ]


def fine_tuned(
    corpus: str, encoder: Path, output: Path, spec: TrainSpec, columns: CorpusSpec = CORPUS
) -> FineTuningReceipt:
    """The whole of it."""
    plan, receipts = prepared(corpus, encoder, output, spec, columns)
    return fine_tune_prepared(plan, receipts, spec, validation_shards(corpus, plan, receipts, spec))


def validation_shards(
    corpus: str, plan: TrainPlan, receipts: list[ShardReceipt], spec: TrainSpec
) -> list[ShardReceipt]:
    """The prepared shards of the validation split, if the spec names one."""
    if spec.validation_split is None:
        return []
    return shards_of(planning.plan_validation(corpus, plan, receipts, spec))
