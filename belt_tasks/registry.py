"""The registry of models: which checkpoint is the champion, who made it so, and why. A folder, and no server.

    REGISTRY/checkpoints/DIGEST/...    copies of checkpoints, never changed; see `model_store`
    REGISTRY/models/DIGEST.json        written when a copy was checked: the checkpoint is in the registry
    REGISTRY/history/00000001.json     who gave which alias to which checkpoint, and why; only ever appended to
    REGISTRY/decisions/ID.json         what a promotion was decided on; see `gate`

An alias (champion, challenger, or any other name) is at the checkpoint to which the history's last entry about it moved
it. An entry is created or it is not, and never replaced: of two writers one is first, and the other looks again.
"""

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import pydantic
from pydantic import AwareDatetime, Field

from belt_tasks import storage
from belt_tasks.errors import ConfigError, ConflictError
from belt_tasks.specs import Spec
from belt_tasks.stored import read_json
from belt_tasks.threads import Threads

NUM_THREADS = 8
MOST_CHARACTERS = 80  # of a wrong value, in a message
CHAMPION, CHALLENGER = "champion", "challenger"
ALIAS = r"[a-z][a-z0-9_-]{0,62}"  # never a digest, and never a path
DIGEST = r"[0-9a-f]{64}"
DECISION = r"[0-9a-f]{16}"

Alias = Annotated[str, Field(pattern=f"^{ALIAS}$")]
Digest = Annotated[str, Field(pattern=f"^{DIGEST}$")]
Words = Annotated[str, Field(min_length=1, max_length=1000)]


class Entry(Spec):
    """One move of an alias."""

    number: int = Field(ge=1, lt=10**8)
    """Its place in the history, and its name there."""
    alias: Alias
    from_digest: Digest | None
    """Where the alias was before; None where there was no such alias."""
    to_digest: Digest
    who: Words
    why: Words
    at: AwareDatetime
    """By the writer's clock, in UTC."""
    decision: Annotated[str, Field(pattern=f"^{DECISION}$")] | None = None
    """The decision that it carries out, if one."""
    writer: str = Field(default_factory=lambda: uuid.uuid4().hex, pattern="^[0-9a-f]{32}$")
    """Random, so that two writers of otherwise equal entries are not taken for each other."""


def checkpoint_uri(registry_uri: str, digest: str) -> str:
    """The directory of a checkpoint of the registry.

    Raises:
        ConfigError: that is no digest.
    """
    return storage.join(storage.absolute(registry_uri), "checkpoints", _checked("digest", DIGEST, digest))


def model_uri(registry_uri: str, digest: str) -> str:
    """The record of a checkpoint of the registry; its presence means that the copy is whole.

    Raises:
        ConfigError: that is no digest.
    """
    return storage.join(storage.absolute(registry_uri), "models", f"{_checked('digest', DIGEST, digest)}.json")


def decision_uri(registry_uri: str, decision: str) -> str:
    """Where a decision is kept.

    Raises:
        ConfigError: that is no decision's id.
    """
    name = f"{_checked('decision', DECISION, decision)}.json"
    return storage.join(storage.absolute(registry_uri), "decisions", name)


def digest_of(uri: str) -> str | None:
    """The digest that the directory of a registry's checkpoint is named by; None of any other place."""
    found = re.search(rf"(?:^|/)checkpoints/({DIGEST})/?\Z", uri)
    return None if found is None else found[1]


def history(registry_uri: str) -> list[Entry]:
    """Every move of every alias, the first one first; empty where there is no registry.

    Raises:
        ConfigError: entries are missing, or are none that this belt wrote.
    """
    folder = storage.join(storage.absolute(registry_uri), "history")
    if not storage.exists(_entry_uri(registry_uri, 1)):
        return []
    names = (file.uri.rpartition("/")[2] for file in storage.list_files(folder, suffix=".json"))
    # a listing that took its time may lack entries before its last one, but those are there
    last = max(int(name.partition(".")[0]) for name in names if re.fullmatch(r"\d{8}\.json", name))
    with Threads(NUM_THREADS) as threads:
        entries = list(threads.map(lambda number: _read(registry_uri, number), range(1, last + 1)))
    _check(registry_uri, entries)
    return entries


