"""The peers read the same windows and say the same as belt, so that a difference in time is one in speed alone."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.benchmarks import documents, peers, rounds
from tests.benchmarks.peers import PEERS
from tests.benchmarks.protocol import Setup, UnavailableError, Work, first_line, rotated
from tests.benchmarks.rounds import Outcome, PeerError, Worker, Workers, probe
from tests.conftest import words

ROOT = Path(__file__).parents[3]
TEXTS = [words(n, seed=n) for n in (60, 1, 0, 9, 25)] + ["a [SEP] b", "word " * 30]


@pytest.fixture
def setup(tiny_checkpoint, tmp_path):
    return Setup(checkpoint=tiny_checkpoint, exports=str(tmp_path), num_threads=1)


@pytest.fixture
def work(tmp_path):
    def build(name, **cut):
        corpus = tmp_path / "corpus.parquet"
        pq.write_table(pa.table({"doc_id": [f"d{i}" for i in range(len(TEXTS))], "text": TEXTS}), corpus)
        return Work(corpus=str(corpus), output=str(tmp_path / name), **cut)

    return build


def scores(name, setup, work):
    (_, build), *_ = peers.configurations(name, setup).items()
    build()(work)
    return documents.read_scores(work.output)


@pytest.mark.parametrize("cut", [{"chunk_size": 30, "stride": 30}, {"chunk_size": 20, "stride": 7}])
def test_the_overflow_loop_says_the_same_as_belt(setup, work, cut):
    ours = scores("belt", setup, work("belt", **cut))

    theirs = scores("hf-loop", setup, work("loop", **cut))

    assert documents.largest_difference(theirs, ours) < 1e-5
    assert np.ptp(ours[1], axis=0).max() > 1e-2  # the documents do differ


def test_the_pipeline_says_the_same_as_belt_where_one_window_is_enough(setup, work):
    cut = {"chunk_size": 62, "stride": 62}
    (ids, ours), (_, theirs) = (scores(name, setup, work(name, **cut)) for name in ("belt", "hf-pipeline"))

    lengths_D = documents.tokenizer_of(setup.checkpoint).tokenize(TEXTS).num_tokens_D
    short_D = lengths_D <= 62

    assert ids == [f"d{i}" for i in range(len(TEXTS))]
    np.testing.assert_allclose(theirs[short_D], ours[short_D], atol=1e-5)
    assert np.abs(theirs[~short_D] - ours[~short_D]).max() > 1e-4


def test_padded_chunks_give_what_belt_gives(setup, work):
    """What ONNX Runtime and OpenVINO are fed, run by PyTorch."""
    from tests.benchmarks.compiled_peers import Exported

    chunks = documents.cut(work("exported", chunk_size=20, stride=7), setup.checkpoint)
    input_ids_CT, attention_mask_CT = chunks.padded(np.arange(chunks.windows.num_chunks))
    with torch.inference_mode():
        exported = Exported(setup.checkpoint, attention="eager").eval()
        logits_CL = exported(torch.from_numpy(input_ids_CT), torch.from_numpy(attention_mask_CT)).numpy()
    pooled_DL = documents.pool(logits_CL, chunks.windows.doc_of_chunk_C, len(TEXTS))

    ours = scores("belt", setup, work("belt", chunk_size=20, stride=7))

    assert documents.largest_difference((chunks.doc_ids, pooled_DL), ours) < 1e-5


def test_chunk_texts_are_what_the_windows_cover(setup, work):
    chunks = documents.cut(work("none", chunk_size=20, stride=20), setup.checkpoint)

    texts = chunks.chunk_texts()

    assert len(texts) == chunks.windows.num_chunks
    of_first = [text for text, document in zip(texts, chunks.windows.doc_of_chunk_C, strict=True) if document == 0]
    assert "".join(of_first).replace(" ", "") == TEXTS[0].replace(" ", "")
    assert texts[list(chunks.windows.doc_of_chunk_C).index(2)] == ""


def test_belt_nlp_refuses_a_model_that_is_not_berts(setup):
    with pytest.raises(UnavailableError, match="ids of BERT's special tokens"):
        peers.configurations("belt-nlp", setup)


def test_other_documents_than_the_references_are_no_result():
    reference = (["a", "b"], np.zeros((2, 2)))

    with pytest.raises(ValueError, match="scored 1 documents, not the same 2"):
        documents.largest_difference((["a"], np.zeros((1, 2))), reference)


def test_every_peer_and_export_is_there():
    for peer in PEERS.values():
        assert callable(peers.imported(peer.load))
        assert peer.export is None or callable(peers.imported(peers.EXPORTS[peer.export]))


def test_rounds_begin_with_another_peer_each():
    names = ["a", "b", "c"]

    assert [rotated(names, by)[0] for by in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated(names, 2)) == names
    assert rotated([], 1) == []


def test_a_reason_is_one_line():
    assert first_line(ValueError("what\nmore")) == "ValueError: what"
    assert first_line(UnavailableError("no bf16 here")) == "no bf16 here"
    assert first_line(KeyError()) == "KeyError: no message"
    assert (
        first_line(ModuleNotFoundError("", name="openvino")) == "openvino is not installed: pip install 'belt[bench]'"
    )


def test_a_peer_that_cannot_load_says_why_and_stays_out(setup, tmp_path):
    workers = Workers(setup, tmp_path)

    workers.start(["no-such-peer"])

    assert workers.reasons == {"no-such-peer": "KeyError: 'no-such-peer'"}
    outcome = Outcome(peer="no-such-peer")
    assert probe(workers, Work(corpus="", output="", chunk_size=1, stride=1), {"no-such-peer": outcome}) == {}


def test_a_process_that_dies_says_how(setup, tmp_path):
    worker = Worker("no-such-peer", setup, tmp_path / "log.txt")
    with pytest.raises(PeerError):
        worker.answer()

    with pytest.raises(PeerError, match=r"ended with exit code 0: KeyError: 'no-such-peer'"):
        worker.ask({"probe": True})
    worker.close()


def test_a_process_that_hangs_is_stopped(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PATIENCE_S", 0.05)  # nothing loads as fast
    worker = Worker("belt", setup, tmp_path / "log.txt")

    with pytest.raises(PeerError, match="it was stopped: no answer within 0 s"):
        worker.answer()
    worker.close()


def test_every_dependency_of_the_benchmark_is_used_and_pinned():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    names = {re.split(r"[<>=\[; ]", text)[0].lower().replace("-", "_") for text in extra} - {"belt"}
    source = "\n".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
    pins = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }

    assert names - pins == set()
    # the exporter of torch wants onnx, and nobody else imports it
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert names - imported == {"onnx"}
