"""The image of ``catinfer serve`` and its Kubernetes manifest: linting, schemas, the program from what is copied."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infer.cli import main
from infer.service.parameters import paths
from infer.service.server import GRACE

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "cluster" / "serve" / "Dockerfile").read_text()
OTHER = (ROOT / "cluster" / "Dockerfile").read_text()
MANIFEST = ROOT / "cluster" / "serve" / "kubernetes.yaml"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _lint(text: str) -> str:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [hadolint, "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).stdout


def test_the_dockerfile_is_clean() -> None:
    assert _lint(DOCKERFILE) == ""
    assert "hadolint ignore" not in DOCKERFILE
    assert "DL3025" in _lint(DOCKERFILE.replace('CMD ["/model/gen.onnx"]', "CMD /model/gen.onnx"))


def test_the_image_has_the_base_of_the_others_a_user_and_little_else() -> None:
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert stages == {re.findall(r"^FROM (python:\S+) AS base$", OTHER, re.MULTILINE)[0]: "base", "base": "serve"}
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "\nUSER 1000\n" in last
    assert re.findall(r"'\.\[(.*)\]'", DOCKERFILE) == ["infer,serve"]
    assert f"catgan:{VERSION}-serve" in DOCKERFILE


def _commands() -> dict[str, list[str]]:
    """The arguments of ENTRYPOINT, CMD and of the health check."""
    found = re.findall(r"^(ENTRYPOINT|CMD|    CMD) (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return {name: json.loads(value) for name, value in found}


def test_its_command_and_health_check_are_those_of_the_program() -> None:
    commands = _commands()
    program, command, *options = commands["ENTRYPOINT"]
    assert (program, command) == ("catinfer", "serve")
    with pytest.raises(SystemExit) as ended:
        main([command, *options, *commands["CMD"], "--help"])
    assert ended.value.code == 0
    python, option, check = commands["    CMD"]
    assert (python, option) == ("python", "-c")
    ast.parse(check)
    path = re.findall(r"http://127\.0\.0\.1:8000(/\w+)'", check)
    assert path == ["/healthz"]
    assert path[0] in paths(64)
    assert options[options.index("--port") + 1] == "8000"


def test_the_program_works_from_what_is_copied(tmp_path: Path) -> None:
    """The wheel is built as in the image, and serves with the rest of the checkout out of reach."""
    context = tmp_path / "context"
    context.mkdir()
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        for name in sources:
            assert {f"!{name}", f"!{name}/"} & set(kept), f".dockerignore leaves out {name}"
            ignored = shutil.ignore_patterns("__pycache__")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, context / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, context / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", tmp_path, "."], cwd=context, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys\nfor name in ('torch', 'ray', 'mlflow', 'trainer', 'export', 'onnx'): sys.modules[name] = None\n"
    )
    program += "import infer.service.server as s; print(s.__file__)\n"
    program += "from infer.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "curl" in done.stdout


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_manifest_fits_kubernetes_schema(manifest: dict[str, dict[str, Any]]) -> None:
    assert set(manifest) == {"Deployment", "Service"}
    for document in manifest.values():
        kubernetes_validate.validate(document, "1.30", strict=True)
    for path in (("spec", "strategy"), ("spec", "template", "spec", "volumes"), ("spec", "selector")):
        wrong = copy.deepcopy(manifest["Deployment"])
        parent: Any = wrong
        for name in path[:-1]:
            parent = parent[name]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_the_pod_is_restricted_limited_and_probed(manifest: dict[str, dict[str, Any]]) -> None:
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = pod["securityContext"] | container["securityContext"]
    assert security["runAsNonRoot"] is security["readOnlyRootFilesystem"] is True
    assert f"\nUSER {security['runAsUser']}\n" in DOCKERFILE
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["image"] == f"catgan:{VERSION}-serve"
    assert len(container["args"]) == 1
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert container["args"][0].startswith("/shared/")
    assert mounts["/shared"]["readOnly"] is True
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert "readOnly" not in mounts["/tmp"], "walks are encoded there"
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + GRACE + 5 <= pod["terminationGracePeriodSeconds"]


def test_the_service_finds_the_pods(manifest: dict[str, dict[str, Any]]) -> None:
    deployment, service = manifest["Deployment"]["spec"], manifest["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    assert "type" not in service, "ClusterIP: there is no authentication"
    assert "app.kubernetes.io/part-of" not in labels, "network.yaml would apply"
    annotations = deployment["template"]["metadata"]["annotations"]
    assert (annotations["prometheus.io/port"], annotations["prometheus.io/path"]) == ("8000", "/metrics")
