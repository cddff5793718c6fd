"""deployments/work_pools: what a Prefect server and its own workers for Docker and Kubernetes make of them."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import kubernetes_validate
import pytest
from docker.models.containers import _create_container_args
from prefect.client.schemas.objects import FlowRun
from prefect_docker.worker import DockerWorker
from prefect_kubernetes.worker import KubernetesWorker

FOLDER = Path(__file__).parents[2] / "deployments" / "work_pools"
WORK_POOLS = sorted(FOLDER.glob("*.json"))
KUBERNETES = "1.34"
PREFECT = str(Path(sys.executable).parent / "prefect")


def template(path: Path) -> dict[str, Any]:
    """A work pool's base job template."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def worker_of(path: Path):

    return DockerWorker if path.name.startswith("docker") else KubernetesWorker


def placeholders(value) -> set[str]:
    return set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(value)))


@pytest.mark.parametrize("path", WORK_POOLS, ids=lambda path: path.stem)
def test_work_pools_have_what_prefects_own_have(path):
    ours, theirs = template(path), worker_of(path).get_default_base_job_template()
    properties = ours["variables"]["properties"]

    assert placeholders(ours["job_configuration"]) == set(properties)
    left_out = {
        "registry_credentials",
        "cluster_config",
    }  # the machine's own login, and the cluster that the worker is in
    assert set(theirs["variables"]["properties"]) - set(properties) <= left_out
    assert set(theirs["job_configuration"]) - set(ours["job_configuration"]) <= left_out
    jsonschema.Draft202012Validator.check_schema(ours["variables"])
    defaults = {name: value["default"] for name, value in properties.items() if "default" in value}
    jsonschema.validate(defaults, ours["variables"])


def configuration(path: Path, **variables: Any):
    """What the worker makes of a work pool for a flow run."""
    worker = worker_of(path)
    made = asyncio.run(worker.job_configuration.from_template_and_values(template(path), variables))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="tidy-badger"))
    return made


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_run_becomes_a_job_of_kubernetes(kind):
    made = configuration(FOLDER / f"kubernetes-{kind}.json")
    job = made.job_manifest
    pod = job["spec"]["template"]["spec"]

    # Prefect demands both of the pod, where Kubernetes, which has them in the job, drops them
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (1 if kind == "gpu" else None)
    assert container["image"] == f"belt:0.1.0-{kind}"
    assert {"name": "PREFECT_LOGGING_EXTRA_LOGGERS", "value": "belt_tasks"} in container["env"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == "belt-run"  # whom the network lets to the server


def test_a_flow_run_may_ask_for_more():
    made = configuration(FOLDER / "kubernetes-gpu.json", memory_limit="64Gi", node_selector={"zone": "a"})
    pod = made.job_manifest["spec"]["template"]["spec"]

    assert pod["containers"][0]["resources"]["limits"]["memory"] == "64Gi"
    assert pod["nodeSelector"] == {"zone": "a"}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_run_becomes_a_container_of_docker(kind):

    made = configuration(FOLDER / f"docker-{kind}.json")
    given = {"image": made.image, "command": "true", "version": "1.45", **made.container_create_kwargs}
    host = _create_container_args(given)["host_config"]

    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Init"]) == (True, ["ALL"], True)
    requests = [(each["Driver"], each["Count"], each["Capabilities"]) for each in host.get("DeviceRequests", [])]
    assert requests == ([("nvidia", 1, [["gpu"]])] if kind == "gpu" else [])
    assert made.image == f"belt:0.1.0-{kind}"
    assert made.auto_remove


@pytest.mark.parametrize("path", WORK_POOLS, ids=lambda path: path.stem)
def test_a_server_takes_them_and_refuses_wrong_variables(path, client):
    def prefect(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [PREFECT, "--no-prompt", *arguments], env=os.environ, capture_output=True, text=True, check=False
        )

    kind = path.stem.split("-")[0]
    made = prefect("work-pool", "create", path.stem, "--type", kind, "--base-job-template", str(path))
    try:
        assert made.returncode == 0, made.stdout + made.stderr
        pool = client.read_work_pool(path.stem)
        assert (pool.type, pool.base_job_template) == (kind, template(path))
        again = prefect("work-pool", "update", path.stem, "--base-job-template", str(path))
        assert again.returncode == 0, again.stdout + again.stderr
    finally:
        client.delete_work_pool(path.stem)
