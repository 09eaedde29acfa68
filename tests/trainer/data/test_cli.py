from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from catgan.command import UserError
from trainer.data.cli import entry, main


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "text.jpg").write_text("meow")
    return folder


def test_build_and_verify(pics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    result = main(["build", str(pics), out, "--size", "32", "--processes", "1"])
    assert result == {
        "out": out,
        "read": 13,
        "kept": 12,
        "rejected": 1,
        "shards": 12,
        "reasons": {"not a picture": 1},
        "resumed": 0,
        "ignored_profiles": 0,
    }
    printed = capsys.readouterr().err
    assert "rejected: 1 not a picture; each is listed in" in printed
    assert "enlarged: 12 images smaller than 32 pixels; --min-size 32 rejects them" in printed
    checked = main(["verify", out])
    assert {**checked, "digest": len(checked["digest"])} == {"ok": True, "images": 12, "shards": 12, "digest": 64}


def test_dry_run_prints_the_same_and_writes_nothing(pics: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = ["build", str(pics), out, "--size", "32", "--processes", "1"]
    counted = main([*arguments, "--dry-run"])
    assert os.listdir(tmp_path) == ["pics"]  # noqa: PTH208
    assert main(arguments) == counted


def test_options_of_build_are_in_the_manifest(pics: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n1.png,one\n2.png,two\n")
    options = ["--labels", str(tmp_path / "labels.csv"), "--keep", "dark,flat", "--crop", "none", "--seed", "3"]
    result = main(["build", str(pics), str(tmp_path / "out"), "--size", "16", "--processes", "1", *options])
    assert result["reasons"] == {"no label": 11}
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert record["labels"] == ["one", "two"]
    assert record["seed"] == 3
    assert record["options"] == {
        "size": 16,
        "crop": "none",
        "min_size": 8,
        "keep": ["dark", "flat"],
        "val_fraction": 0.1,
    }


def test_paths_and_options_in_any_order(pics: Path, tmp_path: Path) -> None:
    arguments = ["build", str(pics), "--size", "8", str(pics / "1.png"), "--processes", "1", str(tmp_path / "out")]
    result = main([*arguments, "--val-fraction", "0"])
    assert (result["read"], result["kept"], result["rejected"]) == (14, 12, 2)
    assert not (tmp_path / "out" / "val-000000.tar").exists()


def test_synth_draws_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> bytes:
        arguments = ["--num", "20", "--size", "16", "--seed", str(seed), "--processes", "1"]
        result = main(["synth", str(tmp_path / name), *arguments])
        assert result == {"out": str(tmp_path / name), "read": 20, "kept": 20, "rejected": 0, "shards": 17}
        return (tmp_path / name / "train-000000.tar").read_bytes()

    first = draw("a", 0)
    assert draw("b", 0) == first
    assert draw("c", 1) != first
    assert main(["verify", str(tmp_path / "a")])["images"] == 20


def test_synth_keeps_the_attributes(tmp_path: Path) -> None:
    main(["synth", str(tmp_path / "out"), "--num", "2", "--size", "16", "--processes", "1"])
    (sample,) = webdataset.WebDataset(str(tmp_path / "out" / "val-000000.tar"), shardshuffle=False).decode("pil")
    assert sample["webp"].size == (16, 16)
    assert len(sample["json"]) > 3


@pytest.mark.parametrize(("size", "is_warned"), [(31, True), (32, False)])
@pytest.mark.parametrize("command", ["build", "synth"])
def test_a_size_that_no_recipe_trains_at_is_a_warning(
    pics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, size: int, is_warned: bool
) -> None:
    given = [str(pics)] if command == "build" else ["--num", "2"]
    main([command, *given, str(tmp_path / "out"), "--size", str(size), "--processes", "1"])
    warning = f"warning: --size {size}: recipes train at 8, 16, 32, 64, 128, 256, 512 pixels only"
    assert (warning in capsys.readouterr().err) == is_warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "command"),
        ("frobnicate", "invalid choice: 'frobnicate' .*synth.*build.*verify"),
        ("build", "SRC... OUT"),
        ("build a", "only one path is given, a"),
        ("build a b --size 4", "--size: '4' is given, allowed is a whole number from 8 to 1,024"),
        ("build a b --size 64.5", "--size: '64.5' is given"),
        ("build a b --size", "--size: expected one argument"),
        ("build a b --crop wild", "invalid choice: 'wild'"),
        ("build a b --val-fraction 0.6", "--val-fraction: '0.6' is given, allowed is a number from 0 to 0.5"),
        ("build a b --val-fraction nan", "--val-fraction: 'nan'"),
        ("build a b --seed -1", "--seed: '-1'"),
        ("build a b --min 3 --sizes 4", "unrecognized arguments: --min 3 --sizes 4"),
        ("build /nowhere/a b", "nothing at /nowhere/a"),
        ("build ftp://host/a b", "ftp://host/a: give a path, or a URL that begins with s3://"),
        ("build http://user:word@host/a.zip b", "credentials are read from the environment"),
        ("build . http://host/a", "http://host/a: nothing can be written to a web server"),
        ("build a b --keep dark,light", "'light' is given, allowed are near-duplicate, narrow, dark"),
        ("build . b --faces all", "--faces all needs --crop face"),
        ("build . b --labels none.csv", "cannot read none.csv: .*--labels takes `folder` or a CSV"),
        ("synth", "OUT"),
        ("synth a b", "unrecognized arguments: b"),
        ("synth a --num 0", "--num: '0' is given"),
        ("synth s3://bucket/a", "is a URL"),
        ("verify", "DIR"),
        ("verify /nowhere/a", "no data set at /nowhere/a"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        main(arguments.split())
    assert "\n" not in str(caught.value)
    assert os.listdir() == []  # noqa: PTH208


@pytest.mark.parametrize("command", [[], ["synth"], ["build"], ["verify"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert f"  catdata {' '.join(command)}" in capsys.readouterr().out


def test_the_result_is_one_line_of_json(
    pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(pics), str(tmp_path / "out"), "--size", "32", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["catdata", *arguments])
    entry()
    assert json.loads(capsys.readouterr().out)["kept"] == 12


def test_a_mistake_exits_with_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["catdata", "verify", "/nowhere"])
    with pytest.raises(SystemExit) as caught:
        entry()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def processes_of(group: int) -> set[int]:
    """The running processes of a group, without zombies."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # has ended in the meantime
            pid, rest = stat.parent.name, stat.read_text().rpartition(")")[2].split()
            if int(rest[2]) == group and rest[0] != "Z":
                found.add(int(pid))
    return found


def is_safe_from_interrupts(pid: int) -> bool:
    """Whether the process blocks or ignores SIGINT."""
    with contextlib.suppress(OSError):
        masks = re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return any(int(mask, 16) & 1 << (signal.SIGINT - 1) for mask in masks)
    return False


def restore_interrupts() -> None:
    """For a child process: SIGINT is ignored in background jobs of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_and_can_be_repeated(tmp_path: Path, how: signal.Signals) -> None:
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")
    with tarfile.open(tmp_path / "slow.tar", "w") as tar:
        for i in range(400):  # quick to write, half a minute to decode
            tar.add(tmp_path / "large.png", f"{i}.png")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.data.cli", "build", str(tmp_path / "slow.tar"), str(out), "--processes", "2"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=restore_interrupts,
    )
    try:
        # Two processes of multiprocessing and two workers have started.
        wait_until(lambda: len(processes_of(process.pid)) == 5)
        assert all(is_safe_from_interrupts(pid) for pid in processes_of(process.pid) - {process.pid})
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        assert process.wait(60) == (-how if how == signal.SIGKILL else 130)
        wait_until(lambda: not processes_of(process.pid))
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    # Ctrl-C also removes the work folder, because it has no finished image.
    assert (tmp_path / ".out.partial").is_dir() or how == signal.SIGINT
    options = ["--size", "32", "--processes", "1", "--keep", "dark,flat,blurred"]
    assert main(["build", str(tmp_path / "large.png"), str(out), *options])["kept"] == 1
    assert list(tmp_path.glob(".out.*")) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("command", ["build", "synth"])
def test_ctrl_c_while_processes_start_is_one_line(pics: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(pics), str(out)] if command == "build" else ["synth", str(out), "--num", "1000"]
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.data.cli", *arguments, "--processes", "2"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    ) as process:
        wait_until(lambda: len(processes_of(process.pid)) == 3)  # no worker yet
        os.killpg(process.pid, signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "catdata: interrupted"
    assert not list(tmp_path.glob("*out*"))


def test_paths_with_dots_are_resolved_once(pics: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,cat\n" for i in range(12)))
    options = ["--size", "32", "--processes", "1", "--labels", f"{tmp_path}/nope/../labels.csv"]
    result = main(["build", f"{tmp_path}/none/../pics", f"{tmp_path}/nope/../out", *options])
    assert result["out"] == str(tmp_path / "out")
    assert result["kept"] == main(["verify", f"{tmp_path}/nope/../out"])["images"] == 12
    assert main(["build", str(pics), f"{tmp_path}/link/../out", *options])["out"] == str(tmp_path / "deep" / "out")
    assert main(["verify", f"{tmp_path}/link/../out"])["images"] == 12
    main(["synth", f"{tmp_path}/link/../drawn", "--num", "2", "--size", "16"])
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "labels.csv", "link", "out", "pics"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"drawn", "er", "out"}


def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for arguments in ([str(tmp_path / "loop"), str(tmp_path / "out")], [str(tmp_path), str(tmp_path / "loop" / "out")]):
        with pytest.raises(UserError):
            main(["build", *arguments])


def test_data_sets_in_a_source_are_passed_over_in_one_line(
    pics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--size", "16", "--processes", "1"]
    first = main(["build", str(pics), str(pics / "shards"), *options])
    Image.new("RGB", (40, 40), "red").save(pics / "contact.png")
    capsys.readouterr()
    again = main(["build", str(pics), str(tmp_path / "out"), *options, "--keep", "flat,blurred"])
    assert (again["read"], again["kept"]) == (first["read"] + 1, first["kept"] + 1), (
        "the user's own contact.png is read"
    )
    assert "skipped, since they are no photos: the files of pics/shards (data set)\n" in capsys.readouterr().err


def test_sheets_and_folders_of_sheets_are_no_sources(pics: Path, tmp_path: Path) -> None:
    main(["build", str(pics), str(tmp_path / "sets" / "a"), "--size", "16", "--processes", "1"])
    for name in ("contact.png", "rejected.csv"):
        with pytest.raises(UserError, match=r"part of the data set in .*a: give photos, or a whole data set"):
            main(["build", str(tmp_path / "sets" / "a" / name), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"there are no files of images, except those of sets/a \(data set\)"):
        main(["build", str(tmp_path / "sets"), str(tmp_path / "out")])
    shard = tmp_path / "sets" / "a" / "train-000000.tar"
    assert main(["build", str(shard), str(tmp_path / "out"), "--size", "16", "--processes", "1"])["kept"] == 1


def test_drawn_cats_of_the_cache_are_those_of_synth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.config import LoaderConfig
    from trainer.data import open as opening

    monkeypatch.setattr(opening, "NUM_DRAWN", 3)
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    root = Path(opening.open_data(None, 16, LoaderConfig()).root)
    main(["synth", str(tmp_path / "out"), "--num", "3", "--size", "16"])
    assert (root / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
