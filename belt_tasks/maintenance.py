"""Maintenance: whether published tables still are what their contracts promise, row by row.

Belt checks every row before it writes it. This looks at what is there now, whoever wrote it, and however the store has
kept it.
"""

import data_contracts
from belt_tasks import delta_tables, lake, progress, storage
from belt_tasks.errors import ConfigError, ContractError
from belt_tasks.score_tables import SORTED_BY, table_at
from belt_tasks.sorted_files import SortedFile
from belt_tasks.specs import Spec


class TableCheck(Spec):
    """A published table that satisfies its contract."""

    table: str
    num_files: int
    num_rows: int


def check_tables(output_uri: str) -> tuple[TableCheck, ...]:
    """Read every published row of an output, a file at a time, and check it against its table's contract.

    Args:
        output_uri: of `belt score`.

    Raises:
        ConfigError: nothing was published there, or a file of a table is gone.
        ContractError: all that is wrong, file by file.
        DeadlineError: it takes longer than it may.
    """
    output_uri = storage.absolute(output_uri)
    problems: list[str] = []
    checks = []
    for name in SORTED_BY:
        table = table_at(output_uri, name)
        delta = table.load()
        if delta is None:
            continue
        delta_tables.checked(table, delta, may_have_more=True)
        last, num_rows = None, 0
        uris = lake.file_uris(table, delta.version())
        progress.advance("check", 0, num_more=len(uris))
        for uri in uris:
            rows = SortedFile.read(uri, table.key).rows(None, None, data_contracts.arrow_schema(name))
            found = data_contracts.violations(rows, name)
            if found:
                problems.append(data_contracts.message(found, name, uri))
            keys = rows[table.key]
            if last is not None and len(keys) and keys[0].as_py() <= last:
                problems.append(f"{name}, {uri}: begins with {table.key} {keys[0].as_py()!r}, but {last!r} came before")
            last = keys[-1].as_py() if len(keys) else last
            num_rows += len(rows)
            progress.advance("check", 1)
        checks.append(TableCheck(table=name, num_files=len(uris), num_rows=num_rows))
    if not checks:
        raise ConfigError(f"{output_uri}: nothing was published there by `belt score`")
    if problems:
        raise ContractError("\n".join(problems))
    return tuple(checks)
