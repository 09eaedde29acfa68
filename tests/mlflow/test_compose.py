"""compose.yaml follows the Compose Specification, exposes one local port and contains no secrets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "mlflow" / "compose.yaml").read_text()


def _check(text: str) -> None:
    PyCompose.from_yaml(text).validate()


def test_it_follows_the_specification() -> None:
    _check(TEXT)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("read_only: true", "readonly: true", "readonly"),
        ("condition: service_healthy", "condition: service_helthy", "service_helthy"),
        ("secrets: [db]", "secrets: [dbx]", "dbx"),
        ("networks: [inside]", "networks: [insid]", "insid"),
        ("dockerfile:", "dockrfile:", "dockrfile"),
        ("start_period: 2m", "start_perid: 2m", "start_perid"),
        ("file: secrets/db", "path: secrets/db", "secrets"),
        ('"127.0.0.1:5000:5000"', '"127.0.0.1:500000:5000"', "port"),
    ],
)
def test_mistakes_are_found(right: str, wrong: str, message: str) -> None:
    assert right in TEXT
    with pytest.raises(ValueError, match=message):
        _check(TEXT.replace(right, wrong, 1))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(TEXT)
    return value


def test_the_server_has_a_local_port_and_the_database_none(compose: dict[str, Any]) -> None:
    database, server = compose["services"]["database"], compose["services"]["server"]
    assert server["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in database
    assert database["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True


def test_it_contains_no_secrets(compose: dict[str, Any]) -> None:
    """Passwords are files in a folder that git, job uploads (both .gitignore) and the image (.dockerignore) exclude."""
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|CREDENTIALS", name):
                assert re.fullmatch(r"/run/secrets/(\w+)", value), name
                assert value.rpartition("/")[2] in service["secrets"]
    files = [secret["file"] for secret in compose["secrets"].values()]
    assert all(file.startswith("secrets/") for file in files)
    for ignore_file in (".gitignore", ".dockerignore"):
        assert "/mlflow/secrets/" in (ROOT / ignore_file).read_text().splitlines()


def test_the_server_has_all_settings_of_the_script(compose: dict[str, Any]) -> None:
    """It sets each variable that team.sh requires, and its image runs team.sh."""
    server = compose["services"]["server"]
    script = (ROOT / "mlflow" / "team.sh").read_text()
    for name in server["environment"]:
        assert name.removesuffix("_FILE") in script or name.startswith("AWS_")
    needed = re.search(r"for name in (PGHOST .+); do", script)
    assert needed
    assert {name.removesuffix("_FILE") for name in server["environment"]} >= set(needed[1].split())
    dockerfile = (ROOT / "mlflow" / server["build"]["context"] / server["build"]["dockerfile"]).read_text()
    (stage,) = re.findall(rf"^FROM run AS {server['build']['target']}\n((?:(?!FROM).+\n)+)", dockerfile, re.MULTILINE)
    assert 'CMD ["mlflow/team.sh"]' in stage
    assert re.search(r":[\d.]+-\w+$", compose["services"]["database"]["image"])
