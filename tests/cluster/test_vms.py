"""The configurations of Ray's autoscaler: the checks of `ray up`, and for AWS its requests, answered by moto."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ["aws", "gcp"]


def _load(cloud: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())
    return value


@pytest.mark.parametrize("cloud", CLOUDS)
def test_it_fits_rays_schema_with_rays_defaults(cloud: str) -> None:
    config = _load(cloud)
    prepared = prepare_config(config)
    validate_config(prepared)
    head, gpu = (prepared["available_node_types"][name] for name in ("head", "gpu"))
    assert (head["max_workers"], head["resources"]) == (0, {"CPU": 0})
    assert 1 <= gpu["min_workers"] < gpu["max_workers"] == prepared["max_workers"]
    assert gpu["resources"]["GPU"] == 1
    assert prepared["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_misspelling_is_found(cloud: str) -> None:
    for spoil in (
        lambda config: config.update(idle_timeout=10),
        lambda config: config["available_node_types"]["gpu"].update(min_worker=1),
        lambda config: config["auth"].update(ssh_usr="ubuntu"),
    ):
        config = _load(cloud)
        spoil(config)
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(config))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_commands_are_shell_and_the_dashboard_stays_on_loopback(cloud: str) -> None:
    config = _load(cloud)
    commands = [command for key in config if key.endswith("_commands") for command in config[key]]
    assert len(commands) > 8
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (command, done.stderr)
    (head,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_machines_get_the_whole_project(cloud: str) -> None:
    """Each package, and each file for ``pip install``."""
    mounted = {path for path in _load(cloud)["file_mounts"].values() if not path.startswith("~/")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert mounted == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert [path for path in mounted if not (ROOT / path).exists()] == []


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty AWS account in this process."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a private key to ~/.ssh
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    caches = [aws_utils.resource_cache, aws_utils.client_cache]
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(aws_config.time, "sleep", lambda _: None)  # waits for AWS to apply a new role
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.slow
def test_aws_accepts_the_requests(aws: Any, tmp_path: Path) -> None:
    """The requests of `ray up`: key, role, security group, a head and a spot machine."""
    config = aws_config.bootstrap_aws(prepare_config(_load("aws")))
    (key,) = (tmp_path / ".ssh").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
    machines = {name: config["available_node_types"][name]["node_config"] for name in ("head", "gpu")}
    for name, machine in machines.items():
        provider.create_node(machine, {"ray-node-kind": name}, 1)
    with pytest.raises(ParamValidationError):
        provider.create_node(machines["gpu"] | {"InstanceMarketOption": {}}, {"ray-node-kind": "gpu"}, 1)
    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    types = {instance["InstanceType"]: instance for instance in found}
    assert set(types) == {"m7i.large", "g6.2xlarge"}
    assert types["g6.2xlarge"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in types["m7i.large"]
    assert types["m7i.large"]["MetadataOptions"]["HttpTokens"] == "required"
    groups = {group["GroupId"] for instance in found for group in instance["SecurityGroups"]}
    (group,) = ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    public = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in public] == [(22, 22)]
