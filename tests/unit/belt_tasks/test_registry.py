"""The registry: aliases move by one entry that is created or not, so that of two who move one at once one succeeds."""

import multiprocessing
import re
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from belt_tasks import object_stores, registry, storage
from belt_tasks.errors import ConfigError, ConflictError
from tests.integration.fault_proxy import Request, fault_proxy

DIGESTS = [letter * 64 for letter in "0123456789"]
A, B, C, *_ = DIGESTS
NOBODY = "f" * 64


def make_registry(uri: str) -> str:
    """A registry that says of each digest that its checkpoint is there."""
    for digest in DIGESTS:
        storage.write_bytes(registry.model_uri(uri, digest), b"{}")
    return uri


@pytest.fixture
def models(tmp_path) -> str:
    return make_registry(str(tmp_path / "registry"))


@pytest.fixture
def shared(output) -> str:
    """A registry on disk, and one on a real S3 server."""
    return make_registry(output)


def assign(uri, digest, expected, *, alias="champion", who="ann", why="it is better", **more):
    return registry.assign(uri, alias, digest, expected=expected, who=who, why=why, **more)


def where(uri) -> dict[str, str]:
    """An oracle: the last line about each alias, read without the registry's own code."""
    folder, found = Path(uri) / "history", {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        found[re.search('"alias": "(.*?)"', text)[1]] = re.search('"to_digest": "(.*?)"', text)[1]
    return found


def test_the_history_says_who_moved_what_and_why(shared):
    first = assign(shared, A, None, decision="0123456789abcdef")
    second = assign(shared, B, A, who="bob", why="it is faster")

    assert registry.history(shared) == [first, second]
    assert (second.number, second.alias, second.from_digest, second.to_digest) == (2, "champion", A, B)
    assert (second.who, second.why, second.decision, first.decision) == (
        "bob",
        "it is faster",
        None,
        "0123456789abcdef",
    )
    assert first.at <= second.at
    assert first.at.utcoffset().total_seconds() == 0
    assert registry.find(shared, "champion") == second


def test_an_alias_that_is_elsewhere_is_not_moved(shared):
    assign(shared, A, None)

    for expected, words in ((None, "nobody was expected to be"), (B, f"{B} was expected to be")):
        with pytest.raises(ConflictError, match=f"champion is {A} by now .entry 1, ann, .* UTC., {words}"):
            assign(shared, C, expected)
    with pytest.raises(ConflictError, match=f"there is no challenger, but {A} was expected to be it"):
        assign(shared, C, A, alias="challenger")
    assert len(registry.history(shared)) == 1


def test_an_alias_that_is_there_already_is_not_moved_again(models):
    entry = assign(models, A, None)

    assert assign(models, A, A) == entry
    assert registry.put_alias(models, "champion", A, who="bob", why="again") == entry
    with pytest.raises(ConflictError):  # somebody else did it, for reasons of their own
        assign(models, A, None)


def test_the_same_decision_is_carried_out_once(models):
    entry = assign(models, A, None, decision="0" * 16)

    assert assign(models, A, None, decision="0" * 16, who="another attempt") == entry
    with pytest.raises(ConflictError):
        assign(models, A, None, decision="1" * 16)
    assign(models, B, A)
    with pytest.raises(ConflictError):  # it was carried out, and undone since
        assign(models, A, None, decision="0" * 16)


def test_a_decision_that_was_undone_is_not_carried_out_again(models):
    assign(models, A, None)
    assign(models, B, A, decision="0" * 16)
    registry.roll_back(models, "champion", who="bob", why="it is slow")

    words = r"decision 0{16} was carried out by entry 2, and champion was moved since \(entry 3, bob: it is slow\)"
    with pytest.raises(ConflictError, match=words):
        assign(models, B, A, decision="0" * 16)
    assert registry.find(models, "champion").to_digest == A
    assert assign(models, B, A, decision="1" * 16).to_digest == B


def test_a_rollback_is_one_entry_and_two_undo_each_other(shared):
    for digest, expected in ((A, None), (B, A), (C, B)):
        assign(shared, digest, expected)

    back = registry.roll_back(shared, "champion", who="bob", why="it is slow")
    assert (back.number, back.from_digest, back.to_digest, back.who) == (4, C, B, "bob")
    assert registry.roll_back(shared, "champion", who="bob", why="no, it is not").to_digest == C
    assert len(registry.history(shared)) == 5


def test_what_cannot_be_rolled_back(models):
    with pytest.raises(ConfigError, match="no alias 'champion' in this registry; nobody has named a checkpoint"):
        registry.roll_back(models, "champion", who="bob", why="x")
    assign(models, A, None)
    with pytest.raises(ConfigError, match=f"champion was never at another checkpoint than {A}"):
        registry.roll_back(models, "champion", who="bob", why="x")
    with pytest.raises(ConfigError, match="no alias 'challenger' in this registry; it has champion"):
        registry.roll_back(models, "challenger", who="bob", why="x")


@pytest.mark.parametrize(
    "alias", ["", "../x", "a/b", "Champion", "1st", "a b", "champion\n", "a" * 64, "ä", ".", "-a", "a@b"]
)
def test_an_alias_cannot_lead_elsewhere(models, alias):
    with pytest.raises(ConfigError, match="alias must match"):
        assign(models, A, None, alias=alias)
    assert registry.history(models) == []


@pytest.mark.parametrize(
    "digest", ["", "../" + "0" * 61, "0" * 63, "0" * 65, "0" * 63 + "G", "A" * 64, "0" * 64 + "\n"]
)
def test_a_digest_cannot_lead_elsewhere(models, digest):
    for call in (registry.checkpoint_uri, registry.model_uri, lambda uri, it: assign(uri, it, None)):
        with pytest.raises(ConfigError, match="digest must match"):
            call(models, digest)


def test_a_decision_cannot_lead_elsewhere(models):
    for decision in ("../" + "0" * 13, "x" * 16, "0" * 16 + "\n"):
        with pytest.raises(ConfigError, match="decision must match"):
            registry.decision_uri(models, decision)
        with pytest.raises(ConfigError, match="decision: String should match pattern"):
            assign(models, A, None, decision=decision)


def test_whoever_moves_an_alias_says_who_and_why(models):
    with pytest.raises(
        ConfigError, match=r"who: String should have at least 1 .*; why: .*at most 1000 characters, got 'x{80}'$"
    ):
        assign(models, A, None, who="", why="x" * 1001)


def test_a_checkpoint_that_is_not_there_gets_no_alias(models):
    with pytest.raises(ConfigError, match=f"no checkpoint {NOBODY} in this registry; add it first"):
        assign(models, NOBODY, None)


def test_an_alias_is_pinned_to_a_directory(shared):
    assign(shared, A, None)

    pinned = registry.pin(f"{shared}@champion")

    assert pinned == f"{shared}/checkpoints/{A}"
    assert registry.digest_of(pinned) == registry.digest_of(f"{pinned}/") == A
    with pytest.raises(ConfigError, match="no alias 'challenger' in this registry; it has champion"):
        registry.pin(f"{shared}@challenger")


def test_what_is_no_alias_of_a_registry(models):
    assign(models, A, None)

    for uri in (
        models,
        f"{models}@",
        f"{models}@../x",
        f"{models}@Champion",
        f"{models}/x@champion",
        f"@{models}",
        "@a",
    ):
        assert registry.pin(uri) is None
    for uri in (models, f"{models}/checkpoints/{A[1:]}", f"{models}/checkpoints/{A}/x", f"{models}/{A}"):
        assert registry.digest_of(uri) is None


def test_an_entry_that_is_missing_is_noticed(models):
    for digest, expected in ((A, None), (B, A), (C, B)):
        assign(models, digest, expected)
    (Path(models) / "history/00000002.json").unlink()

    with pytest.raises(ConfigError, match=r"00000002\.json: missing, though there are later entries"):
        registry.history(models)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (f'"to_digest": "{B}"', f'"to_digest": "{C}"', "00000003.json: does not follow from the entries before it"),
        ('"number": 2', '"number": 3', "00000002.json: does not follow from the entries before it"),
        (f'"to_digest": "{B}"', '"to_digest": "../../etc"', "00000002.json: not an entry that this belt reads"),
        ("{", "", "00000002.json: not an entry that this belt reads"),
    ],
)
def test_an_entry_that_was_changed_is_noticed(models, old, new, words):
    for digest, expected in ((A, None), (B, A), (C, B)):
        assign(models, digest, expected)
    path = Path(models) / "history/00000002.json"
    path.write_text(path.read_text().replace(old, new, 1))

    with pytest.raises(ConfigError, match=words):
        registry.history(models)


