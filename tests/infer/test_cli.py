from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from catgan.command import UserError, run_command
from infer.cli import NAME, main

ROOT = Path(__file__).parents[2]

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise AssertionError("imported " + name)

sys.meta_path.insert(0, Blocker())
from infer.cli import entry
entry()
"""


def blocked(names: set[str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run catinfer in a fresh interpreter in which importing ``names`` fails."""
    command = [sys.executable, "-c", BLOCKER.replace("{blocked!r}", repr(names)), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_imports_nothing_that_only_training_needs(onnx_file: Path, tmp_path: Path) -> None:
    others = {"torch", "torchvision", "ray", "mlflow", "onnx", "webdataset", "scipy", "tqdm", "tyro"}
    others |= {"trainer", "export", "cluster"}
    out = tmp_path / "cats.png"
    done = blocked(others, "--onnx", onnx_file, "--n", 4, "--out", out, "--interpolate", tmp_path / "w.gif")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seconds"] > 0
    assert {k: result[k] for k in ("out", "n")} == {"out": str(out), "n": 4}
    assert out.exists()


def test_help_is_instant_and_shows_examples() -> None:
    done = blocked({"numpy", "PIL", "onnxruntime"}, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for option in ("--onnx", "--n", "--seed", "--psi", "--out", "--interpolate", "--device", "doctor", "serve DIR"):
        assert option in done.stdout
    assert "examples:" in done.stdout


def test_default_is_a_sheet_of_sixteen(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(NAME, main, ["--onnx", str(onnx_file), "--device", "cpu"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["out"], result["n"], result["provider"]) == ("cats.png", 16, "CPUExecutionProvider")
    assert out.count("\n") == 1
    assert err == ""
    assert {p.name for p in tmp_path.iterdir()} == {"cats.png", "gen.onnx"}


def test_seeds_choose_the_images(onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = main(["--onnx", str(onnx_file), "--seeds", "12,3,7-9", "--out", str(out), "--device", "cpu"])
    assert result["n"] == 5
    main(["--onnx", str(onnx_file), "--seed", "12", "--n", "1", "--out", str(tmp_path / "one"), "--device", "cpu"])
    assert sorted(p.name for p in out.iterdir()) == [f"cat-{i:06d}.png" for i in (3, 7, 8, 9, 12)]
    assert (out / "cat-000012.png").read_bytes() == (tmp_path / "one" / "cat-000012.png").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "npy"])
def test_one_file_to_standard_output(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--onnx", str(onnx_file), "--n", "3", "--device", "cpu"]
    main([*options, "--out", f"cats.{suffix}"])
    run_command(NAME, main, [*options, "--out", "-", *(["--format", suffix] if suffix != "png" else [])])
    out, err = capfdbinary.readouterr()
    assert out == (tmp_path / f"cats.{suffix}").read_bytes()
    assert json.loads(err)["out"] == "-"
    assert json.loads(err)["n"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {f"cats.{suffix}", "gen.onnx"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--shards"], "--shards needs --out DIR/; --out is -"),
        (["--format", "npy", "--labels"], "--labels needs a sheet"),
        (["--interpolate", "-"], "--interpolate -: the walk is a video"),
        (["--interpolate", "walk.gif"], "--out -: standard output is a terminal"),
        ([], "--out -: standard output is a terminal"),
    ],
)
def test_what_is_not_written_to_standard_output(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: "terminal" in problem)
    with pytest.raises(UserError, match=problem):
        main(["--onnx", str(onnx_file), "--out", "-", *options])
    assert {p.name for p in tmp_path.iterdir()} == {"gen.onnx"}


def test_standard_output_that_is_closed_or_full(onnx_file: Path) -> None:
    command = [sys.executable, "-m", "infer.cli", "--onnx", str(onnx_file), "--n", "2000", "--out", "-"]
    command += ["--format", "npy"]  # larger than a pipe holds
    cut = subprocess.run(["sh", "-c", '"$@" | head -c 1', "-", *command], cwd=ROOT, capture_output=True, check=False)
    assert (cut.stdout, cut.stderr) == (b"\x93", b"")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "catinfer: --out -: cannot be written (No space left on device)\n")


def test_a_walk_alone_writes_no_sheet(onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--onnx", str(onnx_file), "--n", "2", "--interpolate", "walk.gif", "--device", "cpu"])
    assert {p.name for p in tmp_path.iterdir()} == {"walk.gif", "gen.onnx"}


def test_the_folder_of_a_run_stands_for_its_best_generator(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    onnx_file.rename(tmp_path / "run" / "best" / "gen.onnx")
    assert main(["--onnx", str(tmp_path / "run"), "--n", "2", "--out", str(tmp_path / "two.png")])["n"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "argument --n: '0' is given, allowed is a whole number from 1 to 1,000,000"),
        (["--n", "-3"], "argument --n: '-3' is given, allowed is a whole number"),
        (["--n", "1e3"], "argument --n: '1e3' is given, allowed is a whole number"),
        (["--n", "1" + "0" * 5000], "is given, allowed is a whole number"),
        (["--n", "four"], "argument --n: 'four' is given, allowed is a whole number"),
        (["--n"], "argument --n: expected one argument"),
        (["--seed", "-1"], "argument --seed: '-1' is given, allowed is a whole number from 0 to 4,294,967,295"),
        (["--seed", "4294967296"], "argument --seed"),
        (["--psi", "2.5"], "argument --psi: '2.5' is given, allowed is a number from 0 to 2"),
        (["--psi", "nan"], "argument --psi: 'nan' is given, allowed is a number"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--interp", "w.gif"], "unrecognized arguments: --interp w.gif; did you mean --interpolate?"),
        (
            ["--seeds", "3,x"],
            "argument --seeds: '3,x' is given, allowed are numbers from 0 to 4,294,967,295 and ranges",
        ),
        (["--seeds", "9-3"], "argument --seeds: '9-3' is given"),
        (["--seeds", ""], "argument --seeds: '' is given"),
        (["--seeds", "4294967296"], "argument --seeds: '4294967296' is given"),
        (["--seeds", "0-4000000000"], "argument --seeds: '0-4000000000' are more than 1,000,000 seeds"),
        (["--seeds", "3,1-5"], "argument --seeds: '3,1-5' names a seed twice"),
        (["--seeds", "3", "--n", "4"], "--seeds gives the seeds and their number: omit --n and --seed"),
        (["--truncation-sweep", "0.5,3"], "argument --truncation-sweep: '3' is given, allowed is a number from 0 to 2"),
        (["--truncation-sweep", "--psi", "1"], "argument --psi: not allowed with argument --truncation-sweep"),
        (["--format", "bmp"], "argument --format: invalid choice: 'bmp'"),
        (["--out", "a.webp", "--interpolate", "a.webp"], "give each a file of its own"),
        (["--out", "a.webp", "--interpolate", "x/../a.webp"], "give each a file of its own"),
        (["--benchmark", "--out", "x/"], "--benchmark writes no images: omit all options but --onnx and --device"),
        (["--benchmark", "--psi", "0.5"], "--benchmark writes no images: omit all options but --onnx and --device"),
        (["--out", "cats.tiff"], "--out cats.tiff: one sheet ends with"),
        (["--onnx", "none.onnx"], "none.onnx: no such file"),
        (["--onnx", "."], "best/gen.onnx: no such file"),
    ],
)
def test_mistakes_are_one_line(
    onnx_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_command(NAME, main, ["--onnx", str(onnx_file), *options])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("catinfer: ")
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["gen.onnx"]


def test_debug_shows_where_it_came_from(onnx_file: Path) -> None:
    with pytest.raises(UserError, match="'0' is given, allowed is a whole number"):
        run_command(NAME, main, ["--debug", "--onnx", str(onnx_file), "--n", "0"])


def test_a_mistake_shows_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "gen.onnx").write_bytes(b"junk")
    done = blocked({"torch"}, "--onnx", tmp_path / "gen.onnx")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "not an ONNX model" in done.stderr


def test_paths_with_dots_are_resolved(onnx_file: Path, tmp_path: Path) -> None:
    def away(name: str) -> str:
        return f"{tmp_path}/nope/../{name}"

    file = away(onnx_file.name)
    assert main(["--onnx", file, "--n", "2", "--out", away("cats.png")])["out"] == str(tmp_path / "cats.png")
    main(["--onnx", file, "--n", "2", "--out", away("cats/"), "--interpolate", away("walk.gif")])
    assert {path.name for path in tmp_path.iterdir()} == {onnx_file.name, "cats.png", "cats", "walk.gif"}
