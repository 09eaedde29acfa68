from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from infer import bulk
from infer import generate as module
from infer.generate import Order, generate
from infer.latents import latents
from infer.session import Generator

ROOT = Path(__file__).parents[2]


def make(onnx: Path, out: Path, n: int = 25, *, first: int = 0, **more: Any) -> dict[str, Any]:
    return generate(Order(str(onnx), range(first, first + n), out=str(out), device="cpu", **more))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards and notes of the progress for few pictures."""
    monkeypatch.setattr(bulk, "SHARD", 10)
    monkeypatch.setattr(bulk, "PART", 10)
    monkeypatch.setattr(module, "CHUNK", 4)


def die_after(monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    """A later process fails once it has made so many pictures."""
    made = 0
    run = Generator._run

    def dying(self: Generator, z: np.ndarray) -> np.ndarray:
        nonlocal made
        made += 1
        if made > pictures:
            raise KeyboardInterrupt
        return run(self, z)

    monkeypatch.setattr(Generator, "_run", dying)


@pytest.mark.usefixtures("small_parts")
def test_shards_are_a_data_set_of_the_training_side(onnx_file: Path, tmp_path: Path) -> None:
    from trainer.data.cli import main as catdata
    from trainer.metrics.catfid.sides import Pictures, open_side

    result = make(onnx_file, tmp_path / "out", 25, first=3, shards=True, psi=0.5)
    assert result["n"] == 25
    names = ["contact.png", "manifest.json", "train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert sorted(files(tmp_path / "out")) == names
    found = catdata(["verify", str(tmp_path / "out")])
    assert {key: found[key] for key in ("ok", "images", "shards")} == {"ok": True, "images": 25, "shards": 3}
    side = open_side(str(tmp_path / "out"), split=None, num=25, seed=0)
    assert isinstance(side, Pictures)
    pixels = np.concatenate([batch.numpy() for batch in side.batches()]).transpose(0, 2, 3, 1)
    expected = Generator(onnx_file, "cpu")(latents(range(3, 28), 16) * np.float32(0.5))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.usefixtures("small_parts")
def test_shards_are_read_by_stock_webdataset(onnx_file: Path, tmp_path: Path) -> None:
    import webdataset

    make(onnx_file, tmp_path / "out", 12, first=5, shards=True)
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "json"))
    assert [key for key, *_ in samples] == [f"{seed:08d}" for seed in range(5, 17)]
    assert [record for *_, record in samples] == [{"psi": 1.0, "seed": seed} for seed in range(5, 17)]
    expected = Generator(onnx_file, "cpu")(latents([16], 16))[0]
    np.testing.assert_array_equal(np.asarray(samples[-1][1]), expected)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("shards", [True, False])
def test_stopped_work_goes_on_to_the_same_bytes(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: bool
) -> None:
    make(onnx_file, tmp_path / "whole", 45, shards=shards)
    whole = files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "CONTACTS", 1)
        patch.setattr("infer.files._AHEAD", 0)
        patch.setattr(bulk, "remove_partials", lambda *_: None)
        die_after(patch, 34)
        with pytest.raises(KeyboardInterrupt):
            make(onnx_file, tmp_path / "stopped", 45, shards=shards)
    state = json.loads((tmp_path / "stopped" / bulk.STATE).read_bytes())
    assert 10 <= state["done"] < 40
    assert "manifest.json" not in files(tmp_path / "stopped")
    left = tmp_path / "stopped" / (".train-000003.tar.77.partial" if shards else ".cat-000030.png.77.partial")
    left.write_bytes(b"half")  # as of a process that was killed
    made: list[int] = []
    run = Generator._run
    monkeypatch.setattr(Generator, "_run", lambda self, z: (made.append(1), run(self, z))[1])
    make(onnx_file, tmp_path / "stopped", 45, shards=shards)
    assert len(made) == 45 - state["done"] + (45 if shards else 0)  # and the contact sheet's
    assert f"going on after {state['done']} pictures" in capsys.readouterr().err
    assert files(tmp_path / "stopped") == whole


def test_killed_before_the_first_shard_it_goes_on(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(onnx_file, tmp_path / "whole", shards=True)
    with monkeypatch.context() as patch:
        die_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            make(onnx_file, tmp_path / "killed", shards=True)
    (tmp_path / "killed" / ".contact.png.77.partial").write_bytes(b"half")  # as of a process that was killed
    make(onnx_file, tmp_path / "killed", shards=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("change", [{"psi": 0.5}, {"n": 26}, {"first": 1}, {"shards": True}, {"suffix": ".webp"}])
def test_another_command_does_not_go_on(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            make(onnx_file, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds the unfinished work of another command; .* delete .*\.catinfer\.json"):
        make(onnx_file, tmp_path / "out", **change)
    assert files(tmp_path / "out") == before


@pytest.mark.usefixtures("small_parts")
def test_another_generator_does_not_go_on(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            make(make_onnx(), tmp_path / "out")
    with pytest.raises(UserError, match="unfinished work of another command"):
        make(make_onnx(scale=2.0), tmp_path / "out")


def test_a_damaged_note_of_the_progress_is_named(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / bulk.STATE).write_bytes(b"{")
    with pytest.raises(UserError, match=r"\.catinfer\.json: cannot be read .* delete it to begin anew"):
        make(onnx_file, tmp_path / "out")


def test_shards_take_no_folder_with_something_in_it(onnx_file: Path, tmp_path: Path) -> None:
    make(onnx_file, tmp_path / "out", 3, shards=True)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; shards need a folder of their own"):
        make(onnx_file, tmp_path / "out", 3, shards=True)
    assert files(tmp_path / "out") == before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("options", [("--shards",), ()])
def test_killed_processes_end_with_the_same_bytes(onnx_file: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", "from infer.cli import entry; entry()", "--onnx", str(onnx_file)]
    command += ["--n", "4000", "--device", "cpu", *options, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    stopped = tmp_path / "stopped"
    for least in (1, 2):
        process = subprocess.Popen(
            [*command, str(stopped)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        pattern = f"train-*{least}.tar" if options else f"cat-00{least}*.png"
        deadline = time.monotonic() + 60
        while not any(stopped.glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was faster than its killer"
    done = subprocess.run([*command, str(stopped)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "going on after" in done.stderr
    assert files(stopped) == files(tmp_path / "whole")


def test_pictures_are_the_same_in_every_way(onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the number of pictures, of threads and of latents in a call, and in another process."""
    make(onnx_file, tmp_path / "a", 20)
    expected = files(tmp_path / "a")
    for threads, chunk in ((1, 1), (3, 7), (5, 64)):
        monkeypatch.setattr("infer.session.cores", lambda threads=threads: threads)
        monkeypatch.setattr("infer.files.cores", lambda threads=threads: threads)
        monkeypatch.setattr(module, "CHUNK", chunk)
        out = tmp_path / f"{threads}"
        make(onnx_file, out, 17, first=3)
        assert files(out) == {name: expected[name] for name in sorted(expected)[3:]}
    code = "from infer.cli import entry; entry()"
    out = tmp_path / "other"
    subprocess.run(
        [sys.executable, "-c", code, "--onnx", onnx_file, "--n", "20", "--out", out, "--device", "cpu"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert files(out) == expected


def test_memory_is_bounded_by_the_pictures_ahead(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow writer holds the generator back."""
    from infer import files as module_files

    monkeypatch.setattr(module_files, "_AHEAD", 5)
    made = 0

    def pictures() -> Any:
        nonlocal made
        for _ in range(100):
            made += 1
            yield np.zeros((8, 8, 3), np.uint8)

    for written, content in enumerate(module_files.encoded(pictures(), ".png")):
        assert made <= written + 6
        assert content.startswith(b"\x89PNG")
    assert made == 100


def test_files_of_the_folder_that_are_not_ours_stay(onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", ".notes.txt.7.partial", "cat-000001.png"):
        (out / name).write_text("mine")
    make(onnx_file, out, 2)
    assert sorted(files(out)) == [".notes.txt.7.partial", "cat-000000.png", "cat-000001.png", "notes.txt"]
    assert Image.open(out / "cat-000001.png").size == (8, 8)
