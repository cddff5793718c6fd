"""Doctor: whether this machine and these places are fit for belt, a finding for each question.

Every check is a function that returns a `Finding`, whatever it meets; `examine` sees to that. No finding holds a
secret: credentials of a URL are left out, and of configuration only names are told. Those of Prefect are in
`flows.doctor`.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.metadata import metadata as metadata_of
from pathlib import Path
from typing import Literal, get_args

import joblib
import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from belt_tasks import logs, object_stores, storage, telemetry
from belt_tasks.errors import BeltError, ConfigError, without_credentials
from belt_tasks.specs import Spec

Status = Literal["ok", "warning", "problem"]
Check = tuple[str, Callable[[], "Finding"]]

TOLD_LIBRARIES = ("torch", "transformers", "prefect", "polars", "pyarrow", "deltalake")
GIB = 2**30
LEAST_MEMORY_BYTES = 2 * GIB  # MiniLM, the command and its private server take one
LEAST_FREE_BYTES = 2 * GIB  # a shard's tables, or a checkpoint from a store, lie there for a while
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CAN_COMMIT = "can be written, read, listed and deleted in; of two conditional puts the second is refused"


ADVICE = (
    ("No space left|File too large|quota", "free some space, or choose another place"),
    (
        "SignatureDoesNotMatch|InvalidAccessKey|keys are wrong|not authenticated|no credentials",
        "check the keys: those of the storage block, of fsspec's configuration, or of the environment, in this order",
    ),
    ("Read-only|ermission denied|cannot be written|ccess ?[Dd]enied", "choose a place that this user may write to"),
    ("no such file|no such directory|files there", "check the spelling; whatever runs elsewhere needs the place there"),
)
"""What to do, by what is wrong."""
LEAST_FREE_BYTES = GIB


class Finding(Spec):
    """What one check found."""

    check: str
    """What was looked at."""
    status: Status
    """ok, warning: belt works, but worse than it could, or problem: something will fail."""
    found: str
    advice: str | None = None
    """What to do; None where nothing is to be done."""


def examine(group: str, checks: Callable[[], Iterable[Check]]) -> list[Finding]:
    """Carry out checks in order; one that raises becomes a problem, and the others go on.

    Args:
        group: what the checks have in common, for where they cannot even be named.
        checks: names them.
    """
    try:
        named = list(checks())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
        return [_problem(group, error)]
    return [_carried_out(name, check) for name, check in named]


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether anything will fail."""
    return any(finding.status == "problem" for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, one more for what is to be done, and how many there are of each kind."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.check:<{width}}  {finding.found}")
        if finding.advice is not None:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    counted = {status: sum(finding.status == status for finding in findings) for status in get_args(Status)}
    return "\n".join([*lines, ", ".join(f"{status}: {number}" for status, number in counted.items())])


def as_json(findings: Sequence[Finding]) -> str:
    """One document: whether all is well, and every finding."""
    told = {"ok": not has_problem(findings), "findings": [finding.model_dump() for finding in findings]}
    return json.dumps(told, indent=1)


def machine_checks() -> list[Check]:
    """Of this machine and what is installed on it."""
    libraries: list[Check] = [(name, _version_check(name)) for name in TOLD_LIBRARIES]
    return [
        ("Python", check_python),
        ("belt", check_belt),
        *libraries,
        ("other libraries", check_other_libraries),
        ("cores", check_cores),
        ("memory", check_memory),
        ("temporary folder", check_temporary_folder),
        ("device", check_device),
        ("attention kernel", check_kernel),
        ("storage options", check_storage_options),
        ("logs and metrics", check_logs_and_metrics),
    ]


def place_checks(
    corpus_uri: str | None = None, checkpoint_uri: str | None = None, output_uri: str | None = None
) -> list[Check]:
    """Of what is to be read and written; None is not looked at."""
    checks: list[tuple[str, str | None, Callable[[str], Finding]]] = [
        ("corpus", corpus_uri, check_corpus),
        ("checkpoint", checkpoint_uri, check_checkpoint),
        ("output", output_uri, check_output),
    ]
    return [(name, _bound(check, uri)) for name, uri, check in checks if uri is not None]


def check_python() -> Finding:
    """Python's version is one that belt was written for."""
    here = ".".join(map(str, sys.version_info[:3]))
    return _in_range("Python", here, SpecifierSet(metadata_of("belt")["Requires-Python"] or ""))


def check_belt() -> Finding:
    """Belt is installed, from where it says."""
    return Finding(check="belt", status="ok", found=f"{version('belt')}, in {Path(__file__).parent.parent}")


