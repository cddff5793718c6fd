"""The project's own rules: the layout, the direction of imports, and pins that hold."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LAYOUT = {"flows", "belt_tasks", "tests", "deployments", "data_contracts"}


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_imports_go_one_way():
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout


def test_stages_that_do_not_compute_need_no_torch():
    modules = [
        "columns",
        "corpus",
        "gate",
        "metrics",
        "plots",
        "progress",
        "publishing",
        "receipts",
        "report",
        "registry",
        "specs",
        "storage",
        "windows",
    ]
    code = "\n".join(f"import belt_tasks.{name}" for name in modules) + "\nimport sys; sys.exit('torch' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_every_installed_distribution_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tools = {"belt", "pip", "setuptools", "wheel"}
    installed = {normalised(d.metadata["Name"]): d.version for d in distributions()}

    pinned = {normalised(name): version for name, version in pins.items()}
    wanted = _closure()
    assert {name for name in wanted if name in installed} - tools - pinned.keys() == set()
    different = {n: (v, installed[n]) for n, v in pinned.items() if n in installed and installed[n].split("+")[0] != v}
    assert different == {}


def _closure():
    """What belt depends on, and what that does, as far as it is installed."""
    found = {normalised(d.metadata["Name"]): d for d in distributions()}
    todo, seen = [("belt", frozenset({"test", "demo", "bench"}))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or name not in found:
            continue
        seen.add((name, extras))
        for text in found[name].requires or []:
            requirement = Requirement(text)
            markers = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(marker) for marker in markers):
                todo.append((normalised(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


def test_every_dependency_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {normalised(re.split(r"[<>=\[; ]", text)[0]) for text in project["dependencies"]}
    modules = {
        "fastapi": None,
        "sqlalchemy": None,
        "pyyaml": "yaml",
        "python-json-logger": "pythonjsonlogger",
        "scikit-learn": "sklearn",
    }  # fastapi and sqlalchemy are pins for Prefect alone
    source = "\n".join(
        path.read_text()
        for folder in ("flows", "belt_tasks", "data_contracts")
        for path in (ROOT / folder).rglob("*.py")
    )

    for name in names:
        module = modules.get(name, name.replace("-", "_"))
        assert module is None or re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE), name


@pytest.mark.parametrize(
    "pattern", [r"torch\.load\((?![^)]*weights_only=True)", r"pickle\.loads?\(", r"trust_remote_code\s*=\s*True"]
)
def test_nothing_loads_a_pickle_or_runs_a_models_code(pattern):
    for folder in ("flows", "belt_tasks", "data_contracts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(pattern, path.read_text()), path


def test_no_other_folder_stands_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}

    assert {name for name in folders if not name.startswith(".")} <= LAYOUT
