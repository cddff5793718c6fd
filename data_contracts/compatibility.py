"""What a change of a contract does to those who rely on it, and which version it therefore needs.

Those are the readers of a table, who trust what the contract promised, and the tables that are published already, to
which the next run has to add its rows. A change breaks if the new contract allows what the old one ruled out, or if
published tables cannot take its form (see `evolution`):

    major  a column or field is removed or renamed, or has another type; a new one is required; nulls are allowed that
           were not, or no longer allowed; a value joins an enum; a law is dropped, loosened or, like a pattern, changed
           in a way that cannot be judged; the key is another
    minor  a new column or field that can be null; a law is added or made stricter, a value leaves an enum: true of rows
           that are written from now on, while published ones stay
    patch  words: descriptions, names of laws; the order of columns, for all readers go by name
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

from open_data_contract_standard.model import OpenDataContractStandard, SchemaObject, SchemaProperty

Level = Literal["major", "minor", "patch"]
_PARTS: Final[tuple[Level, ...]] = ("major", "minor", "patch")


class Change(NamedTuple):
    """One difference between two versions of a contract."""

    level: Level
    """The part of the version that it has to raise."""
    message: str


def changes(before: OpenDataContractStandard, after: OpenDataContractStandard) -> list[Change]:
    """List what differs between two versions of a contract, but for the version itself."""
    found = list(_of_documents(before, after))
    if not found and _without_version(before) != _without_version(after):
        found.append(Change("patch", "words or the order of columns changed"))
    return found


def faults(before: OpenDataContractStandard, after: OpenDataContractStandard) -> list[str]:
    """Tell what keeps a contract from following the released one: changes that its version does not admit to.

    Args:
        before: as it was released.
        after: as it is to be.

    Returns:
        A message for each change whose part of the version, or one before it, was not raised; none if all is well.
    """
    old, new = _version(before), _version(after)
    if new < old:
        return [f"{after.name}: version {after.version} is below the released {before.version}"]
    raised = next((i for i in range(len(_PARTS)) if new[i] > old[i]), len(_PARTS))
    return [
        f"{after.name}: {change.message}: needs a new {change.level} version, "
        f"{before.version} -> {_next(old, change.level)} or higher, got {after.version}"
        for change in changes(before, after)
        if _PARTS.index(change.level) < raised
    ]


def _version(contract: OpenDataContractStandard) -> tuple[int, ...]:
    parts = str(contract.version).split(".")
    if len(parts) != len(_PARTS) or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{contract.name}: version must be MAJOR.MINOR.PATCH, got {contract.version!r}")
    return tuple(map(int, parts))


def _next(version: tuple[int, ...], level: Level) -> str:
    i = _PARTS.index(level)
    return ".".join(map(str, (*version[:i], version[i] + 1, *([0] * (len(_PARTS) - i - 1)))))


def _without_version(contract: OpenDataContractStandard) -> dict[str, Any]:
    return contract.model_dump(exclude={"version"})


def _of_documents(before: OpenDataContractStandard, after: OpenDataContractStandard) -> Iterator[Change]:
    if before.id != after.id:
        yield Change("major", f"the id is {after.id}, it was {before.id}")
    (old,), (new,) = before.schema_ or [], after.schema_ or []
    if old.name != new.name:
        yield Change("major", f"the table is {new.name}, it was {old.name}")
    yield from _of_columns(old.properties or [], new.properties or [], "")
    if _key(old) != _key(new):
        yield Change("major", f"the key is ({', '.join(_key(new))}), it was ({', '.join(_key(old))})")
    yield from _of_laws(old, new)


def _of_columns(before: Iterable[SchemaProperty], after: Iterable[SchemaProperty], within: str) -> Iterator[Change]:
    what = "field" if within else "column"
    found = {column.name: column for column in after}
    for old in before:
        path, new = f"{within}{old.name}", found.pop(old.name, None)
        if new is None:
            yield Change("major", f"{what} {path} was removed")
        else:
            yield from _of_column(old, new, path)
    for name, new in found.items():
        if new.required:
            yield Change("major", f"{what} {within}{name} is new and required, but published tables do not have it")
        else:
            yield Change("minor", f"{what} {within}{name} is new")


def _of_column(old: SchemaProperty, new: SchemaProperty, path: str) -> Iterator[Change]:
    types = [(column.logicalType, column.physicalType) for column in (old, new)]
    if types[0] != types[1]:
        was, now = (" ".join(map(str, each)) for each in types)
        yield Change("major", f"{path} is {now}, it was {was}")
        return
    if old.required and not new.required:
        yield Change("major", f"{path} may be null, it was required")
    if new.required and not old.required:
        yield Change("major", f"{path} is required, but may be null in published tables")
    yield from _of_enum(old, new, path)
    yield from _of_options(old.logicalTypeOptions or {}, new.logicalTypeOptions or {}, path)
    yield from _of_custom_properties(old, new, path)
    if old.items is not None and new.items is not None:
        yield from _of_column(old.items, new.items, f"{path}[]")
    elif old.items != new.items:
        yield Change("major", f"{path} has other items")
    yield from _of_columns(old.properties or [], new.properties or [], f"{path}.")


def _of_enum(old: SchemaProperty, new: SchemaProperty, path: str) -> Iterator[Change]:
    if old.enum is None or new.enum is None:
        if old.enum is not None:
            yield Change("major", f"{path} may have any value, it had an enum")
        if new.enum is not None:
            yield Change("minor", f"{path} has an enum now")
        return
    was, now = [each.value for each in old.enum], [each.value for each in new.enum]
    yield from (Change("major", f"{path} may be {value!r}") for value in now if value not in was)
    yield from (Change("minor", f"{path} is never {value!r} any more") for value in was if value not in now)


def _of_options(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[Change]:
    for option in sorted(old.keys() | new.keys()):
        was, now = old.get(option), new.get(option)
        if was == now:
            continue
        is_stricter = was is None or (option.startswith("min") and now is not None and now > was)
        yield Change("minor" if is_stricter else "major", f"{option} of {path} is {_shown(now)}, it was {_shown(was)}")


def _of_custom_properties(old: SchemaProperty, new: SchemaProperty, path: str) -> Iterator[Change]:
    was, now = ({str(each.property): each.value for each in column.customProperties or []} for column in (old, new))
    for name in sorted(was.keys() | now.keys()):
        if bool(was.get(name)) != bool(now.get(name)):
            level: Level = "minor" if now.get(name) else "major"
            yield Change(level, f"{path} is {'' if now.get(name) else 'not '}{name}, it was {_shown(was.get(name))}")
        elif was.get(name) != now.get(name):
            yield Change("major", f"{name} of {path} is {_shown(now.get(name))}, it was {_shown(was.get(name))}")


def _of_laws(old: SchemaObject, new: SchemaObject) -> Iterator[Change]:
    was, now = ({str(law.implementation): law.name for law in table.quality or []} for table in (old, new))
    yield from (Change("major", f"law {was[sql]} was dropped: {sql}") for sql in was if sql not in now)
    yield from (Change("minor", f"law {now[sql]} is new: {sql}") for sql in now if sql not in was)


def _key(table: SchemaObject) -> list[str]:
    keys = [column for column in table.properties or [] if column.primaryKey]
    return [str(column.name) for column in sorted(keys, key=lambda column: column.primaryKeyPosition or 0)]


def _shown(value: object) -> str:
    return "none" if value is None else repr(value)
