"""The folder does not shadow the package of the same name, and its README describes each metric."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_mlflow_from_the_root_finds_the_package() -> None:
    program = "import mlflow; from mlflow.tracking import MlflowClient; print(mlflow.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert "site-packages" in found.parts
    assert ROOT / "mlflow" not in found.parents


def test_the_folder_is_not_a_package() -> None:
    assert (ROOT / "mlflow" / "serve.sh").is_file()
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_the_readme_names_every_metric() -> None:
    page = (ROOT / "mlflow" / "README.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py"))
    logged = set(re.findall(r'"((?:loss|d|lr|augment|grow|speed)/[a-z_0-9]+)"', source))
    assert len(logged) >= 10
    assert sorted(name for name in logged if f"`{name}`" not in page) == []


def test_the_start_script_is_executable() -> None:
    assert os.access(ROOT / "mlflow" / "serve.sh", os.X_OK)