def test_other_files_in_the_history_are_nobodys(models):
    entry = assign(models, A, None)
    for name in ("notes.txt", "2.json", ".00000002.json.x.tmp", "00000002.json.bak"):
        (Path(models) / "history" / name).write_text("x")

    assert registry.history(models) == [entry]


class Registry(RuleBasedStateMachine):
    """Whatever is done in whichever order, aliases are where a dictionary says, and no entry ever changes."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.uri = make_registry(str(Path(self.folder.name) / "registry"))
        self.there: dict[str, list[str]] = {}
        self.files: dict[str, bytes] = {}

    names = st.sampled_from(["champion", "challenger", "x"])
    digests = st.sampled_from(DIGESTS[:4])

    @rule(alias=names, digest=digests, expected=st.none() | digests)
    def assign(self, alias, digest, expected):
        moves = self.there.get(alias, [])
        now = moves[-1] if moves else None
        if now != expected:
            with pytest.raises(ConflictError):
                assign(self.uri, digest, expected, alias=alias)
            return
        assert assign(self.uri, digest, expected, alias=alias).to_digest == digest
        if digest != now:
            self.there[alias] = [*moves, digest]

    @rule(alias=names, digest=digests)
    def put(self, alias, digest):
        moves = self.there.get(alias, [])
        registry.put_alias(self.uri, alias, digest, who="x", why="y")
        if moves[-1:] != [digest]:
            self.there[alias] = [*moves, digest]

    @precondition(lambda self: any(len(moves) > 1 for moves in self.there.values()))
    @rule(data=st.data())
    def roll_back(self, data):
        alias = data.draw(st.sampled_from(sorted(name for name, moves in self.there.items() if len(moves) > 1)))
        registry.roll_back(self.uri, alias, who="x", why="y")
        self.there[alias].append(self.there[alias][-2])

    @invariant()
    def aliases_are_where_they_were_put(self):
        expected = {alias: moves[-1] for alias, moves in self.there.items()}
        entries = registry.history(self.uri)
        assert {alias: entry.to_digest for alias, entry in registry.aliases(entries).items()} == expected
        assert where(self.uri) == expected
        assert len(entries) == sum(map(len, self.there.values()))

    @invariant()
    def nothing_is_overwritten(self):
        now = {path.name: path.read_bytes() for path in (Path(self.uri) / "history").glob("*")}
        assert self.files.items() <= now.items()
        assert sorted(now) == [f"{number:08d}.json" for number in range(1, len(now) + 1)]
        self.files = now

    def teardown(self):
        self.folder.cleanup()


TestAnyOrder = Registry.TestCase
TestAnyOrder.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


def outcome(call) -> str:
    try:
        return call().to_digest
    except ConflictError:
        return "conflict"


def compete(uri, digest, barrier, num_rounds) -> list[str]:
    """In each round move an alias from nowhere at the same moment as others, and an alias of one's own too."""
    outcomes = []
    for number in range(num_rounds):
        barrier.wait()
        outcomes.append(outcome(lambda number=number: assign(uri, digest, None, alias=f"alias-{number}", who=digest)))
        outcome(lambda number=number: assign(uri, digest, None, alias=f"own-{digest[0]}-{number}"))
    return outcomes


