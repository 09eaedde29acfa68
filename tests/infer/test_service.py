"""The API of ``catinfer serve``, in a process of its own, over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openapi_spec_validator
import pytest

from infer.cli import main
from infer.service.openapi import describe
from infer.service.parameters import MAX_QUERY, paths
from tests.infer.served import ROOT, Served, served

SIZE = 8  # of the generator in conftest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, build_onnx: Callable[..., bytes]) -> Path:
    path = tmp_path_factory.mktemp("model") / "gen.onnx"
    metadata = {"z_dim": "16", "size": "8", "metric": "fd2k_efflite0", "metric_value": "12.5"}
    path.write_bytes(build_onnx(metadata=metadata))
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with served(model) as server:
        yield server


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "npy"])
def test_an_image_has_the_bytes_of_the_command(server: Served, model: Path, tmp_path: Path, name: str) -> None:
    options = ["--seeds", "3,7", "--psi", "0.8", "--format", name, "--out", f"{tmp_path}/out/", "--device", "cpu"]
    main(["--onnx", str(model), *options])
    for seed in (3, 7):
        reply = server.get(f"/image?seed={seed}&psi=0.8&format={name}")
        assert reply.status == 200
        assert reply.body == (tmp_path / "out" / f"cat-{seed:06d}.{name}").read_bytes()


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "npy"])
@pytest.mark.parametrize(
    ("query", "options"),
    [("seed=5&n=7", ["--seed", "5", "--n", "7"]), ("seeds=3,7-12&psi=0.5", ["--seeds", "3,7-12", "--psi", "0.5"])],
)
def test_a_grid_has_the_bytes_of_the_command(
    server: Served, model: Path, tmp_path: Path, name: str, query: str, options: list[str]
) -> None:
    main(["--onnx", str(model), *options, "--out", str(tmp_path / f"cats.{name}"), "--device", "cpu"])
    assert server.get(f"/grid?{query}&format={name}").body == (tmp_path / f"cats.{name}").read_bytes()


@pytest.mark.parametrize("name", ["gif", "webp"])
def test_a_walk_has_the_bytes_of_the_command(server: Served, model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"walk.{name}"
    main(["--onnx", str(model), "--seeds", "1,5,2", "--psi", "0.7", "--interpolate", str(path), "--device", "cpu"])
    reply = server.get(f"/walk?seeds=1,5,2&psi=0.7&format={name}")
    assert reply.body == path.read_bytes()
    assert reply.headers["Content-Type"] == f"image/{name}"


def test_the_defaults_are_those_of_the_command(server: Served, model: Path, tmp_path: Path) -> None:
    main(["--onnx", str(model), "--out", str(tmp_path / "cats.png"), "--device", "cpu"])
    assert server.get("/grid").body == (tmp_path / "cats.png").read_bytes()
    assert server.get("/image").body == server.get("/image?seed=0&psi=1&format=png").body


def test_equal_bytes_while_many_wait(server: Served) -> None:
    """Batches mix the images of all requests."""
    alone = {seed: server.get(f"/image?seed={seed}&format=npy&psi=0.9").body for seed in range(24)}
    together: dict[int, bytes] = {}

    def ask(seed: int) -> None:  # psi differs, so that nothing comes from the cache, but not as a float32
        together[seed] = server.get(f"/image?seed={seed}&format=npy&psi=0.900000000001").body

    threads = [threading.Thread(target=ask, args=[seed]) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/image?seed=-1", "seed: '-1' is given, allowed is a whole number from 0 to 4,294,967,295"),
        ("/image?seed=4294967296", "seed: '4294967296' is given, allowed is a whole number from 0 to 4,294,967,295"),
        ("/image?seed=1.5", "seed: '1.5' is given, allowed is a whole number from 0 to 4,294,967,295"),
        ("/image?seed=", "seed: '' is given, allowed is a whole number from 0 to 4,294,967,295"),
        ("/image?psi=nan", "psi: 'nan' is given, allowed is a number from 0 to 2.0"),
        ("/image?psi=inf", "psi: 'inf' is given, allowed is a number from 0 to 2.0"),
        ("/image?psi=-0.1", "psi: '-0.1' is given, allowed is a number from 0 to 2.0"),
        ("/image?format=bmp", "format: invalid choice: 'bmp' (choose from png, jpg, webp, npy)"),
        ("/image?colour=red", "unrecognized parameter: 'colour' (choose from seed, psi, format)"),
        ("/image?seed=1&seed=2", "seed: is given twice"),
        ("/image?seed=%zz", "seed: '%zz' is given, allowed is a whole number from 0 to 4,294,967,295"),
        ("/image?n=4", "unrecognized parameter: 'n' (choose from seed, psi, format)"),
        ("/grid?n=0", "n: '0' is given, allowed is a whole number from 1 to 256"),
        ("/grid?n=257", "n: '257' is given, allowed is a whole number from 1 to 256"),
        ("/grid?n=" + "9" * 5000, f"n: '{'9' * 5000}' is given, allowed is a whole number from 1 to 256"),
        ("/grid?seeds=9-3", "seeds: '9-3' is given, allowed are numbers from 0 to 4,294,967,295 and ranges of them, "
         "such as 3,7-12"),
        ("/grid?seeds=0-256", "seeds: '0-256' are more than 256 seeds"),
        ("/grid?seeds=0-4000000000", "seeds: '0-4000000000' are more than 256 seeds"),
        ("/grid?seeds=3,1-5", "seeds: '3,1-5' names a seed twice"),
        ("/grid?seeds=1&n=4", "seeds gives the seeds and their number: omit n and seed"),
        ("/walk", "seeds: is required: 2 to 16 seeds, such as seeds=3,7-12"),
        ("/walk?seeds=4", "seeds: walks through 2 to 16 seeds, 1 given"),
        ("/walk?seeds=1-17", "seeds: '1-17' are more than 16 seeds"),
        ("/walk?seeds=1,2&format=mp4", "format: invalid choice: 'mp4' (choose from gif, webp)"),
        ("/info?x=1", "unrecognized parameter: 'x' (choose from none)"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_in_the_words_of_the_command(server: Served, path: str, message: str) -> None:
    reply = server.get(path)
    assert (reply.status, reply.error) == (400, message)


@pytest.mark.parametrize(
    "path", ["/image?seed", "/image?%ff=1", "/image?seed=%ff", "/image?&", "/image?" + "a=1&" * 20]
)
def test_queries_that_are_none(server: Served, path: str) -> None:
    reply = server.get(path)
    assert reply.status == 400
    assert reply.error.startswith("the query is not a list of name=value, joined by &, in UTF-8 (")


def test_a_long_query(server: Served) -> None:
    assert server.get("/image?seed=" + "1" * (MAX_QUERY - 5)).status == 400
    reply = server.get("/image?seed=" + "1" * (MAX_QUERY - 4))
    assert (reply.status, reply.error) == (414, "the query has 8,193 characters, allowed are 8,192")
    longest = ",".join(str(2**32 - 1 - i) for i in range(256))
    assert server.get(f"/grid?seeds={longest}").status == 200


def test_other_paths_and_methods(server: Served) -> None:
    for path in ("/images", "/image/", "//image", "/image%2f", "/index.html", "/../etc/passwd", "/gen.onnx"):
        reply = server.get(path)
        assert (reply.status, reply.error) == (404, "no such path; /openapi.json shows what there is")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        reply = server.get("/image", method)
        assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")
        assert reply.error == f"{method}: not allowed here; use GET or HEAD"
    overview = server.get("/").body.decode()
    assert [line.partition(":")[0].partition("?")[0] for line in overview.splitlines()] == list(paths(SIZE))


def test_head_has_the_header_alone(server: Served) -> None:
    for path in ("/image?seed=1", "/grid", "/info", "/healthz", "/openapi.json", "/"):
        got, head = server.get(path), server.get(path, "HEAD")
        assert (head.status, head.body) == (200, b"")
        for name in ("Content-Length", "Content-Type", "Cache-Control", "ETag", "X-Content-Type-Options"):
            assert head.headers[name] == got.headers[name]
        assert int(head.headers["Content-Length"]) == len(got.body)


def test_what_a_client_has_is_not_computed(server: Served) -> None:
    tag = server.get("/image?seed=100").headers["ETag"]
    before = server.metric("catinfer_images_total")
    for given in (tag, f'"other", W/{tag}', "*"):
        reply = server.get("/image?seed=100", headers={"If-None-Match": given})
        assert (reply.status, reply.body, reply.headers["ETag"]) == (304, b"", tag)
        assert reply.headers["Cache-Control"] == "public, max-age=300, immutable"
    fresh = server.get("/image?seed=101", headers={"If-None-Match": "*"})
    assert (fresh.status, server.metric("catinfer_images_total")) == (304, before)
    assert server.get("/image?seed=100", headers={"If-None-Match": '"other"'}).status == 200
    assert server.metric("catinfer_images_total") == before, "it comes from the cache"


def test_tags_differ_where_bytes_can(server: Served, model: Path, tmp_path: Path) -> None:
    queries = ["/image", "/image?seed=1", "/image?psi=0.5", "/image?format=npy", "/grid?n=1", "/grid?seeds=0,1"]
    tags = [server.get(query).headers["ETag"] for query in queries]
    assert len(set(tags)) == len(queries)
    assert server.get("/image?format=png&psi=1.0&seed=00").headers["ETag"] == tags[0]
    other = tmp_path / "gen.onnx"
    other.write_bytes(model.read_bytes().replace(b"fd2k_efflite0", b"fd2k_efflite1"))
    with served(other) as second:
        assert second.get("/image?format=npy").body == server.get("/image?format=npy").body
        assert second.get("/image").headers["ETag"] != tags[0]


def test_info_names_the_model(server: Served, model: Path) -> None:
    info = json.loads(server.get("/info").body)
    assert info["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (info["size"], info["z_dim"], info["provider"]) == (SIZE, 16, "CPUExecutionProvider")
    assert info["metadata"]["metric"] == "fd2k_efflite0"
    assert info["versions"]["numpy"] == np.__version__
    assert {"catgan", "onnxruntime", "pillow"} <= set(info["versions"])
    assert info["limits"]["/grid"]["n"] == 256


def test_the_description_is_openapi(server: Served) -> None:
    description = json.loads(server.get("/openapi.json").body)
    assert description["openapi"].startswith("3.1")
    openapi_spec_validator.validate(description)
    del description["paths"]["/image"]["get"]["responses"]["200"]["description"]
    with pytest.raises(openapi_spec_validator.validation.exceptions.OpenAPIValidationError):
        openapi_spec_validator.validate(description)


def _operations(description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in description["paths"].items():
        assert list(methods) == ["get"]
        yield path, methods["get"]


def test_the_description_is_what_the_server_does(server: Served) -> None:
    """Each described parameter is accepted at its bounds and refused beyond; formats have the described types."""
    for path, operation in _operations(describe(paths(SIZE), "1")):
        needed = {p["name"]: "1,2" for p in operation["parameters"] if p["required"]}
        types = set()
        for parameter in operation["parameters"]:
            schema, name = parameter["schema"], parameter["name"]
            good = schema.get("enum") or schema.get("examples") or [schema["minimum"], schema["maximum"]]
            bad = ["no"] if "minimum" not in schema else [schema["minimum"] - 1, schema["maximum"] + 1]
            for value, status in [*((value, 304) for value in good), *((value, 400) for value in bad)]:
                query = "&".join(f"{k}={v}" for k, v in (needed | {name: value}).items())
                assert server.get(f"{path}?{query}", headers={"If-None-Match": "*"}).status == status, query
                if name == "format" and status == 304:
                    types.add(server.get(f"{path}?{query}").headers["Content-Type"])
        expected = set(operation["responses"]["200"]["content"])
        assert types == expected if types else True
        reply = server.get(path)
        assert str(reply.status) in operation["responses"]
        if not needed:
            assert reply.headers["Content-Type"].partition(";")[0] in expected


def test_metrics_count(server: Served) -> None:
    def values() -> list[float]:
        return [
            server.metric("catinfer_requests_total", path="/grid", status="200"),
            server.metric("catinfer_requests_total", path="/grid", status="400"),
            server.metric("catinfer_requests_total", path="other", status="404"),
            server.metric("catinfer_request_seconds_count", path="/grid"),
            server.metric("catinfer_images_total"),
            server.metric("catinfer_batch_images_sum"),
            server.metric("catinfer_answers_total", source="computed"),
            server.metric("catinfer_answers_total", source="cache"),
        ]

    before = values()
    for path in ("/grid?seed=500&n=3", "/grid?seed=500&n=3", "/grid?n=no", "/nothing", "/something"):
        server.get(path)
    assert np.subtract(values(), before).tolist() == [2, 1, 2, 3, 3, 3, 1, 1]
    assert server.metric("catinfer_queue_requests") == server.metric("catinfer_queue_images") == 0
    assert server.metric("catinfer_cache_bytes") > 0
    assert server.get("/healthz").body == b'{"status": "ok"}\n'


def test_other_names_for_this_machine_are_refused(server: Served) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1]", "localhost:x", ""):
        reply = server.get("/image", headers={"Host": host})
        assert reply.status == 403
        assert b"PNG" not in reply.body
    assert server.get("/image", headers={"Host": "LOCALHOST:1"}).status == 200


def test_a_page_and_its_generator(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("the page")
    (page / "info").write_text("not this")
    (page / "gen.onnx").write_bytes(model.read_bytes())
    with served(page) as server:
        assert server.get("/").body == b"the page"
        assert server.get("/gen.onnx").body == model.read_bytes()
        assert json.loads(server.get("/info").body)["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
        assert server.get("/image").body.startswith(b"\x89PNG")
        tag = server.get("/gen.onnx").headers["ETag"]
        again = server.get("/gen.onnx", headers={"If-None-Match": tag})
        assert (again.status, again.body) == (304, b"")
        server.stop(signal.SIGINT)
        url = f"http://127.0.0.1:{server.port}/"
        assert server.result == {"address": url, "folder": str(page), "onnx": str(page / "gen.onnx")}


def test_a_run_and_all_addresses(model: Path, tmp_path: Path) -> None:
    best = tmp_path / "run" / "best" / "gen.onnx"
    best.parent.mkdir(parents=True)
    best.write_bytes(model.read_bytes())
    with served(tmp_path / "run", "--host", "0.0.0.0") as server:
        assert server.get("/healthz", headers={"Host": "cats.example"}).status == 200
        server.stop()
        assert server.lines[1].startswith(f"warning: http://0.0.0.0:{server.port}/ has no authentication")
        assert server.result == {"address": f"http://0.0.0.0:{server.port}/", "onnx": str(best)}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_ends_before_the_server(model: Path, sign: int) -> None:
    slow = "import infer.service.answers as a, time; encode = a.encode_answer\n"
    slow += "a.encode_answer = lambda *given: time.sleep(0.5) or encode(*given)"
    with served(model, before=slow) as server:
        connection = server.connect()
        connection.sendall(b"GET /image HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not server.metric("catinfer_images_total"):
            time.sleep(0.01)
        server.stop(sign)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"PNG" in answer
        connection.close()


def test_requests_that_take_too_long_do_not_hold_up_the_end(model: Path) -> None:
    slow = "import infer.service.answers as a, infer.service.server as s\ns.GRACE = 0.3\n"
    slow += "a.encode_answer = lambda request, pixels, xmp, cancelled: cancelled.wait(20)"
    with served(model, before=slow) as server:
        connection = server.connect()
        connection.sendall(b"GET /image HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not server.metric("catinfer_images_total"):
            time.sleep(0.01)
        server.stop()
        assert not connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()


def _fails(*arguments: str | Path, before: str = "") -> str:
    command = [sys.executable, "-c", f"{before}\nfrom infer.cli import entry; entry()", "serve", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_what_to_install(model: Path, package: str) -> None:
    message = _fails(model, before=f"import sys; sys.modules[{package!r}] = None")
    assert message == f"catinfer: serve needs the package {package}: pip install 'catgan[serve]'\n"


def test_nothing_else_imports_the_server(model: Path, tmp_path: Path) -> None:
    """Neither do commands that only parse their arguments load it."""
    program = (
        "import sys\nfor name in ('starlette', 'uvicorn', 'prometheus_client', 'anyio'): sys.modules[name] = None\n"
    )
    program += "from infer.cli import entry; entry()"
    for arguments in (["--onnx", model, "--out", tmp_path / "a.png"], ["serve", "--help"], ["doctor", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_mistakes_of_the_command(model: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert "junk.onnx: not an ONNX model" in _fails(tmp_path / "junk.onnx")
    assert "--host 203.0.113.7: not an address of this machine" in _fails(model, "--host", "203.0.113.7")
    assert "argument --port: '-1' is given" in _fails(model, "--port", "-1")


def test_a_model_with_values_that_are_not_finite_is_not_served(
    tmp_path: Path, build_onnx: Callable[..., bytes]
) -> None:
    (tmp_path / "gen.onnx").write_bytes(build_onnx(scale=float("nan")))
    assert "gave values that are not finite" in _fails(tmp_path / "gen.onnx", "--port", "0")


@pytest.mark.parametrize("size", [8, 128, 256, 1024, 4096])
def test_limits_follow_the_size(size: int) -> None:
    known = paths(size)
    n, seeds = known["/grid"].parameters["n"], known["/walk"].parameters["seeds"]
    most, walk = n.schema["maximum"], int(re.findall(r"2 to (\d+)", seeds.meaning)[0])
    assert n.default == min(16, most)
    assert most == 1 or most * 3 * size**2 <= 2**27
    assert walk == 2 or walk * 20 * 3 * size**2 <= 2**25
    assert (most, walk) == {8: (256, 16), 128: (256, 16), 256: (256, 8), 1024: (42, 2), 4096: (2, 2)}[size]
