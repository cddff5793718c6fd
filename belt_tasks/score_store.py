"""The score store: what the model said of the texts that this process has seen in a run, so that none is encoded twice.

It is SQLite's private temporary database: pages that do not fit its cache go to an unnamed file, so memory stays flat
however many documents a run has, and nothing is left behind however the process ends. It holds only what cannot be had
again without the encoder. A run that goes on in another process starts with an empty one.
"""

import sqlite3
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from belt_tasks.evidence import CHUNK

CACHE_KIB = 16_384
MOST_PARAMETERS = 500


@dataclass(frozen=True, kw_only=True)
class StoredScore:
    """What the encoder said of one text."""

    logits_L: npt.NDArray[np.float32]
    """Pooled."""
    top_chunk: int
    """Which of the document's chunks speaks most for its label, counted from its first."""
    ranked: npt.NDArray[np.void] = field(default_factory=lambda: np.empty(0, CHUNK))
    """Chunks to show as evidence; see `evidence.CHUNK`."""


class ScoreStore:
    """Scores by content fingerprint, of one checkpoint under one spec; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute(
            "CREATE TABLE scores (fingerprint BLOB PRIMARY KEY, logits BLOB, top_chunk INTEGER, ranked BLOB) "
            "WITHOUT ROWID"
        )

    def put(self, scores: dict[str, StoredScore]) -> None:
        """Keep scores by the hex digits of their text's fingerprint; what is there already stays."""
        rows = [
            (bytes.fromhex(key), score.logits_L.tobytes(), score.top_chunk, score.ranked.tobytes())
            for key, score in scores.items()
        ]
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)
            finally:
                self._connection.execute("COMMIT")

    def get(self, fingerprints: list[str]) -> dict[str, StoredScore]:
        """Those of the wanted scores that are there."""
        found = {}
        for first in range(0, len(fingerprints), MOST_PARAMETERS):
            keys = [bytes.fromhex(key) for key in fingerprints[first : first + MOST_PARAMETERS]]
            marks = ",".join("?" * len(keys))
            with self._lock:
                rows = self._connection.execute(
                    f"SELECT fingerprint, logits, top_chunk, ranked FROM scores WHERE fingerprint IN ({marks})",  # noqa: S608 - marks
                    keys,
                ).fetchall()
            for key, logits, top_chunk, ranked in rows:
                found[key.hex()] = StoredScore(
                    logits_L=np.frombuffer(logits, np.float32),
                    top_chunk=top_chunk,
                    ranked=np.frombuffer(ranked, CHUNK),
                )
        return found

    def __del__(self) -> None:
        self._connection.close()


class Claims:
    """The texts that one pipeline has taken on, before a store: each is encoded once, also while it is on its way.

    Blocks are settled in the order in which they were taken, so that what an earlier block encodes is stored when a
    later one that holds the same text is settled.
    """

    def __init__(self, store: ScoreStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._taken: set[str] = set()

    def take(self, fingerprints: list[str]) -> set[str]:
        """Those that are to be encoded: neither stored nor taken before."""
        with self._lock:
            free = set(fingerprints) - self._taken  # first: what is settled now is stored already
            free -= self.store.get(list(free)).keys()
            self._taken |= free
        return free

    def settle(self, scores: dict[str, StoredScore]) -> None:
        """Store the scores of texts that were taken."""
        self.store.put(scores)
        with self._lock:
            self._taken -= scores.keys()


_stores: dict[str, ScoreStore] = {}
_lock = threading.Lock()


def of_run(run_uri: str) -> ScoreStore:
    """The store of a run in this process; that of another run is dropped."""
    with _lock:
        if run_uri not in _stores:
            _stores.clear()
            _stores[run_uri] = ScoreStore()
        return _stores[run_uri]


def forget() -> None:
    """Drop what is stored: a shard that failed is scored again as if it were the first time."""
    with _lock:
        _stores.clear()
