"""The main job on real text: prepare, fine-tune, evaluate, score, publish, read back."""

from prefect import flow

from belt_tasks.demo import DEMO_CORPUS_SPEC, DEMO_SCORE_SPEC, DEMO_TRAIN_SPEC, ReadBack, demo_encoder
from belt_tasks.demo_corpus import DemoCorpusSpec
from belt_tasks.evaluation import EvaluationReceipt
from belt_tasks.fine_tuning import FineTuningReceipt
from belt_tasks.publishing import Manifest
from belt_tasks.specs import CorpusSpec, Spec, TrainSpec
from flows import run_names, tasks
from flows.evaluate import evaluate
from flows.fine_tune import fine_tune
from flows.score import score


class DemoResult(Spec):
    """What the demo did, stage by stage."""

    fine_tuning_run: Manifest
    fine_tuning: FineTuningReceipt
    evaluation_run: Manifest
    evaluation: EvaluationReceipt
    scoring_run: Manifest
    read_back: ReadBack


@flow(name="demo", flow_run_name=run_names.of("output_uri"))
def demo(output_uri: str, corpus: DemoCorpusSpec = DEMO_CORPUS_SPEC, spec: TrainSpec = DEMO_TRAIN_SPEC) -> DemoResult:
    """Fine-tune all-MiniLM-L6-v2 to tell which library a docstring is from, and score every module.

    Args:
        output_uri: directory for the corpus and all results.
        corpus: which libraries, and how many documents of each.
        spec: how to fine-tune.
    """
    corpus_uri = f"{output_uri}/corpus"
    tasks.write_demo_corpus(corpus_uri, corpus)
    training = CorpusSpec(split_column="split", split="train")
    test = CorpusSpec(split_column="split", split="test")
    model_uri = f"{output_uri}/model"
    fine_tuning_run, fine_tuning = fine_tune(corpus_uri, str(demo_encoder()), model_uri, training, spec)
    evaluation_run, evaluation = evaluate(corpus_uri, model_uri, f"{output_uri}/evaluation", test, DEMO_SCORE_SPEC)
    scoring_run = score(corpus_uri, model_uri, f"{output_uri}/predictions", CorpusSpec(), DEMO_SCORE_SPEC)
    return DemoResult(
        fine_tuning_run=fine_tuning_run,
        fine_tuning=fine_tuning,
        evaluation_run=evaluation_run,
        evaluation=evaluation,
        scoring_run=scoring_run,
        read_back=tasks.read_back(scoring_run),
    )
