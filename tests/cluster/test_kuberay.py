"""The Kubernetes manifests: checked by the schemas of Kubernetes and KubeRay, and for rules that are in no schema.

KubeRay's custom resource definitions are not part of this project. They are read from ``shared/kuberay`` beside the
checkout or from ``CATGAN_KUBERAY_CRDS``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray.dashboard import http_server_agent

from trainer.launch.options import parse, parse_workers, split_recipe
from trainer.recipes import resolve

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "cluster" / "kuberay"
KINDS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
# Objects with arbitrary keys, in which a schema cannot find a misspelling.
FREE = {"labels", "matchLabels", "rayStartParams", "requests", "limits", "metadata"}


def _load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((MANIFESTS / name).read_text())
    return value


def _crd_folder() -> Path:
    named = os.environ.get("CATGAN_KUBERAY_CRDS")
    candidates = [Path(named)] if named else [parent / "shared" / "kuberay" for parent in ROOT.parents]
    for folder in candidates:
        if (folder / "ray.io_rayclusters.yaml").is_file():
            return folder
    pytest.skip("needs KubeRay's CRDs in ../shared/kuberay or CATGAN_KUBERAY_CRDS")


def _strict(schema: Any) -> Any:
    """The schema without unknown properties, which Kubernetes itself drops silently."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft7Validator]:
    folder = _crd_folder()
    found = {}
    for kind, file in (("RayCluster", "ray.io_rayclusters.yaml"), ("RayJob", "ray.io_rayjobs.yaml")):
        crd = yaml.load((folder / file).read_text(), Loader=yaml.CSafeLoader)
        assert crd["spec"]["names"]["kind"] == kind
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        found[kind] = jsonschema.Draft7Validator(_strict(version["schema"]["openAPIV3Schema"]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_fits_kuberays_schema(kind: str, validators: dict[str, jsonschema.Draft7Validator]) -> None:
    manifest = _load(KINDS[kind])
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    errors = [f"{error.json_path}: {error.message[:200]}" for error in validators[kind].iter_errors(manifest)]
    assert errors == []


def _keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every key that the schema should know."""
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from _keys(part, (*path, i))
    elif isinstance(value, dict) and not (path and path[-1] in FREE):
        for key, part in value.items():
            yield (*path, key)
            yield from _keys(part, (*path, key))


def _misspelt(manifest: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    other = copy.deepcopy(manifest)
    parent: Any = other
    for step in path[:-1]:
        parent = parent[step]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_every_misspelling_is_found(kind: str, validators: dict[str, jsonschema.Draft7Validator]) -> None:
    manifest = _load(KINDS[kind])
    paths = list(_keys(manifest))
    assert len(paths) > 100
    missed = [path for path in paths if validators[kind].is_valid(_misspelt(manifest, path))]
    assert missed == []


def test_a_wrong_value_is_found(validators: dict[str, jsonschema.Draft7Validator]) -> None:
    manifest = _load("raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    manifest["spec"]["authOptions"]["mode"] = "password"
    found = {error.json_path for error in validators["RayCluster"].iter_errors(manifest)}
    assert found == {"$.spec.workerGroupSpecs[0].maxReplicas", "$.spec.authOptions.mode"}


def test_the_documented_redis_options_fit_kuberays_schema(
    validators: dict[str, jsonschema.Draft7Validator],
) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    options = yaml.safe_load(shown)
    assert set(options) == {"gcsFaultToleranceOptions"}
    manifest = _load("raycluster.yaml")
    manifest["spec"] |= options
    assert list(validators["RayCluster"].iter_errors(manifest)) == []


def test_the_network_policy_fits_kubernetes_schema() -> None:
    policy = _load("network.yaml")
    kubernetes_validate.validate(policy, "1.30", strict=True)
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, "1.30", strict=True)


def test_a_job_has_the_same_cluster() -> None:
    assert _load("rayjob.yaml")["spec"]["rayClusterSpec"] == _load("raycluster.yaml")["spec"]


def test_versions_are_those_of_this_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    spec = _load("raycluster.yaml")["spec"]
    assert spec["rayVersion"] == importlib.metadata.version("ray")
    images = {container["image"] for _, container in _containers()}
    assert images == {f"catgan:{project['version']}-cuda"}


def _pods() -> list[dict[str, Any]]:
    job = _load("rayjob.yaml")["spec"]
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups] + [job["submitterPodTemplate"]]


def _containers() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod spec, container) of the head, the workers and the submitter."""
    return [(pod["spec"], container) for pod in _pods() for container in pod["spec"]["containers"]]


def test_pods_keep_to_the_restricted_policy_and_have_limits() -> None:
    assert len(_containers()) == 3
    for pod, container in _containers():
        security = pod["securityContext"] | container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_ray_containers_have_shared_memory_storage_and_probes_that_need_no_token() -> None:
    for pod, container in _containers()[:2]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        for name in ("readinessProbe", "livenessProbe"):
            get = container[name]["httpGet"]
            if container["name"] == "ray-worker":
                assert get["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
                assert get["path"] in http_server_agent.PUBLIC_EXACT_PATHS
            else:
                # tests/cluster/test_access.py requests this path from a real dashboard.
                assert get == {"path": "/api/gcs_healthz", "port": ray_constants.DEFAULT_DASHBOARD_PORT}


def test_secrets_come_from_secrets_and_the_dashboard_is_not_public() -> None:
    spec = _load("raycluster.yaml")["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    names = set()
    for _, container in _containers()[:2]:
        for variable in container["env"]:
            if any(word in variable["name"] for word in ("KEY", "PASSWORD", "USERNAME", "TOKEN", "SECRET")):
                names.add(variable["name"])
                assert "value" not in variable, variable["name"]
                assert variable["valueFrom"]["secretKeyRef"]["name"].startswith("catgan-")
    assert names == {
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    }
    policy = _load("network.yaml")["spec"]["podSelector"]["matchLabels"]
    assert all(policy.items() <= pod["metadata"]["labels"].items() for pod in _pods())
    # KubeRay sets this label itself and uses it to select the head.
    assert all("app.kubernetes.io/name" not in pod["metadata"]["labels"] for pod in _pods())


def test_run_py_accepts_the_entrypoint() -> None:
    job = _load("rayjob.yaml")
    program, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, script) == ("python", "trainer/run.py")
    assert (ROOT / script).is_file()
    name, rest = split_recipe(arguments)
    options = parse(rest, resolve(name, 64, True), "")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert options.workers is not None
    # At its start a job uses the existing workers, and the autoscaler cannot exceed its maximum.
    assert parse_workers(options.workers) == (group["minReplicas"], group["maxReplicas"])
    assert group["replicas"] == group["minReplicas"]
    assert options.name == job["metadata"]["name"]
    assert {Path(options.data or "").parts[1], Path(options.out or "").parts[1]} == {"shared"}
    assert any(t["key"] == "nvidia.com/gpu" for t in group["template"]["spec"]["tolerations"])
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
