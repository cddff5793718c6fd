"""A run: prepare, start the peers, and score every corpus with every way to cut it."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from transformers import AutoConfig

from belt_tasks import encoder as encoders
from belt_tasks.cost import needed_flops
from belt_tasks.specs import ChunkSpec
from belt_tasks.tokens import load_tokenizer
from tests.benchmarks import corpora, rounds
from tests.benchmarks.corpora import Corpus, Reading
from tests.benchmarks.documents import Int64
from tests.benchmarks.peers import PEERS
from tests.benchmarks.protocol import Setup, Work, num_cores
from tests.benchmarks.report import Asked, Scored
from tests.benchmarks.rounds import Outcome, Workers

PROBE_DOCUMENTS = 2  # at least
MIN_TOKENS, MIN_DOCUMENTS = 8_000, 8  # of a round, however slow the machine is
WORK_PREFIX = "work-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for, checked."""

    corpus: Path | None
    """None takes the demo corpus, in two cuts."""
    num_documents: int | None
    """None takes as many as `total_s` allows."""
    chunks: tuple[ChunkSpec, ...]
    num_rounds: int
    peers: tuple[str, ...]
    model: Path
    output: Path
    probe_tokens: int
    """Of the documents on which a peer with several configurations chooses: few may mislead it."""
    total_s: float
    """Everything together should take no longer."""
    documents_per_library: int
    """Of the demo corpus, to draw from."""


class Clock:
    """Says what happens, and how much time is left."""

    def __init__(self, total_s: float, say: Callable[[str], None]) -> None:
        self._started, self._total_s, self._say = time.perf_counter(), total_s, say

    def say(self, message: str) -> None:
        """Say something, with the seconds since the start."""
        self._say(f"[{time.perf_counter() - self._started:4.0f} s] {message}")

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._total_s - (time.perf_counter() - self._started)


def run(options: Options, say: Callable[[str], None]) -> list[Scored]:
    """Score every corpus with all peers.

    Raises:
        ConfigError: the corpus or the model is wrong, or they do not fit each other.
    """
    clock = Clock(options.total_s, say)
    encoder = str(options.model.absolute())
    special = load_tokenizer(encoder).special
    for chunks in options.chunks:
        encoders.check_chunk_size(chunks, special, encoders.num_positions_of_source(encoder), source=encoder)
    clock.say("reading the corpus")
    drawn = [
        corpora.drawn(name, table, encoder, num_documents=options.num_documents) for name, table in _tables(options)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    for left in options.output.glob(f"{WORK_PREFIX}*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=options.output.absolute(), prefix=WORK_PREFIX) as folder:
        checkpoint, exports = Path(folder) / "checkpoint", Path(folder) / "exports"
        exports.mkdir()
        corpora.save_random_head(encoder, checkpoint)
        setup = Setup(checkpoint=str(checkpoint), exports=str(exports), num_threads=num_cores())
        clock.say(f"loading {len(options.peers)} peers")
        with Workers.started(list(options.peers), setup, options.output / "logs") as workers:
            todo = [(corpus, chunks) for corpus in drawn for chunks in options.chunks]
            return [
                score(*one, options=options, workers=workers, folder=Path(folder), clock=clock, num_left=len(todo) - i)
                for i, one in enumerate(todo)
            ]


def _tables(options: Options) -> list[tuple[str, pa.Table]]:
    if options.corpus is not None:
        return [(options.corpus.stem, corpora.read_corpus(options.corpus))]
    return list(corpora.demo_cuts(documents_per_library=options.documents_per_library))


def score(
    corpus: Corpus,
    chunks: ChunkSpec,
    *,
    options: Options,
    workers: Workers,
    folder: Path,
    clock: Clock,
    num_left: int,
) -> Scored:
    """Warm up, choose how many documents, and run the rounds.

    Args:
        corpus: what to draw documents from.
        chunks: how to cut them.
        options: of the run.
        workers: the peers' processes.
        folder: for what lives no longer than the run.
        clock: of the run.
        num_left: this and the corpora that follow, which share the time that is left.
    """
    title = f"{corpus.name}, {chunks.chunk_size}/{chunks.stride}"
    outcomes = {name: Outcome(peer=name) for name in options.peers}
    cut = {"chunk_size": chunks.chunk_size, "stride": chunks.stride, "output": str(folder / "output")}
    num_probed = corpora.num_documents_with(corpus.num_tokens_D, options.probe_tokens, at_least=PROBE_DOCUMENTS)
    clock.say(f"{title}: warming up on {num_probed} documents")
    before_s = clock.left_s
    seconds = rounds.probe(workers, Work(corpus=corpus.write(folder / "probe.parquet", num_probed), **cut), outcomes)
    if options.num_documents is None:
        probes_s = (before_s - clock.left_s) * (num_left - 1)
        per_token = sum(seconds.values()) / max(int(corpus.num_tokens_D[:num_probed].sum()), 1)
        num_documents = corpora.num_documents_within(
            corpus.num_tokens_D,
            seconds_per_token=per_token * options.num_rounds,
            budget_s=(clock.left_s - probes_s) / num_left,
            at_least=corpora.num_documents_with(corpus.num_tokens_D, MIN_TOKENS, at_least=MIN_DOCUMENTS),
        )
    else:
        num_documents = min(options.num_documents, len(corpus.num_tokens_D))
    work = Work(corpus=corpus.write(folder / "corpus.parquet", num_documents), **cut)
    ceilings = []
    for number in range(options.num_rounds):
        ceilings.append(workers.ceiling())
        outputs = rounds.run_round(workers, work, outcomes, number=number)
        if number == 0:
            rounds.compare(workers, outputs, outcomes)
        rounds.remove(outputs)
        times = ", ".join(f"{name} {outcomes[name].seconds[-1]:.2f} s" for name in outputs)
        clock.say(f"{title}: {num_documents} documents, round {number + 1} of {options.num_rounds}: {times}")
    for name, outcome in outcomes.items():
        outcome.reason = workers.reasons.get(name)
    asked = _asked(corpus.num_tokens_D[:num_documents], chunks, options.model)
    return Scored(
        title=title,
        outcomes=list(outcomes.values()),
        asked={name: asked[PEERS[name].first_window_only] for name in options.peers},
        ceilings=ceilings,
    )


def _asked(num_tokens_D: Int64, chunks: ChunkSpec, encoder: Path) -> dict[bool, Asked]:
    """What it takes to read all windows (False), and the first alone (True)."""
    config, num_special = AutoConfig.from_pretrained(encoder), load_tokenizer(encoder).special.num_tokens

    def asked(read: Reading) -> Asked:
        return Asked(
            num_documents=len(num_tokens_D),
            num_chunks=len(read.num_tokens_C),
            num_content_tokens=read.num_content_tokens,
            needed_flops=needed_flops(config, read.num_tokens_C),
        )

    first = chunks.model_copy(update={"selection": "head"})
    return {
        False: asked(corpora.reading(num_tokens_D, chunks, num_special=num_special)),
        True: asked(corpora.reading(num_tokens_D, first, num_special=num_special)),
    }
