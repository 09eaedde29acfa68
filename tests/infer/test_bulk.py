from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
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
from infer.output import parse_output
from infer.provenance import SOURCE_TYPE
from infer.session import Generator

ROOT = Path(__file__).parents[2]


def make(onnx: Path, out: Path, n: int = 25, *, first: int = 0, **more: Any) -> dict[str, Any]:
    psi, metadata = more.pop("psi", 1.0), more.pop("metadata", True)
    output = parse_output(str(out), **more)
    return generate(Order(str(onnx), range(first, first + n), psi, output, device="cpu", metadata=metadata))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards and updates of the state file for few images."""
    monkeypatch.setattr(bulk, "SHARD", 10)
    monkeypatch.setattr(bulk, "PART", 10)
    monkeypatch.setattr(module, "CHUNK", 4)


def die_after(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Interrupt the generator after so many images."""
    made = 0
    run = Generator._run

    def dying(self: Generator, z: np.ndarray) -> np.ndarray:
        nonlocal made
        made += 1
        if made > images:
            raise KeyboardInterrupt
        return run(self, z)

    monkeypatch.setattr(Generator, "_run", dying)


@pytest.mark.usefixtures("small_parts")
def test_shards_are_a_data_set_for_training(onnx_file: Path, tmp_path: Path) -> None:
    from trainer.data.cli import main as catdata
    from trainer.metrics.catfid.sides import ImageSet, open_side

    result = make(onnx_file, tmp_path / "out", 25, first=3, shards=True, psi=0.5)
    assert result["n"] == 25
    names = ["contact.png", "manifest.json", "train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert sorted(files(tmp_path / "out")) == names
    found = catdata(["verify", str(tmp_path / "out")])
    assert {key: found[key] for key in ("ok", "images", "shards")} == {"ok": True, "images": 25, "shards": 3}
    side = open_side(str(tmp_path / "out"), split=None, num=25, seed=0)
    assert isinstance(side, ImageSet)
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
    origin = {"digital_source_type": SOURCE_TYPE, "generator_sha256": Generator(onnx_file, "cpu").sha256}
    assert [record for *_, record in samples] == [{**origin, "psi": 1.0, "seed": seed} for seed in range(5, 17)]
    expected = Generator(onnx_file, "cpu")(latents([16], 16))[0]
    np.testing.assert_array_equal(np.asarray(samples[-1][1]), expected)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("shards", [True, False])
def test_stopped_work_continues_to_the_same_bytes(
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
    left = tmp_path / "stopped" / (".77.partial.train-000003.tar" if shards else ".77.partial.cat-000030.png")
    left.write_bytes(b"half")  # as after a kill
    made: list[int] = []
    run = Generator._run
    monkeypatch.setattr(Generator, "_run", lambda self, z: (made.append(1), run(self, z))[1])
    make(onnx_file, tmp_path / "stopped", 45, shards=shards)
    assert len(made) == 45 - state["done"] + (45 if shards else 0)  # with those of the contact sheet
    assert f"continuing after {state['done']} images" in capsys.readouterr().err
    assert files(tmp_path / "stopped") == whole


@pytest.mark.usefixtures("small_parts")
def test_shards_that_were_cut_or_removed_are_written_again(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(onnx_file, tmp_path / "whole", 45, shards=True)
    for damage in (lambda path: os.truncate(path, 0), os.unlink):  # a power failure leaves the first
        out = tmp_path / damage.__name__
        with monkeypatch.context() as patch:
            patch.setattr(module, "CONTACTS", 1)
            patch.setattr("infer.files._AHEAD", 0)
            die_after(patch, 34)
            with pytest.raises(KeyboardInterrupt):
                make(onnx_file, out, 45, shards=True)
        damage(out / "train-000001.tar")
        capsys.readouterr()
        make(onnx_file, out, 45, shards=True)
        assert "continuing after 10 images" in capsys.readouterr().err
        assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("shards", [True, False])
def test_a_second_command_in_the_same_folder_is_refused(onnx_file: Path, tmp_path: Path, shards: bool) -> None:
    script = """if True:
        import pathlib, sys
        from catgan.files import locked_folder
        with locked_folder(pathlib.Path(sys.argv[1])):
            print("locked", flush=True)
            sys.stdin.read()
    """
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=r"out: another process is writing there"):
            make(onnx_file, tmp_path / "out", 3, shards=shards)
        assert files(tmp_path / "out") == {}
        other.communicate()
    make(onnx_file, tmp_path / "out", 3, shards=shards)


def test_what_another_process_has_finished_is_not_replaced(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes between the first look into the folder and the lock."""
    prepare = module._prepare

    def slowly(order: Order) -> Any:
        prepared = prepare(order)
        monkeypatch.setattr(module, "_prepare", prepare)
        make(onnx_file, tmp_path / "out", 3, shards=True)
        return prepared

    monkeypatch.setattr(module, "_prepare", slowly)
    with pytest.raises(UserError, match="is not empty; shards need a folder of their own"):
        make(onnx_file, tmp_path / "out", 3, first=100, shards=True)


def test_a_job_killed_before_its_first_shard_continues(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(onnx_file, tmp_path / "whole", shards=True)
    with monkeypatch.context() as patch:
        die_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            make(onnx_file, tmp_path / "killed", shards=True)
    (tmp_path / "killed" / ".77.partial.contact.png").write_bytes(b"half")  # as after a kill
    make(onnx_file, tmp_path / "killed", shards=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "change",
    [{"psi": 0.5}, {"n": 26}, {"first": 1}, {"shards": True}, {"suffix": ".webp"}, {"metadata": False}],
)
def test_another_command_does_not_continue(
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
def test_another_generator_does_not_continue(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            make(make_onnx(), tmp_path / "out")
    with pytest.raises(UserError, match="unfinished work of another command"):
        make(make_onnx(scale=2.0), tmp_path / "out")


def test_a_damaged_state_file_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / bulk.STATE).write_bytes(b"{")
    with pytest.raises(UserError, match=r"\.catinfer\.json: cannot be read .* delete it to start over"):
        make(onnx_file, tmp_path / "out")


def test_shards_need_an_empty_folder(onnx_file: Path, tmp_path: Path) -> None:
    make(onnx_file, tmp_path / "out", 3, shards=True)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="is not empty; shards need a folder of their own"):
        make(onnx_file, tmp_path / "out", 3, shards=True)
    assert files(tmp_path / "out") == before


@pytest.mark.slow
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
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    done = subprocess.run([*command, str(stopped)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "continuing after" in done.stderr
    assert files(stopped) == files(tmp_path / "whole")


def test_images_do_not_depend_on_number_threads_or_process(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images depend on their seeds, not on their number, threads, latents per call or process."""
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


def test_the_number_of_waiting_images_is_bounded(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator waits for a slow writer."""
    from infer import files as module_files

    monkeypatch.setattr(module_files, "_AHEAD", 5)
    made = 0

    def images() -> Any:
        nonlocal made
        for _ in range(100):
            made += 1
            yield np.zeros((8, 8, 3), np.uint8)

    for written, content in enumerate(module_files.encode_all(images(), ".png")):
        assert made <= written + 6
        assert content.startswith(b"\x89PNG")
    assert made == 100


def test_other_files_in_the_folder_stay(onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", ".7.partial.notes.txt", "cat-000001.png"):
        (out / name).write_text("mine")
    make(onnx_file, out, 2)
    assert sorted(files(out)) == [".7.partial.notes.txt", "cat-000000.png", "cat-000001.png", "notes.txt"]
    assert Image.open(out / "cat-000001.png").size == (8, 8)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("metadata", [True, False])
def test_an_upgrade_within_a_job_does_not_mix_files(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: bool
) -> None:
    """Files name the version that made them. Without metadata another version continues, one before metadata too."""
    with monkeypatch.context() as patch:
        die_after(patch, 24)
        with pytest.raises(KeyboardInterrupt):
            make(onnx_file, tmp_path / "out", metadata=metadata)
    settings = json.loads((tmp_path / "out" / bulk.STATE).read_bytes())["settings"]
    earlier = {"generator_sha256", "seeds_sha256", "psi", "suffix", "provider", "shards"}
    assert set(settings) == earlier | ({"software"} if metadata else set())
    monkeypatch.setattr(module, "this_software", lambda: "catgan 99")
    if metadata:
        with pytest.raises(UserError, match="another command"):
            make(onnx_file, tmp_path / "out")
    else:
        make(onnx_file, tmp_path / "out", metadata=False)
        assert len(files(tmp_path / "out")) == 25


def test_without_metadata_the_attributes_in_shards_are_as_before(onnx_file: Path, tmp_path: Path) -> None:
    make(onnx_file, tmp_path / "out", 2, shards=True, metadata=False)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        contents = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    assert contents["00000001.json"] == b'{"psi":1.0,"seed":1}'
    assert b"xmp" not in contents["00000001.png"].lower()
    assert b"xmp" not in (tmp_path / "out" / "contact.png").read_bytes().lower()
