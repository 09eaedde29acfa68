"""``class=`` of the service, against the command."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openapi_spec_validator
import pytest

from catgan.command import UserError
from infer.classes import Class, choose
from infer.cli import main
from infer.latents import latents
from infer.service.batches import Batches
from infer.service.metrics import Metrics
from infer.service.openapi import describe
from infer.service.parameters import GRID, IMAGE, WALK, ImageRequest, image_request, paths
from infer.session import Generator
from tests.infer.conditional import NAMES, conditional
from tests.infer.conftest import SIZE, Z_DIM
from tests.infer.served import Served, served


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "cats.onnx"
    path.write_bytes(conditional(psi=True).SerializeToString())
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with served(model) as server:
        yield server


def catinfer(model: Path, *options: str | Path) -> None:
    main(["--onnx", str(model), "--device", "cpu", *map(str, options)])


def test_an_image_has_the_bytes_of_the_command(server: Served, model: Path, tmp_path: Path) -> None:
    catinfer(model, "--seeds", "3,7", "--out", tmp_path / "turns")
    for seed, name in ((3, "black"), (7, "tabby")):
        expected = (tmp_path / "turns" / f"cat-{seed:06d}-{name}.png").read_bytes()
        assert server.get(f"/image?seed={seed}").body == expected
        assert server.get(f"/image?seed={seed}&class={name}").body == expected
    catinfer(model, "--seeds", "3", "--class", "white", "--psi", "0.5", "--format", "jpg", "--out", tmp_path / "one")
    expected = (tmp_path / "one" / "cat-000003.jpg").read_bytes()
    assert server.get("/image?seed=3&class=2&psi=0.5&format=jpg").body == expected


@pytest.mark.parametrize("name", ["png", "npy"])
@pytest.mark.parametrize("chosen", [None, "tabby", "white,black", "all"])
def test_a_grid_has_the_bytes_of_the_command(
    server: Served, model: Path, tmp_path: Path, name: str, chosen: str | None
) -> None:
    options, query = (["--class", chosen], f"&class={chosen}") if chosen else ([], "")
    catinfer(model, "--seeds", "3,7-12", *options, "--out", tmp_path / f"cats.{name}")
    assert server.get(f"/grid?seeds=3,7-12&format={name}{query}").body == (tmp_path / f"cats.{name}").read_bytes()


def test_a_walk_has_the_bytes_of_the_command(server: Served, model: Path, tmp_path: Path) -> None:
    catinfer(model, "--seeds", "1,5", "--class", "white", "--interpolate", tmp_path / "a.webp")
    assert server.get("/walk?seeds=1,5&class=white&format=webp").body == (tmp_path / "a.webp").read_bytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/image?class=taby", "class: 'taby' is given, did you mean 'tabby'? allowed are black, tabby, white, and"),
        ("/image?class=3", "class: '3' is given"),
        ("/image?class=", "class: '' is given"),
        ("/image?class=all", "this path shows one class: give one as class, of black, tabby, white"),
        ("/image?class=black&class=white", "class: is given twice"),
        ("/grid?class=black,0", "class: 'black,0' names a class twice"),
        ("/walk?seeds=1,2", "class: is required: the class of the images, such as class=black"),
        ("/walk?seeds=1,2&class=0,1", "this path shows one class"),
        (
            "/grid?n=86",
            "n: 86 seeds in 3 classes are 258 images, allowed are 256; give fewer seeds or classes",
        ),
    ],
)
def test_mistakes_are_one_line(server: Served, path: str, message: str) -> None:
    reply = server.get(path)
    assert reply.status == 400
    assert reply.error.startswith(message)


def test_arrays_and_single_classes_may_have_more_seeds(server: Served) -> None:
    for query in ("n=256&format=npy", "n=256&class=white"):
        assert server.get(f"/grid?{query}", headers={"If-None-Match": "*"}).status == 304


def test_tags_differ_by_class(server: Served) -> None:
    def tag(query: str) -> str:
        return server.get(f"/image?seed=1{query}", headers={"If-None-Match": "*"}).headers["ETag"]

    assert tag("") == tag("&class=tabby") == tag("&class=1")
    assert len({tag("&class=tabby"), tag("&class=white"), tag("&class=black")}) == 3


def test_info_and_the_overview_name_the_classes(server: Served) -> None:
    assert json.loads(server.get("/info").body)["classes"] == list(NAMES)
    assert "/image?seed=&psi=&class=&format=: one image" in server.get("/").body.decode()


def test_the_description(server: Served) -> None:
    description = json.loads(server.get("/openapi.json").body)
    openapi_spec_validator.validate(description)
    found = {
        path: parameter
        for path, methods in description["paths"].items()
        for parameter in methods["get"]["parameters"]
        if parameter["name"] == "class"
    }
    assert {path: one["required"] for path, one in found.items()} == {IMAGE: False, GRID: False, WALK: True}
    assert found[IMAGE]["schema"] == found[WALK]["schema"] == {"type": "string", "enum": list(NAMES)}
    for name in found[IMAGE]["schema"]["enum"]:
        assert server.get(f"/image?class={name}", headers={"If-None-Match": "*"}).status == 304
    (example,) = found[GRID]["schema"]["examples"]
    assert server.get(f"/grid?class={example}", headers={"If-None-Match": "*"}).status == 304


def test_without_classes_there_is_no_parameter() -> None:
    assert '"class"' not in json.dumps(describe(paths(SIZE), "1"))
    with pytest.raises(UserError, match="unrecognized parameter: 'class'"):
        image_request(IMAGE, paths(SIZE)[IMAGE], "class=tabby")
    assert image_request(GRID, paths(SIZE)[GRID], "n=2") == ImageRequest(GRID, (0, 1), 1.0, "png")
    walk = paths(SIZE, ["cat"])[WALK]
    assert image_request(WALK, walk, "seeds=1,2", ["cat"]).classes == (Class(0, "cat"),)


def test_one_batch_holds_several_classes(model: Path) -> None:
    """Requests that wait are computed in one call, each with its labels."""
    generator = Generator(model, "cpu")
    calls: list[list[int]] = []

    class Counted:
        provider = generator.provider

        def __call__(self, z: np.ndarray, psi: np.ndarray, label: np.ndarray) -> np.ndarray:
            calls.append(label.tolist())
            return generator(z, psi, label=label)

    async def compute(batches: Batches, *labels: int) -> np.ndarray:
        return await batches.compute(lambda: latents(range(len(labels)), Z_DIM), len(labels), 1.0, np.array(labels))

    async def scenario() -> list[np.ndarray]:
        batches = Batches(Counted(), Metrics())  # type: ignore[arg-type]
        tasks = [asyncio.create_task(compute(batches, *labels)) for labels in ((2,), (0, 1), (1,))]
        await asyncio.sleep(0)
        work = asyncio.create_task(batches.run())
        results = await asyncio.gather(*tasks)
        work.cancel()
        return results

    results = asyncio.run(scenario())
    assert calls == [[2, 0, 1, 1]]
    np.testing.assert_array_equal(results[0], generator(latents([0], Z_DIM), label=2))
    np.testing.assert_array_equal(results[1], generator(latents(range(2), Z_DIM), label=np.array([0, 1])))
    np.testing.assert_array_equal(results[2], generator(latents([0], Z_DIM), label=1))


def test_requests_for_the_same_images_are_equal() -> None:
    known = paths(SIZE, NAMES)
    asked = {image_request(IMAGE, known[IMAGE], query, NAMES) for query in ("seed=1", "seed=1&class=tabby")}
    assert len(asked) == 1
    sheet = image_request(GRID, known[GRID], "n=5&class=2,0", NAMES)
    assert (sheet.rows, sheet.images) == (choose(NAMES, ["2,0"], "class"), 10)
    array = image_request(GRID, known[GRID], "n=5&format=npy", NAMES)
    assert (array.rows, array.images) == ((), 5)


def test_the_default_grid_of_many_classes_is_allowed() -> None:
    names = [f"cat {i}" for i in range(100)]
    assert image_request(GRID, paths(SIZE, names)[GRID], "", names).images == 200
    assert image_request(GRID, paths(SIZE, NAMES)[GRID], "", NAMES).images == 48


@pytest.mark.parametrize(("size", "most"), [(SIZE, 256), (1024, 42)])
def test_the_default_grid_shows_the_first_classes_that_fit(size: int, most: int) -> None:
    names = [f"cat {i}" for i in range(1000)]
    grid = paths(size, names)[GRID]
    sheet = image_request(GRID, grid, "", names)
    assert (sheet.images, len(sheet.seeds)) == (most, 1)
    assert sheet.rows == tuple(Class(i, f"cat {i}") for i in range(most))
    assert f"by default all, on a sheet the first {most}" in grid.parameters["class"].meaning
    assert len(image_request(GRID, grid, "format=npy", names).classes) == 1000
    for query in ("class=all", "n=2"):
        with pytest.raises(UserError, match=f"allowed are {most}; give fewer seeds or classes"):
            image_request(GRID, grid, query, names)
    assert "the first" not in paths(size, NAMES)[GRID].parameters["class"].meaning


def test_arrays_are_read(server: Served) -> None:
    images = np.load(io.BytesIO(server.get("/grid?n=6&format=npy").body))
    assert images.shape == (6, SIZE, SIZE, 3)
