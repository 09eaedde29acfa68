from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from catgan.command import run_command
from export.cli import NAME, main
from trainer.checkpoints.checkpoint import encode_generator
from trainer.config import Config, ModelConfig
from trainer.models import build_generator

CONFIG = Config(recipe="tiny", model=ModelConfig(size=8, z_dim=4, g_width=4))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    info: dict[str, Any] = {
        "recipe": "tiny",
        "kimg": 3.0,
        "metric": {"name": "fd2k_efflite0", "value": 200.0},
        "run_id": "0123",
        "dataset_digest": "abcd",
        "config": CONFIG.to_dict(),
    }
    weights = encode_generator(build_generator(CONFIG.model).state_dict(), info)
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "gen.safetensors").write_bytes(weights)
    return tmp_path / "run"


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = 0
    try:
        run_command(NAME, main, argv)
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_terminated_export_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    command = [
        sys.executable,
        "-c",
        "from export.cli import entry; entry()",
        str(run_dir),
        "-o",
        str(out / "cats.onnx"),
    ]
    export = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".catexport-*")):
        assert export.poll() is None
        time.sleep(0.01)
    export.terminate()
    _, err = export.communicate(timeout=60)
    assert export.returncode == 130
    assert err.endswith("catexport: interrupted\n")
    assert list(out.iterdir()) == []


def test_a_run_is_exported(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "cats.onnx"
    code, out, err = run([str(run_dir), "-o", str(target)], capsys)
    assert code == 0
    result = json.loads(out)
    assert out.count("\n") == 1
    assert (result["onnx"], result["precision"]) == (str(target), "fp32")
    assert 0 <= result["max_abs_diff"] <= 1e-4
    assert "tiny at 3 kimg" in err
    entries = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    expected = {"recipe": "tiny", "kimg": "3", "metric": "fd2k_efflite0", "metric_value": "200.0", "run_id": "0123"}
    assert expected.items() <= entries.items()


def test_a_safetensors_file_is_exported_to_the_default_name(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run([str(run_dir / "best" / "gen.safetensors")], capsys)
    assert (code, json.loads(out)["onnx"]) == (0, "gen.onnx")
    assert (tmp_path / "gen.onnx").is_file()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "CHECKPOINT_OR_RUN"),
        (["nowhere"], "nowhere does not exist"),
        (["{empty}"], "holds no generator"),
        (["{broken}"], "not a safetensors file"),
        (["{run}", "-o", "{empty}"], "is a folder"),
        (["{run}", "-o", "{broken}/gen.onnx"], "cannot write"),
        (["{run}", "-o", "{run}/best/gen.safetensors"], "give a name that ends with .onnx"),
        (["{run}", "--precision", "fp31"], "fp31 is given, allowed are fp32, fp16, int8"),
        (["{run}", "--precision", "fp16", "--data", "{empty}"], "manifest"),
        (["models:/cats@champion"], "which MLflow?"),
        (["{run}", "--register", "cats"], "which MLflow?"),
        (["{run}", "--register", "cats", "--tracking-uri", "http://127.0.0.1:9"], "does not answer"),
        (["{run}", "--web", "{empty}", "--uint8"], "leave one of them out"),
        (["{onnx}", "--web", "{empty}", "--card", "-o", "a.onnx"], "-o, --card: the page has"),
        (["{run}", "--web", "{empty}", "-o", "{empty}/gen.onnx"], "choose another"),
        (["{run}", "--weights", "{empty}/base"], "has no checkpoint"),
        (["s3://bucket/run", "--weights", "{empty}/base"], "--weights needs a run or a checkpoint on this machine"),
        (["{run}", "--opset", "9"], "--opset"),
        (["{run}", "-o"], "expected one argument"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], expected: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "made.onnx").write_bytes(b"no")
    before = sorted(tmp_path.rglob("*"))
    places = {"run": run_dir, "empty": tmp_path / "empty", "broken": tmp_path / "broken.safetensors"}
    places |= {"onnx": tmp_path / "made.onnx"}
    code, out, err = run([word.format(**places) for word in argv], capsys)
    assert (code, out) == (2, "")
    message = [line for line in err.splitlines() if not line.startswith(("exporting", "not evaluated"))]
    assert len(message) == 1
    assert message[0].startswith("catexport: ")
    assert expected in message[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_help_has_examples_and_does_not_import_torch() -> None:
    program = (
        "import sys; from export.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "max_abs_diff" in done.stdout


def test_several_precisions_with_a_card(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        [str(run_dir), "-o", str(tmp_path / "new" / "cats.onnx"), "--precision", "fp32,fp16,int8", "--card"], capsys
    )
    assert code == 0, err
    names = ["card.md", "cats-fp16.onnx", "cats-int8.onnx", "cats.onnx", "directions.png", "samples.png"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names
    files = json.loads(out)["files"]
    assert [f["precision"] for f in files] == ["fp32", "fp16", "int8"]
    assert all(f["speed"] > 0 for f in files[1:])
    text = (tmp_path / "new" / "card.md").read_text()
    assert "| int8 |" in text
    assert "not evaluated" in text


def test_paths_with_dots_are_resolved(run_dir: Path, tmp_path: Path) -> None:
    result = main([f"{tmp_path}/nope/../{run_dir.name}", "-o", f"{tmp_path}/nope/../gen.onnx"])
    assert result["onnx"] == str(tmp_path / "gen.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {run_dir.name, "gen.onnx"}
