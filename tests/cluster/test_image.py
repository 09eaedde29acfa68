"""The Dockerfile: linting, the build context, and the steps of the build that need no container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import docker.utils
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def _lint(text: str) -> str:
    return subprocess.run(
        [HADOLINT, "--no-color", "--failure-threshold", "style", "-"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def test_the_dockerfile_is_clean() -> None:
    text = DOCKERFILE.read_text()
    assert _lint(text) == ""
    assert "hadolint ignore" not in text
    assert "DL3006" in _lint(re.sub(r"python:\S+", "python", text))  # the linter finds a mistake


def test_every_target_has_a_user_other_than_root_and_a_pinned_base() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    parents = {name: parent for parent, name in stages}
    for target in ("cpu", "cuda", "mlflow"):
        assert parents[target] == "run"
    bodies = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)
    (run,) = (body for body in bodies if body.startswith("base AS run\n"))
    assert "\nUSER 1000\n" in run
    assert not any("\nUSER" in body for body in bodies if body is not run)
    bases = [parent for parent in parents.values() if parent not in parents]
    assert bases == [f"python:{_minor()}.13-slim-bookworm"]


def _minor() -> str:
    """The Python that constraints.txt was tested with."""
    found = re.search(r"\(Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert found
    return found[1]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build context: this working tree without the files of .dockerignore."""
    tree = tmp_path_factory.mktemp("image") / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "out", "shards", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in ("mlflow/secrets/db", ".venv/bin/python", "out/runs/a/state.pt", "trainer/__pycache__/run.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("not for the image")
    patterns = (tree / ".dockerignore").read_text().splitlines()
    kept = docker.utils.exclude_paths(str(tree), [line for line in patterns if line and not line.startswith("#")])
    folder = tree.with_name("context")
    for name in kept:
        if (tree / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, folder / name)
    return folder


def test_the_context_holds_only_the_program(context: Path) -> None:
    files = [path for path in context.rglob("*") if path.is_file()]
    tops = {path.relative_to(context).parts[0] for path in files} - {".dockerignore"}  # the engine reads it
    described = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert tops == {"catgan", "infer", "trainer", "export", "cluster", "mlflow"} | described
    assert [path for path in files if path.read_bytes() == b"not for the image"] == []
    assert (context / "mlflow" / "team.sh").is_file()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (context / name).exists(), name


@pytest.mark.parametrize("has_code", [False, True], ids=["the layer of dependencies", "the code"])
def test_the_project_builds_from_what_is_copied(context: Path, tmp_path: Path, has_code: bool) -> None:
    """The dependencies are installed after the first COPY alone, so the project must build without its code."""
    folder = tmp_path / "app"
    if has_code:
        shutil.copytree(context, folder)
    else:
        folder.mkdir()
        (first,) = re.findall(r"^COPY (pyproject.toml .+) \./$", DOCKERFILE.read_text(), re.MULTILINE)
        for name in first.split():
            shutil.copy(context / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", tmp_path, "."], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("trainer/") for name in archive.namelist()) == has_code
