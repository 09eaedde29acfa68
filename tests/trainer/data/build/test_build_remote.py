"""Sources in buckets and on web servers, and data sets in buckets, over the real protocols on loopback."""

from __future__ import annotations

import functools
import http.server
import io
import json
import socket
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem
from moto.server import ThreadedMotoServer
from PIL import Image
from s3fs import S3FileSystem

from catgan import location
from catgan.command import UserError
from catgan.dataset import Manifest
from catgan.location import filesystem
from trainer.data.build import remote, sources
from trainer.data.build.build import Report, build
from trainer.data.build.errors import ResumableError
from trainer.data.build.verify import verify

pytestmark = pytest.mark.slow

NAMES = ["a.png", "b c.png", "katze ü.png", "sub/猫 + 1%.png", "sub/deep/d#e?f.png"]


def packed(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {name: packed(i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    """An empty bucket ``cats``. The environment has its address and credentials, and a cache folder of its own."""
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(location, "_FIRST_PAUSE", 0.001)
    # A thread of the test before may still have written to its bucket while that was being deleted.
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
    place, _ = filesystem("s3://cats")
    place.mkdir("cats")
    yield place
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    for name, data in IMAGES.items():
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pics" / name).write_bytes(data)
    return tmp_path / "pics"


def run(*paths: Path | str, out: Path | str, **options: Any) -> tuple[Manifest, Report]:
    manifest, report = build(paths, out, **{"size": 16, "processes": 0, **options})
    assert manifest is not None
    return manifest, report


def put(place: AbstractFileSystem, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        place.pipe_file(name, data)


def kept(manifest: Manifest) -> set[str]:
    """The names of the kept images."""
    names = set()
    for path in (path for split in ("train", "val") for path in manifest.paths(split)):
        with tarfile.open(fileobj=io.BytesIO(location.read(path))) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    names.add(json.load(content)["source"])
    return names


def test_bucket_is_listed_like_a_folder(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    hidden = {"notes.txt": b"no", ".hidden.png": b"no", "__MACOSX/a.png": b"no"}
    put(bucket, {f"cats/pics/{name}": data for name, data in (IMAGES | hidden | {"page.jpg": b"<html>"}).items()})
    put(bucket, {"cats/pics/folder/": b"", "cats/pictures/other.png": packed(99)})
    (pics / "page.jpg").write_bytes(b"<html>")
    manifest, report = run("s3://cats/pics", out=tmp_path / "out")
    assert kept(manifest) == {f"pics/{name}" for name in NAMES}
    assert report.rejected == {"not a picture": 1}
    local, _ = run(pics, out=tmp_path / "local")
    assert manifest.digest == local.digest
    assert (tmp_path / "out" / "rejected.csv").read_bytes() == (tmp_path / "local" / "rejected.csv").read_bytes()


def test_many_objects_are_read_in_order(bucket: AbstractFileSystem, tmp_path: Path) -> None:
    files = {f"{i:03d}.png": packed(i) for i in range(70)}
    put(bucket, {f"cats/{name}": data for name, data in files.items()})
    members = list(sources.identify("s3://cats").members())
    assert [member.name for member in members] == [f"cats/{name}" for name in files]
    assert run("s3://cats", out=tmp_path / "out", processes=2)[1].kept == 70


def archives(folder: Path) -> dict[str, bytes]:
    """The images as zip, tar and compressed tar."""
    with zipfile.ZipFile(folder / "cats.zip", "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
    for name, mode in (("cats.tar", "w"), ("cats.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:  # type: ignore[call-overload]
            for inside, data in IMAGES.items():
                info = tarfile.TarInfo(inside)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {name: (folder / name).read_bytes() for name in ("cats.zip", "cats.tar", "cats.tar.gz")}


def test_archives_and_single_images_in_a_bucket(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    put(bucket, {f"cats/{name}": data for name, data in (archives(tmp_path) | {"one ü.png": packed(77)}).items()})
    for name in ("cats.zip", "cats.tar", "cats.tar.gz"):
        manifest, report = run(f"s3://cats/{name}", out=tmp_path / f"out-{name}")
        assert manifest.digest == run(tmp_path / name, out=tmp_path / f"local-{name}")[0].digest
        assert kept(manifest) == {f"{name}/{inside}" for inside in NAMES}
        assert not report.rejected
    both, report = run("s3://cats/cats.zip", "s3://cats/one ü.png", pics / "a.png", out=tmp_path / "both")
    assert both.source == ("cats.zip", "one ü.png", "a.png")
    assert (report.kept, report.rejected) == (6, {"duplicate": 1})


def test_listing_a_zip_fetches_little_of_it(
    bucket: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 1 << 12)
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
        for i in range(50):
            archive.writestr(f"{i}.png", packed(i) + bytes(20_000))
    data = (tmp_path / "cats.zip").read_bytes()
    put(bucket, {"cats/cats.zip": data})
    fetched = []
    original = remote._BlockReader._read
    monkeypatch.setattr(
        remote._BlockReader, "_read", lambda self, length: fetched.append(length) or original(self, length)
    )
    members = list(sources.identify("s3://cats/cats.zip").members())
    assert len(members) == 50
    assert sum(fetched) < len(data) / 4


def test_data_set_in_a_bucket_is_a_source(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    run(pics, out="s3://cats/first")
    second, report = run("s3://cats/first", out="s3://cats/second", size=8)
    assert (report.kept, report.rejected.total(), second.size) == (5, 0, 8)
    assert verify("s3://cats/second").digest == second.digest


def test_own_files_in_a_bucket_are_passed_over(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    run(pics, out="s3://cats/pics/set")
    names = ("run/config.json", "run/metrics.jsonl", "run/reals.png", "run/samples/a.png", "run/mine.png")
    put(bucket, {f"cats/pics/{name}": packed(i) for i, name in enumerate(names)})
    put(bucket, {"cats/pics/manifest.json": b'{"name": "of a web page"}', "cats/pics/contact.png": packed(50)})
    manifest, report = run("s3://cats/pics", out=tmp_path / "out")
    assert kept(manifest) == {"pics/run/mine.png", "pics/contact.png"}
    assert report.own == {"pics/set": "data set", "pics/run": "training run"}


def test_stopped_upload_into_the_source_continues(
    bucket: AbstractFileSystem, pics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was uploaded is no new file of the source, though its manifest, the last file, is not there yet."""
    put(bucket, {f"cats/pics/{name}": data for name, data in IMAGES.items()})
    original = bucket.put_file

    def put_file(source: str, target: str) -> None:
        if target.endswith("manifest.json"):
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "put_file", put_file)
        with pytest.raises(KeyboardInterrupt):
            run("s3://cats/pics", out="s3://cats/pics/sets/a/")
    assert bucket.exists("cats/pics/sets/a/contact.png")
    assert run("s3://cats/pics", out="s3://cats/pics/sets/a/")[1].resumed == len(NAMES)
    verify("s3://cats/pics/sets/a")


def test_data_set_in_a_bucket_equals_one_in_a_folder(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    manifest, _ = run(pics, out="s3://cats/deep/set")
    assert manifest.root == "s3://cats/deep/set"
    assert manifest == Manifest.load("s3://cats/deep/set")
    run(pics, out=tmp_path / "local")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    found = {path.rpartition("/")[2]: bucket.cat_file(path) for path in bucket.find("cats/deep/set")}
    assert found == expected
    assert not list((tmp_path / "cache" / "builds").iterdir())


@pytest.mark.parametrize("there", ["manifest.json", "sub/photo.jpg"])
def test_target_that_is_not_empty_is_refused_before_any_work(
    bucket: AbstractFileSystem, pics: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    put(bucket, {f"cats/set/{there}": b"mine", "cats/set2/a": b"not below it"})
    monkeypatch.setattr(sources.Member, "read", lambda self: pytest.fail("worked"))
    with pytest.raises(UserError, match=rf"s3://cats/set is not empty, it holds {there}: give another OUT"):
        run(pics, out="s3://cats/set/")
    assert bucket.cat_file(f"cats/set/{there}") == b"mine"


def test_missing_bucket_is_reported(bucket: AbstractFileSystem, pics: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing at s3://dogs/pics"):
        run("s3://dogs/pics", out=tmp_path / "out")
    with pytest.raises(UserError, match="cannot write s3://dogs/set"):
        run(pics, out="s3://dogs/set")


def test_stopped_upload_continues(bucket: AbstractFileSystem, pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = bucket.put_file

    def put_file(source: str, target: str) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        original(source, target)
        sent.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "put_file", put_file)
        with pytest.raises(KeyboardInterrupt):
            run(pics, out="s3://cats/set")
    assert len(sent) == 3
    assert not bucket.exists("cats/set/manifest.json")
    put(bucket, {sent[1]: bytes(bucket.info(sent[1])["size"])})  # the same length, other content

    again: list[str] = []
    monkeypatch.setattr(bucket, "put_file", lambda source, target: again.append(target) or original(source, target))
    assert run(pics, out="s3://cats/set")[1].resumed == len(NAMES)
    assert set(again) & set(sent) == {sent[1]}
    assert again[-1] == "cats/set/manifest.json"
    verify("s3://cats/set")


def test_network_failure_stops_the_build_and_keeps_the_work(
    bucket: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, {f"cats/pics/{i:02d}.png": packed(i) for i in range(40)})
    monkeypatch.setattr("trainer.data.build.store._COMMIT_SECONDS", 0)
    monkeypatch.setattr("trainer.data.build.build.REMOTE_READS", 1)
    original = bucket.cat_file

    def failing(path: str, **part: int) -> Any:
        if path.endswith("35.png"):
            raise OSError("connection reset")
        return original(path, **part)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "cat_file", failing)
        with pytest.raises(
            ResumableError, match=r"cannot read s3://cats/pics/35\.png: connection reset; the work so far"
        ):
            run("s3://cats/pics", out=tmp_path / "out")
    report = run("s3://cats/pics", out=tmp_path / "out")[1]
    assert (report.resumed, report.kept) == (32, 40)


def test_object_deleted_meanwhile_is_rejected(
    bucket: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, {f"cats/pics/{i}.png": packed(i) for i in range(3)})
    original = remote.files

    def files(*arguments: Any) -> Iterator[Any]:
        for file in list(original(*arguments)):
            bucket.rm_file("cats/pics/1.png") if file.path == "1.png" and bucket.exists("cats/pics/1.png") else None
            yield file

    monkeypatch.setattr(remote, "files", files)
    monkeypatch.setattr(sources.Source, "count", lambda self: None)
    report = run("s3://cats/pics", out=tmp_path / "out")[1]
    assert (report.kept, report.rejected) == (2, {"not readable": 1})


def test_changed_object_starts_over(
    bucket: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(bucket, {f"cats/pics/{i}.png": packed(i) for i in range(3)})
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.build.shards._write_shard", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("s3://cats/pics/0.png", "s3://cats/pics", out=tmp_path / "out")
    put(bucket, {"cats/pics/0.png": packed(0)[:-1] + b"?"})
    run("s3://cats/pics/0.png", "s3://cats/pics", out=tmp_path / "out")
    assert "starting over" in capsys.readouterr().err


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; with ``ranges`` also ranges of files, as most web servers do."""

    ranges = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not (self.ranges and wanted and path.is_file()):
            super().do_GET()
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[True, False], ids=["ranges", "whole files only"])
def web(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = functools.partial(type("_", (Handler,), {"ranges": request.param}), directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_archives_images_and_data_sets_on_a_web_server(web: str, pics: Path, tmp_path: Path) -> None:
    run(pics, out=tmp_path / "www" / "set")
    archives(tmp_path / "www")
    (tmp_path / "www" / "one cat.png").write_bytes(packed(77))
    for name in ("cats.zip", "cats.tar", "cats.tar.gz"):
        local, _ = run(tmp_path / "www" / name, out=tmp_path / f"local-{name}")
        assert run(f"{web}/{name}", out=tmp_path / name)[0].digest == local.digest
    assert run(f"{web}/set", out=tmp_path / "again")[1].kept == 5
    manifest, _ = run(f"{web}/one%20cat.png", out=tmp_path / "one")
    assert kept(manifest) == {"one cat.png"}


def test_web_page_instead_of_an_archive(web: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "cats.zip").write_text("<html>please log in</html>")
    with pytest.raises(UserError, match=r"cats\.zip cannot be read as zip or tar"):
        run(f"{web}/cats.zip", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"nothing at .*none\.zip"):
        run(f"{web}/none.zip", out=tmp_path / "out")


def test_server_that_does_not_answer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_FIRST_PAUSE", 0.001)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}"):
        run(f"http://127.0.0.1:{port}/cats.zip", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_credentials_that_expire_are_not_unreadable_files(
    bucket: AbstractFileSystem, endpoint: str, tmp_path: Path
) -> None:
    def enforce(after: str) -> None:
        """From so many requests on, moto refuses keys that it does not know, as S3 does with expired ones."""
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", after.encode(), plain)).close()

    for i in range(40):
        bucket.pipe_file(f"cats/photos/{i:02d}.png", packed(i))
    enforce(after="12")
    try:
        with pytest.raises(ResumableError, match="s3://cats/photos"):
            build(["s3://cats/photos"], tmp_path / "out", size=16, processes=0)
    finally:
        enforce(after="inf")
    _, report = build(["s3://cats/photos"], tmp_path / "out", size=16, processes=0)
    assert (report.kept, report.rejected) == (40, {})
