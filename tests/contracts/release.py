"""Keeps the last released contracts beside those in work: `python -m tests.contracts.release` releases the latter.

A contract in work may follow its released one only with a version that admits to what changed; the rules are those of
`data_contracts.compatibility`. Only the checkout has `data_contracts/released`, no installation does.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from open_data_contract_standard.model import OpenDataContractStandard

import data_contracts
from data_contracts import compatibility

IN_WORK = Path(data_contracts.__file__).parent
SUFFIX = ".odcs.yaml"


def faults(in_work: Path = IN_WORK) -> list[str]:
    """What keeps the contracts of a folder from following those in its folder `released`."""
    return list(_faults(_read(in_work), _read(in_work / "released")))


def release(in_work: Path = IN_WORK) -> None:
    """Make the contracts in work the released ones, unless they may not follow them.

    Raises:
        ValueError: they may not.
    """
    found = faults(in_work)
    if found:
        raise ValueError("\n".join(found))
    (in_work / "released").mkdir(exist_ok=True)
    for path in in_work.glob(f"*{SUFFIX}"):
        shutil.copy(path, in_work / "released" / path.name)


def _faults(
    in_work: dict[str, OpenDataContractStandard], released: dict[str, OpenDataContractStandard]
) -> Iterator[str]:
    for name, before in released.items():
        if name in in_work:
            yield from compatibility.faults(before, in_work[name])
        else:
            yield f"{name}: the contract was removed; if so it shall be, remove it from the released ones too"


def _read(folder: Path) -> dict[str, OpenDataContractStandard]:
    return {
        path.name.removesuffix(SUFFIX): OpenDataContractStandard.from_string(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"*{SUFFIX}"))
    }


if __name__ == "__main__":
    try:
        release()
    except ValueError as error:
        sys.exit(str(error))
