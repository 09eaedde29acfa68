"""catinfer without a file: the generators in the package, and the list of what is at hand."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError, run_command
from infer.builtin import DEFAULT, builtin_models
from infer.cli import NAME, main
from infer.session import Generator


def test_without_arguments_it_writes_sixteen_cats_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.chdir(tmp_path)
    run_command(NAME, main, [])
    result = json.loads(capsys.readouterr().out)
    assert (result["out"], result["n"]) == ("cats.png", 16)
    with Image.open("cats.png") as sheet:
        assert min(sheet.size) >= 4 * 64
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_inspect_prints_a_command_with_the_built_in_generator_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--n", "2", "--seed", "5", "--device", "cpu"])
    (record,) = main(["inspect", "cats.png"])["files"]
    assert f"--onnx {DEFAULT} " in record["command"]
    main(shlex.split(record["command"])[1:])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "cats.png").read_bytes()


def test_the_default_is_the_built_in_generator_of_its_name(tmp_path: Path) -> None:
    main(["--n", "2", "--out", str(tmp_path / "a.png"), "--device", "cpu"])
    main(["--onnx", DEFAULT, "--n", "2", "--out", str(tmp_path / "b.png"), "--device", "cpu"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_file_goes_before_a_built_in_generator_of_that_name(
    tmp_path: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, DEFAULT)
    main(["--onnx", DEFAULT, "--n", "1", "--out", "one/", "--device", "cpu"])
    with Image.open("one/cat-000000.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize("name", builtin_models())
def test_a_built_in_generator_is_small_and_says_where_it_comes_from(name: str) -> None:
    path = builtin_models()[name]
    assert path.stat().st_size <= 3_000_000
    generator = Generator(path, "cpu")
    assert generator.size >= 64
    for key in ("recipe", "kimg", "metric", "metric_value", "dataset_digest", "weights_sha256", "tools"):
        assert generator.metadata[key], key
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert generator.metadata["weights_sha256"] in card


def test_the_list_has_built_in_generators_and_those_of_runs(
    make_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    facts = {"size": "8", "z_dim": "16", "recipe": "tiny", "kimg": "2.5", "metric": "fd2k_x", "metric_value": "12.345"}
    for name, metadata in (("b", {}), ("a", facts)):
        (runs / name / "best").mkdir(parents=True)
        shutil.copy(make_onnx(metadata=metadata), runs / name / "best" / "gen.onnx")
    (runs / "broken" / "best").mkdir(parents=True)
    (runs / "broken" / "best" / "gen.onnx").write_bytes(b"\x12\xff")
    (runs / "in-training" / "best").mkdir(parents=True)
    run_command(NAME, main, ["--list", str(runs)])
    out, err = capsys.readouterr()
    models = {model["onnx"]: model for model in json.loads(out)["models"]}
    paths = [str(runs / name / "best" / "gen.onnx") for name in ("a", "b")]
    assert list(models) == [*builtin_models(), *paths]
    expected = {"size": 8, "recipe": "tiny", "kimg": 2.5, "metric": "fd2k_x", "metric_value": 12.345}
    assert expected.items() <= models[paths[0]].items()
    assert models[paths[1]]["metric_value"] is None
    assert "left out" in err
    assert "fd2k_x 12.35" in err or "fd2k_x 12.34" in err
    for path in paths:
        assert main(["--onnx", path, "--n", "1", "--out", str(tmp_path / "one.png")])["n"] == 1


def test_without_runs_the_list_has_the_built_in_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [model["onnx"] for model in main(["--list"])["models"]] == list(builtin_models())


@pytest.mark.parametrize("other", [["--n", "3"], ["--labels"], ["--onnx", "gen.onnx"], ["--psi", "0.5"]])
def test_the_list_takes_no_other_options(other: list[str]) -> None:
    with pytest.raises(UserError, match="--list writes no images"):
        main(["--list", *other])


def test_the_service_has_the_built_in_generator_without_an_argument_and_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("starlette")
    from infer.service import server

    served: list[str] = []
    monkeypatch.setattr(server, "serve", lambda target, *_: served.append(target) or {})
    main(["serve"])
    main(["serve", DEFAULT])
    main(["serve", "gen.onnx"])
    assert served == [str(builtin_models()[DEFAULT])] * 2 + ["gen.onnx"]