def check_library(name: str) -> Finding:
    """An installed library's version is in the range that belt was written for."""
    wanted = _requirements()[name]
    try:
        return _in_range(name, version(name), wanted.specifier)
    except PackageNotFoundError:
        return Finding(check=name, status="problem", found="not installed", advice=f"pip install '{wanted}'")


def check_other_libraries() -> Finding:
    """So are those of the libraries that are not told one by one."""
    found = [check_library(name) for name in sorted(_requirements().keys() - set(TOLD_LIBRARIES))]
    wrong = [finding for finding in found if finding.status != "ok"]
    return Finding(
        check="other libraries",
        status="problem" if wrong else "ok",
        found="; ".join(f"{finding.check} {finding.found}" for finding in wrong) or f"{len(found)}, as belt needs them",
        advice="install belt again, with its constraints.txt" if wrong else None,
    )


def check_cores() -> Finding:
    """How many cores belt may use: a container's share of the machine, or what OMP_NUM_THREADS says."""
    mine, limit = joblib.cpu_count(), os.environ.get("OMP_NUM_THREADS")
    found = f"{mine} of {os.cpu_count()}"
    if limit is not None and limit.isdecimal() and int(limit) < mine:
        return Finding(
            check="cores",
            status="warning",
            found=f"{found}, but OMP_NUM_THREADS is {limit}",
            advice="unset OMP_NUM_THREADS, unless other jobs need the rest",
        )
    return Finding(check="cores", status="ok", found=found)


def check_memory() -> Finding:
    """There is memory for a small encoder at least."""
    memory = psutil.virtual_memory()
    limits = [int(text) for path in CGROUP_LIMITS if (text := _read(path)).isdecimal()]
    total = min([memory.total, *limits])
    free = min(memory.available, total)
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LEAST_MEMORY_BYTES:
        advice = f"give it {LEAST_MEMORY_BYTES / GIB:.0f} GiB or more; large encoders need more than small ones"
        return Finding(check="memory", status="warning", found=found, advice=advice)
    return Finding(check="memory", status="ok", found=found)


def check_temporary_folder() -> Finding:
    """There is room for temporary files."""
    folder = tempfile.gettempdir()
    with storage.errors_of(f"write to {folder}"), tempfile.TemporaryFile() as file:
        file.write(b"belt")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < LEAST_FREE_BYTES:
        advice = "make room, or set TMPDIR to a larger disk: what goes to or comes from a store is a file there first"
        return Finding(check="temporary folder", status="warning", found=found, advice=advice)
    return Finding(check="temporary folder", status="ok", found=found)


def check_device() -> Finding:
    """What the encoder will run on, and in which precision."""
    import torch  # noqa: PLC0415 - an installation that is broken is a finding

    from belt_tasks import packed_cpu  # noqa: PLC0415 - imports torch

    if torch.cuda.is_available():
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            with torch.cuda.device(number):
                precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            name = torch.cuda.get_device_name(number)
            found.append(f"cuda:{number} {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {precision}")
        return Finding(check="device", status="ok", found="; ".join(found))
    cpu = f"cpu, fp32{' or bf16' if packed_cpu.has_bf16() else ' (bf16 would be slower)'}"
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None:
        build = torch.version.cuda or "none: the CPU build"
        return Finding(
            check="device",
            status="warning",
            found=f"{cpu}; there is an NVIDIA driver, but PyTorch sees no GPU (its CUDA is {build})",
            advice="install PyTorch's CUDA build, and see that nvidia-smi lists the GPU where belt runs",
        )
    return Finding(check="device", status="ok", found=cpu)


def check_kernel() -> Finding:
    """The compiled attention of the CPU is there and serves."""
    import torch  # noqa: PLC0415 - an installation that is broken is a finding

    from belt_tasks import attention_cpu  # noqa: PLC0415 - imports torch

    if attention_cpu.load_kernel() is None:
        return Finding(
            check="attention kernel",
            status="warning",
            found="belt was installed without a C compiler: attention on the CPU takes the slower way",
            advice="install gcc or clang, then belt again",
        )
    if attention_cpu.uses_kernel(64, torch.float32):
        return Finding(check="attention kernel", status="ok", found="compiled, and used on this processor")
    return Finding(
        check="attention kernel", status="ok", found="compiled; this processor has no AVX-512 and needs none"
    )


def check_storage_options() -> Finding:
    """What is configured for object stores is understood; only the names are told."""
    families = sorted(set(object_stores.FAMILIES.values()))
    told = [f"{family}: {', '.join(sorted(names))}" for family in families if (names := object_stores.options(family))]
    prefixes = ("AWS_", "GOOGLE_", "AZURE_")
    variables = sorted(name for name in os.environ if name.startswith(prefixes))
    told += [f"environment: {', '.join(variables)}"] if variables else []
    return Finding(check="storage options", status="ok", found="; ".join(told) or "none: local paths alone")


