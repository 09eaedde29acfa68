"""A build that was stopped continues, and makes the same data set as an uninterrupted one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError, without_queries
from catgan.dataset import Shard
from trainer.data.build import prepare, sources
from trainer.data.build.build import Report, build
from trainer.data.build.errors import ResumableError
from trainer.data.build.folder import work_folder
from trainer.data.build.store import Store
from trainer.data.build.verify import verify

pytestmark = pytest.mark.slow

NUM = 30


def fill(folder: Path, num: int, side: int) -> Path:
    folder.mkdir()
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png", compress_level=1)
    (folder / "broken.png").write_bytes(b"x")
    return folder


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    return fill(tmp_path / "pics", NUM, 20)


def run(source: Path, out: Path, **options: Any) -> Report:
    return build([source], out, **{"size": 16, "processes": 0, **options})[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def known(work: Path) -> int:
    with Store(work, 0) as store:
        return sum(1 for _ in store.files())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the files that are decoded in this process."""
    lengths: list[int] = []
    original = prepare.decode_reduced

    def counting(data: bytes, *args: Any) -> Any:
        lengths.append(len(data))
        return original(data, *args)

    monkeypatch.setattr(prepare, "decode_reduced", counting)
    return lengths


class Stop(BaseException):
    """Stops a build like a kill: nothing catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Commit each file, and raise ``error`` instead of adding one more than ``number``."""
    monkeypatch.setattr("trainer.data.build.store._COMMIT_SECONDS", 0)
    original = Store.add
    left = iter(range(number))

    def add(self: Store, *args: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise error
        original(self, *args, **options)

    monkeypatch.setattr(Store, "add", add)


def test_killed_process_continues_and_makes_the_same(tmp_path: Path, decoded: list[int]) -> None:
    num = 800
    source = fill(tmp_path / "pics", num, 160)
    # Commits each file, so that the speed of the machine does not decide what is stored when the kill comes.
    code = "from trainer.data import cli; from trainer.data.build import store; store._COMMIT_SECONDS = 0; cli.entry()"
    command = [sys.executable, "-c", code, "build", str(source), str(tmp_path / "out"), "--size", "32"]
    process = subprocess.Popen([*command, "--processes", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.partial"
    try:
        end = time.monotonic() + 60
        while not (work / "work.sqlite").exists() or (work / "work.sqlite").stat().st_size < 200_000:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = known(work)
    assert 0 < done < num
    assert not (tmp_path / "out").exists()
    report = run(source, tmp_path / "out", size=32)
    assert (report.resumed, report.kept, report.rejected) == (done, num, {"not a picture": 1})
    assert len(decoded) == num + 1 - done
    assert not work.exists()
    run(source, tmp_path / "whole", size=32)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def make_zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)


def make_tar(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


@pytest.mark.parametrize("pack", [None, make_zip, make_tar])
def test_recorded_files_are_not_read_again(
    pics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[int],
    pack: Callable[[Path, Path], None] | None,
) -> None:
    source = tmp_path / "packed" if pack else pics
    if pack:
        pack(pics, source)
    with monkeypatch.context() as patch:
        stop_after(patch, 20, Stop())
        with pytest.raises(Stop):
            run(source, tmp_path / "out")
    decoded.clear()
    reads = []
    original = sources.Member.read
    monkeypatch.setattr(sources.Member, "read", lambda self: reads.append(self.name) or original(self))
    assert run(source, tmp_path / "out").resumed == 20
    assert len(reads) == len(decoded) == NUM + 1 - 20
    run(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ResumableError("no network"), OSError(28, "No space left on device")]
)
def test_work_is_kept_after_failures(
    pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, error)
        with pytest.raises(type(error) if not isinstance(error, OSError) else ResumableError) as caught:
            run(pics, tmp_path / "out")
    if isinstance(caught.value, UserError):
        assert "run the same command to continue" in str(caught.value)
    assert known(tmp_path / ".out.partial") == 7
    assert run(pics, tmp_path / "out").resumed == 7


@pytest.mark.parametrize(
    "options", [{"size": 8}, {"seed": 1}, {"val_fraction": 0.5}, {"min_size": 1}, {"keep": ["dark"]}, {"crop": "none"}]
)
def test_other_options_start_over(
    pics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Stop())
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    assert run(pics, tmp_path / "out", **options).resumed == 0
    assert "other options or sources: starting over" in capsys.readouterr().err
    run(pics, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def remove_first(pics: Path) -> None:
    (pics / "0000.png").unlink()


def add_one(pics: Path) -> None:
    shutil.copy(pics / "0009.png", pics / "0000a.png")


def change_one(pics: Path) -> None:
    shutil.copy(pics / "broken.png", pics / "0003.png")


def remove_most(pics: Path) -> None:
    for path in sorted(pics.iterdir())[5:]:
        path.unlink()


@pytest.mark.parametrize("change", [remove_first, add_one, change_one, remove_most])
def test_changed_folder_starts_over(
    pics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Stop())
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    change(pics)
    assert run(pics, tmp_path / "out").resumed == 0
    assert "has changed since the build was stopped: starting over" in capsys.readouterr().err
    run(pics, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_added_at_the_end_are_read_too(pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Stop())
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    shutil.copy(fill(tmp_path / "more", NUM + 1, 20) / f"{NUM:04d}.png", pics / "z.png")
    report = run(pics, tmp_path / "out")
    assert (report.resumed, report.kept) == (7, NUM + 1)


def test_build_that_was_stopped_while_writing_keeps_its_shards(
    pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    from trainer.data.build import shards

    original = shards._write_shard
    written: list[str] = []

    def write(path: Path, *args: Any) -> Shard:
        if len(written) == 5:
            path.write_bytes(b"half")
            raise Stop
        shard = original(path, *args)
        written.append(path.name)
        return shard

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", write)
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    decoded.clear()
    again: list[str] = []
    monkeypatch.setattr(shards, "_write_shard", lambda path, *args: again.append(path.name) or original(path, *args))
    assert run(pics, tmp_path / "out").resumed == NUM + 1
    assert decoded == []
    assert again
    assert not set(written) & set(again)
    run(pics, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_store_starts_over(pics: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "work.sqlite").write_bytes(b"no data base" * 1000)
    report = run(pics, tmp_path / "out")
    assert (report.resumed, report.kept) == (0, NUM)


def test_format_of_the_store_stays_readable_for_builds_that_were_begun_earlier(
    pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change the store only together with its format number: stores of another format start over."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Stop())
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    with contextlib.closing(sqlite3.connect(tmp_path / ".out.partial" / "work.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {table: [column[1] for column in db.execute(f"PRAGMA table_info({table})")] for table in tables}
        sample = db.execute("SELECT file, name, kind, place, width, height FROM samples").fetchone()
        job = json.loads(*db.execute("SELECT value FROM notes WHERE name = 'job'").fetchone())
    samples = "id file name length version kind reason score place width height label signature ignores_profile bytes"
    assert columns == {
        "notes": ["name", "value"],
        "samples": samples.split(),
        "pictures": ["id", "picture", "record"],
        "shards": ["name", "images", "sha256", "bytes"],
        "uploads": ["name", "version"],
    }
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    digest = hashlib.sha256(b"20x20:" + pixels.tobytes()).digest()
    assert sample == (0, b"pics/0000.png", None, hashlib.sha256(b"0:" + digest).digest(), 20, 20)
    assert {name: value for name, value in job.items() if name != "tool"} == {
        "sources": [[str(pics), "folder", ""]],
        "labels": None,
        "seed": 0,
        "size": 16,
        "crop": "center",
        "min_size": 8,
        "val_fraction": 0.1,
    }


def test_two_processes_with_one_target_are_refused(pics: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    with work_folder(work, tmp_path / "out"):
        (work / "precious").touch()
        with pytest.raises(UserError, match=r"another process is making .*out: wait until it is done, or stop it"):
            run(pics, tmp_path / "out")
        assert (work / "precious").exists()
    assert run(pics, tmp_path / "out").kept == NUM


def test_out_that_is_not_empty_is_refused_before_any_work(pics: Path, tmp_path: Path, decoded: list[int]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not an empty folder: give another OUT"):
        run(pics, tmp_path / "out")
    assert not decoded
    assert {path.name for path in tmp_path.iterdir()} == {"pics", "out"}


def test_dry_run_counts_and_writes_nothing(pics: Path, tmp_path: Path) -> None:
    shutil.copy(pics / "0001.png", pics / "copy.png")
    before = sorted(tmp_path.rglob("*"))
    manifest, counted = build([pics], tmp_path / "out", size=16, processes=0, dry_run=True)
    assert manifest is None
    assert sorted(tmp_path.rglob("*")) == before
    assert run(pics, tmp_path / "out") == counted
    assert counted.rejected == {"not a picture": 1, "duplicate": 1}
    assert counted.shards == len(list((tmp_path / "out").glob("*.tar")))


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 rows of 20 kB each, 200 MB, must not stay in memory."""
    import tracemalloc

    from trainer.data.build.store import File, Sample

    def samples() -> Iterator[tuple[File, Sample]]:
        for i in range(10_000):
            digest = i.to_bytes(32, "big")
            yield File(i, f"{i}.png", 1, ""), Sample(digest * 600, digest, 20, 20, digest)

    tracemalloc.start()
    try:
        with Store(tmp_path, 0) as store:
            for file, sample in samples():
                store.add(file, [sample])
            store.commit()
            assert sum(len(image) for image, *_ in store.ordered()) == 10_000 * 32 * 600
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


def test_nothing_of_an_earlier_job_gets_into_the_data_set(pics: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from trainer.data.build import shards

    original = shards._write_shard

    def write(path: Path, *args: Any) -> Shard:
        if path.name.startswith("val"):
            raise Stop
        return original(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", write)
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")
    assert len(list((tmp_path / ".out.partial").glob("train-*.tar"))) > 5
    for path in list(pics.glob("*.png"))[5:]:
        path.unlink()
    (pics / "one.png").unlink(missing_ok=True)
    report = run(pics, tmp_path / "out", size=8)
    manifest = verify(tmp_path / "out")  # which fails if a shard is not in the manifest
    assert sum(split.images for split in manifest.splits.values()) == report.kept <= 5


def test_work_is_kept_if_the_target_is_created_meanwhile(pics: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from trainer.data.build import build as building

    original = building.publish

    def publish(folder: Path, out: Path) -> None:
        out.mkdir()
        (out / "stranger").touch()
        original(folder, out)

    with monkeypatch.context() as patch:
        patch.setattr(building, "publish", publish)
        with pytest.raises(ResumableError, match="the work so far is kept"):
            run(pics, tmp_path / "out")
    (tmp_path / "out" / "stranger").unlink()
    report = run(pics, tmp_path / "out")
    assert (report.resumed, report.kept) == (NUM + 1, NUM)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".tar", ".json", ".png", ".csv"}


def test_work_is_kept_if_a_source_cannot_be_listed_any_more(
    pics: Path, tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Stop())
        with pytest.raises(Stop):
            run(pics, tmp_path / "out")

    def fail(*_: Any) -> Iterator[Any]:
        raise UserError("stale file handle")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(sources.Source, "_in_folder", fail)
        with pytest.raises(UserError, match="stale"):
            run(pics, tmp_path / "out")
    assert "the work so far is kept in" in capfd.readouterr().err
    assert run(pics, tmp_path / "out").resumed == 7


def test_data_set_that_changes_after_reading_is_read_again(pics: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from trainer.data.build import build as building

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    run(pics, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_data_set", stop)
        with pytest.raises(Stop):
            run(tmp_path / "set", tmp_path / "out")
    shutil.rmtree(tmp_path / "set")
    (pics / "0003.png").unlink()
    run(pics, tmp_path / "set")
    report = run(tmp_path / "set", tmp_path / "out")
    assert (report.resumed, report.kept) == (0, NUM - 1)


def test_sources_that_change_after_reading_are_read_again(pics: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from trainer.data.build import build as building

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    for change in (lambda: (pics / "0003.png").unlink(), lambda: Image.new("L", (20, 20)).save(pics / "zz.png")):
        with monkeypatch.context() as patch:
            patch.setattr(building, "write_data_set", stop)
            with pytest.raises(Stop):
                run(pics, tmp_path / "out")
        change()
    report = run(pics, tmp_path / "out")
    assert (report.resumed, report.kept, report.read) == (0, NUM - 1, NUM + 1)


def test_reasons_and_messages_contain_no_signatures() -> None:
    def gone() -> bytes:
        raise FileNotFoundError("http://127.0.0.1/x.png?X-Amz-Signature=SECRET")

    def broken() -> bytes:
        raise OSError("cannot get http://127.0.0.1/x.png?X-Amz-Signature=SECRET, really")

    for fetch in (gone, broken):
        with pytest.raises(ValueError, match="not readable") as caught:
            sources.Member("x.png", 1, fetch).read()
        assert "SECRET" not in str(caught.value)
    assert without_queries("see s3://a/b?c=SECRET, and http://x/y") == "see s3://a/b, and http://x/y"


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_source_that_disappears_is_not_a_source_of_unreadable_files(
    pics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """A disk that is unplugged, a network mount that is gone: what is left is no folder, or an empty one."""
    plain, count, away = Path.read_bytes, 0, tmp_path / "away"

    def read(path: Path) -> bytes:
        nonlocal count
        count += path.suffix == ".png"
        if count == 11 and not away.exists():
            pics.rename(away)
            if left == "an empty folder":
                pics.mkdir()
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(ResumableError, match=r"pics( is empty now| any more: No such file)"):
            run(pics, tmp_path / "out")
    shutil.rmtree(pics, ignore_errors=True)
    away.rename(pics)
    report = run(pics, tmp_path / "out")
    assert (report.kept, report.rejected) == (NUM, {"not a picture": 1})
    assert run(pics, tmp_path / "again").kept == NUM
