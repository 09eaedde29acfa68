"""What docs/extending.md tells to write is written into a copy of the program, which then trains that recipe."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infer.session import Generator

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- (.+?) -->\n```python\n(.*?)```", re.DOTALL)


def follow(page: str, root: Path) -> int:
    """Do what the page says in the checkout ``root``. Returns the lines of code that took."""
    lines = 0
    for place, code in BLOCK.findall(page):
        lines += sum(bool(line.strip()) for line in code.splitlines())
        table = re.fullmatch(r"into (\w+) of (\S+)", place)
        if table is None:
            (root / place).write_text(code)
            continue
        path = root / table[2]
        text = path.read_text()
        assert text.count(f"\n{table[1]} = {{\n") == 1, place
        if code not in text:  # else somebody has followed the page in this very checkout
            path.write_text(text.replace(f"\n{table[1]} = {{\n", f"\n{table[1]} = {{\n{code}"))
    recipes = root / "trainer" / "recipes" / "__init__.py"
    recipes.write_text(recipes.read_text().replace("import biggan, dcgan,", "import biggan, dcgan, lsgan,"))
    return lines


@pytest.mark.soak
@pytest.mark.slow
def test_the_example_is_a_recipe_like_any_other(shards: Path, tmp_path: Path):
    for package in ("catgan", "infer", "trainer", "export", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert follow((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), tmp_path) <= 20
    done = subprocess.run(
        [
            *(sys.executable, "trainer/run.py", "lsgan", "--data", str(shards), "--out", "out", "--name", "mine"),
            *("--workers", "0", "--kimg", "0.128", "--batch", "8", "--eval.extractor", "efflite0", "--eval.num", "32"),
            *("--model.g-width", "4", "--model.d-width", "4", "--track.tick-kimg", "0.064"),
            *("--track.snapshot-kimg", "0.128"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "mine" / "config.json").read_text())["recipe"] == "lsgan-32"
    assert Generator(Path(result["onnx"]), "cpu").size == 32

    promises = ["tests/trainer/test_losses.py", "tests/trainer/test_config.py"]
    held = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *promises],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert held.returncode == 0, held.stdout
    assert (
        "lsgan"
        in subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--collect-only", *promises],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
    )