def check_logs_and_metrics() -> Finding:
    """What the environment says of logs and metrics is understood."""
    log_format = logs.checked_format(os.environ.get("BELT_LOG_FORMAT") or "text")
    settings = telemetry.read_settings()
    places = [name for name in ("textfile", "pushgateway", "port") if getattr(settings, name) is not None]
    if places and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError("metrics need prometheus_client: pip install 'belt[metrics]'")
    found = f"log as {log_format}; metrics by {', '.join(places) or 'nothing'}"
    return Finding(check="logs and metrics", status="ok", found=found)


def check_corpus(uri: str) -> Finding:
    """The corpus is there, and its first file can be read."""
    files = storage.list_files(uri, suffix=".parquet")
    with storage.open_parquet(files[0].uri) as parquet, storage.errors_of(f"read {files[0].uri}"):
        names = [*parquet.schema_arrow.names, *storage.hive_partitions(files[0].uri)]
        next(parquet.iter_batches(batch_size=1), None)
    num_bytes = sum(file.num_bytes for file in files)
    found = f"{uri}: {len(files):,} files, {num_bytes / GIB:,.2f} GiB; columns {', '.join(names)}"
    return Finding(check="corpus", status="ok", found=found)


def check_checkpoint(uri: str) -> Finding:
    """The checkpoint can be loaded, and is whole."""
    from belt_tasks import checkpoint  # noqa: PLC0415 - imports torch

    loaded = checkpoint.load_checkpoint(checkpoint.resolve(uri))
    found = f"{uri}: {loaded.head.task} ({len(loaded.head.labels)} labels), digest {loaded.digest[:16]}"
    return Finding(check="checkpoint", status="ok", found=found)


def check_output(uri: str) -> Finding:
    """An output can be read, written, listed and cleaned, and its store lets one of two writers win."""
    uri = storage.absolute(uri)
    was_there = False
    with suppress(ConfigError):  # a bucket that is not there may be made by the first object
        was_there = storage.is_directory(uri)
    folder = storage.join(uri, f".belt-doctor-{uuid.uuid4().hex}")
    probe, once = storage.join(folder, "probe"), storage.join(folder, "once")
    storage.write_bytes(probe, b"belt")
    try:
        if storage.read_bytes(probe) != b"belt":
            raise ConfigError(f"{uri}: what is read is not what was written")
        if [file.uri.rpartition("/")[2] for file in storage.list_files(folder, suffix="probe")] != ["probe"]:
            raise ConfigError(f"{uri}: what was written is not listed")
        takes_two = storage.create_bytes(once, b"first") and storage.create_bytes(once, b"second")
        free_bytes = None if "://" in uri else shutil.disk_usage(folder).free
    finally:
        storage.remove_files([probe, once])
        storage.remove_empty_directories([folder] if was_there else [folder, uri])
    if storage.exists(probe):
        raise ConfigError(f"{uri}: what was deleted is still there")
    if takes_two:
        return Finding(
            check="output",
            status="problem",
            found=f"{uri}: the store puts an object although one is there (it ignores If-None-Match)",
            advice="choose a store with conditional puts: two runs at once could otherwise both be published",
        )
    if free_bytes is not None and free_bytes < LEAST_FREE_BYTES:
        return Finding(
            check="output",
            status="warning",
            found=f"{uri}: {free_bytes / GIB:.2f} GiB are free",
            advice="free some space, or choose another output: a night writes some hundred bytes for each document",
        )
    return Finding(check="output", status="ok", found=f"{uri}: {CAN_COMMIT}")


def _carried_out(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        found = check()
        return found.model_copy(update={"found": without_credentials(found.found)})
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
        return _problem(name, error)


def _problem(name: str, error: Exception) -> Finding:
    words = str(error) if isinstance(error, BeltError) else f"unexpected {type(error).__name__}: {error}"
    advice = next((advice for pattern, advice in ADVICE if re.search(pattern, words)), None)
    return Finding(check=name, status="problem", found=without_credentials(words), advice=advice)


def _bound(check: Callable[[str], Finding], uri: str) -> Callable[[], Finding]:
    return lambda: check(uri)


def _version_check(name: str) -> Callable[[], Finding]:
    return lambda: check_library(name)


def _requirements() -> dict[str, Requirement]:
    """What belt itself needs, by name."""
    wanted = [Requirement(text) for text in requires("belt") or []]
    return {each.name: each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}


def _in_range(name: str, here: str, wanted: SpecifierSet) -> Finding:
    if wanted.contains(here, prereleases=True):
        return Finding(check=name, status="ok", found=here)
    return Finding(
        check=name,
        status="problem",
        found=f"{here}, but belt needs {wanted}",
        advice="install belt again, with its constraints.txt",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