def check_competition(uri, outcomes: dict[str, list[str]], num_rounds: int) -> None:
    entries = registry.history(uri)  # checks that there is no gap, and that each follows from those before
    there = registry.aliases(entries)
    for number in range(num_rounds):
        (winner,) = [digest for digest, its in outcomes.items() if its[number] != "conflict"]
        assert there[f"alias-{number}"].to_digest == winner == there[f"alias-{number}"].who
    for digest in outcomes:
        assert all(there[f"own-{digest[0]}-{number}"].to_digest == digest for number in range(num_rounds))
    assert len(entries) == num_rounds * (1 + len(outcomes))


def test_of_many_threads_that_move_an_alias_at_once_one_does(shared):
    num_rounds, writers = 4, DIGESTS[:6]
    barrier = threading.Barrier(len(writers))
    with ThreadPoolExecutor(len(writers)) as threads:
        outcomes = dict(
            zip(writers, threads.map(lambda digest: compete(shared, digest, barrier, num_rounds), writers), strict=True)
        )

    check_competition(shared, outcomes, num_rounds)


def compete_and_tell(uri, digest, barrier, num_rounds, told):
    told.put((digest, compete(uri, digest, barrier, num_rounds)))


def test_of_many_processes_that_move_an_alias_at_once_one_does(shared):
    num_rounds, writers, processes = 4, DIGESTS[:3], multiprocessing.get_context("spawn")
    barrier, told = processes.Barrier(len(writers)), processes.Queue()
    started = [
        processes.Process(target=compete_and_tell, args=(shared, digest, barrier, num_rounds, told))
        for digest in writers
    ]
    for process in started:
        process.start()

    outcomes = dict(told.get() for _ in started)

    for process in started:
        process.join()
    check_competition(shared, outcomes, num_rounds)


def test_two_rollbacks_at_once_are_two_moves_or_one(models):
    assign(models, A, None)
    assign(models, B, A)
    barrier = threading.Barrier(2)

    def back(who):
        barrier.wait()
        return outcome(lambda: registry.roll_back(models, "champion", who=who, why="x"))

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(back, ["ann", "bob"]))

    assert len(registry.history(models)) == 2 + sum(each != "conflict" for each in outcomes)
    assert A in outcomes


@pytest.mark.parametrize("lost", range(1, 4))
def test_a_lost_answer_moves_an_alias_once(s3, s3_root, monkeypatch, lost):
    uri, puts = make_registry(f"{s3_root}/{uuid.uuid4().hex}"), count(1)

    def lose(request: Request) -> bytes | None:
        answer = request.forward()
        return None if request.method == "PUT" and next(puts) <= lost else answer

    with fault_proxy(s3.endpoint, lose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        object_stores.configure({})
        entry = assign(uri, A, None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    object_stores.configure({})

    assert registry.history(uri) == [entry]
    assert sum(method == "PUT" for method, _ in proxy.requests) == lost + 1  # the last one is told that it is there
