"""The gate: equal checkpoints hold, better ones are promoted, harm is rejected; on the same documents or not at all."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belt_tasks import gate as gates
from belt_tasks import metrics, resampling
from belt_tasks.errors import ConfigError
from belt_tasks.gate import DecisionRecord, Scored, decide
from belt_tasks.specs import CorpusSpec, GateSpec, Head

HEADS = {
    "binary": Head(task="binary", labels=("no", "yes")),
    "multiclass": Head(task="multiclass", labels=("a", "b", "c")),
    "multilabel": Head(task="multilabel", labels=("a", "b", "c")),
    "regression": Head(task="regression", labels=("stars",)),
}
QUICK = GateSpec(num_resamples=200, min_documents=1)


def scored(task, *, skill=1.0, num_documents=120, seed=0, noise_seed=0, digest="1" * 64, **more) -> Scored:
    """Documents by seed, and scores that know the truth by skill."""
    random, noise, head = np.random.default_rng(seed), np.random.default_rng(1000 + noise_seed), HEADS[task]
    num_labels = len(head.labels)
    if task == "regression":
        target = random.normal(size=num_documents)
        scores = (target + noise.normal(size=num_documents) / skill)[:, None]
    elif task == "multilabel":
        target = random.random((num_documents, num_labels)) < 0.4
        scores = 1 / (1 + np.exp(-(skill * (2 * target - 1) + noise.normal(size=target.shape))))
    else:
        target = random.integers(0, num_labels, num_documents)
        logits = skill * np.eye(num_labels)[target] + noise.normal(size=(num_documents, num_labels))
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Scored(
        digest=digest,
        head=head,
        doc_ids=tuple(f"d{i:04d}" for i in range(num_documents)),
        fingerprints=tuple(f"{i:064x}" for i in range(num_documents)),
        target=target,
        scores_DL=scores,
        **more,
    )


def check(record, name, label=None):
    (found,) = [each for each in record.checks if (each.name, each.label) == (name, label)]
    return found


@pytest.mark.parametrize("task", HEADS)
@given(seed=st.integers(0, 1000), skill=st.floats(0.1, 5))
@settings(max_examples=10)
def test_the_same_predictions_hold(task, seed, skill):
    champion = scored(task, seed=seed, skill=skill)

    record = decide(champion, replace(champion, digest="2" * 64), QUICK)

    assert (record.decision, record.gain, record.gain_lower, record.gain_upper) == ("hold", 0, 0, 0)
    assert record.why.endswith("not passed: gain")


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("metric", [None, *dict.fromkeys(it for its in resampling.METRICS.values() for it in its)])
def test_what_is_better_on_many_documents_is_promoted_and_the_other_way_round_rejected(task, metric):
    if metric is not None and metric not in resampling.METRICS[task]:
        with pytest.raises(ConfigError, match=f"metric of a {task} task must be one of .*, got '{metric}'"):
            decide(scored(task), scored(task), GateSpec(metric=metric))
        return
    gate = GateSpec(metric=metric, num_resamples=200)
    worse, better = scored(task, skill=0.7), scored(task, skill=3, digest="2" * 64)

    record = decide(worse, better, gate)
    back = decide(better, worse, gate)

    assert (record.decision, back.decision) == ("promote", "reject")
    assert record.metric == metric or metric is None
    assert record.gain_lower <= record.gain <= record.gain_upper
    assert record.gain == pytest.approx(-back.gain)
    assert all(each.passed for each in record.checks)
    assert record.why.endswith("every check passed")


def drawn_recalls(it: Scored, label: int, gate: GateSpec) -> np.ndarray:
    """Recall of a label in every draw, by a slow loop; NaN where no document of it was drawn."""
    num_documents = len(it.doc_ids)
    true = it.target[:, label] if it.head.task == "multilabel" else it.target == label
    said = it.scores_DL[:, label] >= 0.5 if it.head.task == "multilabel" else it.scores_DL.argmax(axis=1) == label
    draws = np.random.default_rng(gate.resampling_seed).integers(0, num_documents, (gate.num_resamples, num_documents))
    return np.array([said[draw][true[draw]].mean() if true[draw].any() else np.nan for draw in draws])


def broken_recalls(champion: Scored | None, challenger: Scored, gate: GateSpec, one, two) -> list[bool]:
    """Of every recall below its floor, whether that is beyond chance."""
    found = []
    for label, row in enumerate(two.get("per_class", [])):
        floors = [] if gate.min_recall is None else [(gate.min_recall, None)]
        if one is not None and gate.max_recall_drop is not None:
            kept = 1 - gate.max_recall_drop
            floors.append((kept * one["per_class"][label]["recall"], kept))
        for limit, kept in floors:
            if row["recall"] < limit - 1e-9:
                least = limit if kept is None else kept * drawn_recalls(champion, label, gate)
                excess = drawn_recalls(challenger, label, gate) - least
                found.append(bool(np.nanquantile(excess, 0.975) < -1e-9))
    return found


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_rule(data):
    """An oracle: the decision from the numbers of the record alone."""
    task = data.draw(st.sampled_from(sorted(HEADS)))
    limit = st.none() | st.floats(0, 1)
    gate = GateSpec(
        min_gain=data.draw(st.sampled_from([0.0, 0.0, 0.05, 0.5])),
        num_resamples=100,
        min_documents=data.draw(st.sampled_from([1, 1, 61])),
        min_recall=data.draw(st.none() | st.just(0.3)),
        max_recall_drop=data.draw(limit),
        max_ece=data.draw(st.none() | st.just(0.4)),
        max_ece_increase=data.draw(limit),
        max_slowdown=data.draw(st.none() | st.just(0.5)),
    )
    speeds = [data.draw(st.none() | st.floats(0.1, 2)) for _ in range(2)]
    champion, challenger = (
        scored(task, num_documents=60, skill=data.draw(st.floats(0.2, 3)), noise_seed=i, encode_s=speeds[i], device="x")
        for i in range(2)
    )
    if data.draw(st.booleans()):
        champion = None

    record = decide(champion, challenger, gate)

    one, two = (
        None if it is None else metrics.task_metrics(task, it.target, it.scores_DL, it.head.labels)
        for it in (champion, challenger)
    )
    recalls = broken_recalls(champion, challenger, gate, one, two)
    broken, unknown = any(recalls), bool(recalls)
    if task != "regression":
        broken |= gate.max_ece is not None and two["ece"] > gate.max_ece
        if one is not None and gate.max_ece_increase is not None:
            broken |= two["ece"] > one["ece"] + gate.max_ece_increase + 1e-9
    if one is not None and gate.max_slowdown is not None:
        unknown |= None in speeds
        broken |= None not in speeds and speeds[1] / speeds[0] > 1.5
    if broken or (one is not None and record.gain_upper < 0):
        assert record.decision == "reject"
    elif unknown or gate.min_documents > 60 or (one is not None and record.gain_lower <= gate.min_gain):
        assert record.decision == "hold"
    else:
        assert record.decision == "promote"


def test_a_recall_of_few_documents_that_is_too_low_may_be_chance():
    target = np.array([0] * 100 + [1] * 4)
    champion = replace(scored("binary", num_documents=104), target=target, scores_DL=np.eye(2)[target])
    wrong = target.copy()
    wrong[-1] = 0  # one of four
    challenger = replace(champion, scores_DL=np.eye(2)[wrong])

    for gate, name in ((GateSpec(), "recall against the champion's"), (GateSpec(min_recall=0.8), "recall")):
        record = decide(champion, challenger, gate)
        floor = check(record, name, "yes")
        assert (floor.number, floor.passed, floor.may_be_chance) == (0.75, False, True)
        assert record.decision == "hold"
        assert f"{name} of yes (may be chance)" in record.why
    wrong[-4:] = 0  # all of them
    record = decide(champion, replace(challenger, scores_DL=np.eye(2)[wrong]), GateSpec(min_recall=0.8))
    assert not check(record, "recall against the champion's", "yes").may_be_chance
    assert record.decision == "reject"


def test_the_metric_is_checked_where_there_is_no_champion_too():
    with pytest.raises(ConfigError, match=r"metric of a binary task must be one of .*, got 'spearman'"):
        decide(None, scored("binary"), GateSpec(metric="spearman"))


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_a_label_that_is_lost_is_rejected_however_much_is_gained(task):
    champion = scored(task, skill=0.5, num_documents=400)
    challenger = scored(task, skill=50, num_documents=400)
    lost = np.asarray(challenger.scores_DL)
    lost[:, 0] = 0.0  # the first label is never predicted
    challenger = replace(challenger, scores_DL=lost)

    record = decide(champion, challenger, GateSpec(num_resamples=200))
    label = champion.head.labels[0]
    floor = check(record, "recall against the champion's", label)

    assert record.decision == "reject"
    assert (floor.number, floor.passed) == (0.0, False)
    assert f"recall against the champion's of {label}" in record.why.partition("not passed: ")[2]
    without = decide(champion, challenger, GateSpec(num_resamples=200, max_recall_drop=None))
    assert without.decision == ("hold" if task == "binary" else "promote")


def test_a_floor_is_reached_where_it_is_met_exactly():
    target = np.array([0] * 10 + [1] * 10)
    champion = replace(scored("binary", num_documents=20), target=target, scores_DL=np.eye(2)[target])
    scores = np.eye(2)[target]
    scores[9] = [0, 1]
    challenger = replace(champion, scores_DL=scores)

    for drop, passed in ((0.1, True), (0.0999, False)):
        record = decide(champion, challenger, GateSpec(num_resamples=100, max_recall_drop=drop))
        assert check(record, "recall against the champion's", "no").passed is passed
    record = decide(champion, challenger, GateSpec(num_resamples=100, min_recall=0.9))
    assert check(record, "recall", "no").passed
    assert check(record, "recall", "no").limit == 0.9


def test_calibration_has_floors():
    champion = scored("binary", skill=1)
    sharp = replace(
        champion, scores_DL=np.where(champion.scores_DL > 0.5, 1.0, 0.0)
    )  # the same labels, surer than right

    for gate, name in (
        (GateSpec(max_ece=0.1), "calibration error"),
        (GateSpec(max_ece_increase=0.05), "increase of the calibration error"),
    ):
        record = decide(champion, sharp, gate.model_copy(update={"num_resamples": 100}))
        assert (record.decision, check(record, name).passed) == ("reject", False)


@pytest.mark.parametrize(
    ("before", "now", "device", "passed", "decision"),
    [
        (1.0, 1.5, "x", True, "promote"),
        (1.0, 1.51, "x", False, "reject"),
        (1.0, 9.0, "y", None, "hold"),
        (None, 1.0, "x", None, "hold"),
        (1.0, None, "x", None, "hold"),
    ],
)
def test_speed_is_compared_on_the_same_device_alone(before, now, device, passed, decision):
    champion = scored("binary", skill=0.5, encode_s=before, device="x")
    challenger = scored("binary", skill=5, encode_s=now, device=device)

    record = decide(champion, challenger, GateSpec(num_resamples=100, max_slowdown=0.5))

    assert check(record, "slowdown").passed is passed
    assert record.decision == decision


def test_few_documents_are_not_enough():
    champion, challenger = scored("binary", skill=0.3, num_documents=99), scored("binary", skill=9, num_documents=99)

    assert decide(champion, challenger, GateSpec(num_resamples=100)).decision == "hold"
    assert decide(champion, challenger, GateSpec(num_resamples=100, min_documents=99)).decision == "promote"
    assert decide(None, challenger, GateSpec()).decision == "hold"


def test_a_gain_has_to_exceed_what_is_asked():
    champion, challenger = scored("multiclass", skill=0.5), scored("multiclass", skill=4)
    record = decide(champion, challenger, QUICK)

    assert decide(champion, challenger, QUICK.model_copy(update={"min_gain": record.gain_lower})).decision == "hold"
    less = QUICK.model_copy(update={"min_gain": record.gain_lower - 1e-6})
    assert decide(champion, challenger, less).decision == "promote"


@pytest.mark.parametrize("task", HEADS)
def test_the_first_champion_has_to_keep_to_the_absolute_floors_alone(task):
    gate = QUICK.model_copy(
        update={"max_ece_increase": 0.0, "max_slowdown": 0.0, "max_recall_drop": 0.0, "min_gain": 1.0}
    )

    record = decide(None, scored(task), gate)

    assert record.decision == "promote"
    assert (record.champion_digest, record.gain, record.gain_lower, record.champion_metrics) == (None, None, None, {})
    assert [each.name for each in record.checks] == ["documents"]
    if task != "regression":
        assert decide(None, scored(task), QUICK.model_copy(update={"min_recall": 1.0})).decision == "reject"
        assert decide(None, scored(task), QUICK.model_copy(update={"max_ece": 0.0})).decision == "reject"


def test_a_label_without_documents_is_named_and_checked_by_nobody():
    champion = scored("multiclass", skill=0.5)
    target = np.where(champion.target == 2, 0, champion.target)
    champion, challenger = (replace(scored("multiclass", skill=skill), target=target) for skill in (0.5, 0.5))

    record = decide(champion, challenger, GateSpec(num_resamples=100, min_recall=0.0))

    assert record.labels_without_documents == ("c",)
    assert {each.label for each in record.checks} == {None, "a", "b"}


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_order_of_labels_is_nobodys_business(task):
    champion, challenger = scored(task, skill=0.7), scored(task, skill=2, digest="2" * 64)
    order = [*range(1, len(champion.head.labels)), 0]
    place = {old: new for new, old in enumerate(order)}
    other = replace(
        challenger,
        head=Head(task=task, labels=tuple(champion.head.labels[i] for i in order)),
        scores_DL=challenger.scores_DL[:, order],
        target=challenger.target[:, order] if task == "multilabel" else np.array([place[i] for i in challenger.target]),
    )

    assert decide(champion, other, QUICK) == decide(champion, challenger, QUICK)


def test_a_decision_is_made_again_alike_and_its_id_says_so():
    arguments = (scored("binary", skill=0.5), scored("binary", skill=3))
    record = decide(*arguments, QUICK, corpus_uri="c")

    assert decide(*arguments, QUICK, corpus_uri="c") == record
    assert len(record.id) == 16
    others = [
        decide(*arguments, QUICK.model_copy(update={"resampling_seed": 1}), corpus_uri="c"),
        decide(*arguments, QUICK, corpus_uri="d"),
        decide(*arguments, QUICK, corpus_uri="c", corpus=CorpusSpec(id_column="x")),
        decide(*(replace(it, fingerprints=("f" * 64,) * 120) for it in arguments), QUICK, corpus_uri="c"),
        decide(arguments[0], replace(arguments[1], digest="3" * 64), QUICK, corpus_uri="c"),
    ]
    assert len({it.id for it in (record, *others)}) == 6
    assert DecisionRecord.model_validate_json(record.model_dump_json()) == record
    json.loads(record.model_dump_json(), parse_constant=pytest.fail)  # no NaN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: cut(it, 1), "1 only by the champion, 0 only by the challenger, 0 with another text"),
        (lambda it: replace(it, doc_ids=("x", *it.doc_ids[1:])), "1 only by the champion, 1 only by the challenger, 0"),
        (lambda it: replace(it, fingerprints=("f", "e", *it.fingerprints[2:])), "0 only .*, 2 with another text"),
        (lambda it: replace(it, target=1 - it.target), "labels of the held-out documents changed"),
        (lambda it: replace(it, threshold=0.6), "scored with thresholds 0.5 and 0.6"),
        (
            lambda it: replace(it, head=Head(task="binary", labels=("a", "b"))),
            "binary of no, yes against binary of a, b",
        ),
        (lambda it: replace(it, head=HEADS["multilabel"]), "binary of no, yes against multilabel of a, b, c"),
    ],
)
def test_what_cannot_be_compared(change, words):
    champion = scored("binary")

    with pytest.raises(ConfigError, match=words):
        decide(champion, change(champion), QUICK)


def cut(it: Scored, num: int) -> Scored:
    parts = {name: getattr(it, name)[:-num] for name in ("doc_ids", "fingerprints", "target", "scores_DL")}
    return replace(it, **parts)


def test_a_metric_without_a_definition():
    champion = scored("binary")
    champion = replace(champion, target=np.zeros_like(champion.target))

    with pytest.raises(ConfigError, match="no definition on any of 200 draws of 120 documents"):
        decide(champion, champion, QUICK.model_copy(update={"metric": "auc"}))


@pytest.mark.parametrize(
    "wrong", [{"confidence": 1.0}, {"min_gain": -1}, {"metric": "f1"}, {"num_resamples": 10}, {"x": 1}]
)
def test_a_gate_is_valid_from_birth(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateSpec(**wrong)


def test_every_metric_of_the_gate_is_one_that_evaluations_report():
    for task in HEADS:
        it = scored(task)
        reported = metrics.task_metrics(task, it.target, it.scores_DL, it.head.labels)
        assert set(resampling.METRICS[task]) <= reported.keys()
        assert set(gates._numbers(reported)) >= set(resampling.METRICS[task])