def aliases(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The last move of each alias, which says where it is."""
    return {entry.alias: entry for entry in entries}


def carried_out(entries: Sequence[Entry], alias: str, decision: str) -> Entry | None:
    """The entry by which a decision moved an alias; None where it did not."""
    return next((entry for entry in entries if entry.alias == alias and entry.decision == decision), None)


def was_taken_back(entries: Sequence[Entry], alias: str, digest: str) -> bool:
    """Whether an alias was at a checkpoint, and whoever moved it away last did so without a decision."""
    moves = [entry for entry in entries if entry.alias == alias and digest in (entry.from_digest, entry.to_digest)]
    return bool(moves) and moves[-1].from_digest == digest and moves[-1].decision is None


def assign(
    registry_uri: str,
    alias: str,
    digest: str,
    *,
    expected: str | None,
    who: str,
    why: str,
    decision: str | None = None,
) -> Entry:
    """Move an alias to a checkpoint of the registry, if it is still where the caller found it.

    Nothing happens where this decision was carried out already, or where the alias is at `digest` and the caller
    expects it there. A decision that was carried out and undone since is not carried out again: somebody had reasons.

    Args:
        registry_uri: the registry.
        alias: what to move.
        digest: of the checkpoint that it is to be at.
        expected: the digest that it is at; None where there is no such alias.
        who: a person or a flow.
        why: in words.
        decision: the id of the decision that this carries out.

    Returns:
        The entry that moved it.

    Raises:
        ConflictError: the alias is elsewhere by now, or the decision was undone; nothing was changed.
        ConfigError: the checkpoint is not in the registry, or an argument is wrong.
    """
    _checked("alias", ALIAS, alias)
    if not storage.exists(model_uri(registry_uri, digest)):
        raise ConfigError(f"{registry_uri}: no checkpoint {digest} in this registry; add it first")
    while True:
        entries = history(registry_uri)
        last = aliases(entries).get(alias)
        now = None if last is None else last.to_digest
        done = None if decision is None else carried_out(entries, alias, decision)
        if last is not None and (done == last or now == digest == expected):
            return last
        if done is not None:
            raise ConflictError(_undone(registry_uri, done, last))
        if now != expected:
            raise ConflictError(_conflict(registry_uri, alias, last, expected))
        entry = _entry(
            number=len(entries) + 1,
            alias=alias,
            from_digest=now,
            to_digest=digest,
            who=who,
            why=why,
            at=datetime.now(UTC),
            decision=decision,
        )
        data = (entry.model_dump_json(indent=1) + "\n").encode()
        if storage.create_bytes(_entry_uri(registry_uri, entry.number), data):
            return entry  # otherwise somebody else was first, perhaps with another alias


def put_alias(registry_uri: str, alias: str, digest: str, *, who: str, why: str) -> Entry:
    """Move an alias to a checkpoint of the registry, wherever it is now.

    Raises:
        ConfigError: the checkpoint is not in the registry, or an argument is wrong.
    """
    while True:
        last = aliases(history(registry_uri)).get(alias)
        try:
            return assign(
                registry_uri, alias, digest, expected=None if last is None else last.to_digest, who=who, why=why
            )
        except ConflictError:  # it moved in between
            continue


def roll_back(registry_uri: str, alias: str, *, who: str, why: str) -> Entry:
    """Move an alias back to where its last move took it from; done twice, it is where it was.

    Raises:
        ConfigError: there is no such alias, or it was never elsewhere.
        ConflictError: somebody moved it at the same moment; nothing was changed.
    """
    last = find(registry_uri, alias)
    if last.from_digest is None:
        raise ConfigError(f"{registry_uri}: {alias} was never at another checkpoint than {last.to_digest}")
    return assign(registry_uri, alias, last.from_digest, expected=last.to_digest, who=who, why=why)


def find(registry_uri: str, alias: str) -> Entry:
    """The move that brought an alias to where it is.

    Raises:
        ConfigError: there is no such registry or alias.
    """
    there = aliases(history(registry_uri))
    if alias not in there:
        known = f"it has {', '.join(sorted(there))}" if there else "nobody has named a checkpoint there yet"
        raise ConfigError(f"{registry_uri}: no alias {alias!r} in this registry; {known}")
    return there[alias]


def pin(uri: str) -> str | None:
    """The directory of the checkpoint that `REGISTRY@ALIAS` stands for at this moment; None where it is no such name.

    Raises:
        ConfigError: there is a registry, but no such alias.
    """
    named = re.fullmatch(rf"(.+)@({ALIAS})", uri)
    if named is None or not storage.exists(_entry_uri(named[1], 1)):
        return None
    return checkpoint_uri(named[1], find(named[1], named[2]).to_digest)


def hint(uri: str) -> str:
    """What to say besides where `uri`, of which nothing is known, looks like REGISTRY@ALIAS."""
    named = re.fullmatch(rf"(.+)@({ALIAS})", uri)
    return "" if named is None else f"; nor is there a registry at {named[1]} that could know {named[2]!r}"


def _entry_uri(registry_uri: str, number: int) -> str:
    return storage.join(storage.absolute(registry_uri), "history", f"{number:08d}.json")


def _read(registry_uri: str, number: int) -> Entry:
    uri = _entry_uri(registry_uri, number)
    if not storage.exists(uri):
        raise ConfigError(f"{uri}: missing, though there are later entries; the history of this registry is damaged")
    return read_json(uri, Entry, "an entry")


def _check(registry_uri: str, entries: Sequence[Entry]) -> None:
    """Each entry starts from where those before it left the alias."""
    now: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        if entry.number != number or entry.from_digest != now.get(entry.alias):
            uri = _entry_uri(registry_uri, number)
            raise ConfigError(f"{uri}: does not follow from the entries before it; the history is damaged")
        now[entry.alias] = entry.to_digest


def _undone(registry_uri: str, done: Entry, last: Entry | None) -> str:
    since = "" if last is None else f" (entry {last.number}, {last.who}: {last.why})"
    return (
        f"{registry_uri}: decision {done.decision} was carried out by entry {done.number}, and {done.alias} was moved "
        f"since{since}; nothing was changed"
    )


def _conflict(registry_uri: str, alias: str, last: Entry | None, expected: str | None) -> str:
    if last is None:
        return f"{registry_uri}: there is no {alias}, but {expected} was expected to be it; nothing was changed"
    wanted = "nobody was expected to be" if expected is None else f"{expected} was expected to be"
    return (
        f"{registry_uri}: {alias} is {last.to_digest} by now (entry {last.number}, {last.who}, "
        f"{last.at:%Y-%m-%d %H:%M} UTC), {wanted}; nothing was changed. Compare with the present one and try again"
    )


def _entry(**values: object) -> Entry:
    try:
        return Entry.model_validate(values)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{problem['loc'][0]}: {problem['msg']}, got {str(problem['input'])[:MOST_CHARACTERS]!r}"
            for problem in error.errors()
        )
        raise ConfigError(f"an entry of a registry: {problems}") from error


def _checked(name: str, pattern: str, value: str) -> str:
    """What becomes part of a path.

    Raises:
        ConfigError: it could lead elsewhere.
    """
    if re.fullmatch(pattern, value) is None:
        raise ConfigError(f"{name} must match {pattern}, got {value!r}")
    return value
