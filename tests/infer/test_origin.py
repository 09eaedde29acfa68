"""``catinfer inspect``: round trips, and files from anyone."""

from __future__ import annotations

import io
import json
import shlex
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from catgan.command import UserError, run_command
from infer import containers
from infer.cli import NAME, main
from infer.containers import DamagedError, file_format, find_xmp, gif_with_xmp
from infer.directions import ENTRY
from infer.directions import encode as encode_directions
from infer.files import encode
from infer.origin import read_packet
from infer.provenance import SOURCE_TYPE, Provenance
from tests.infer.conftest import build
from tests.infer.test_cli import blocked

SHA256 = "0" * 64
PIXELS = np.zeros((8, 8, 3), np.uint8)
BOMB = b"""<!DOCTYPE x [<!ENTITY a "%b">%b]><x>&z;</x>""" % (
    b"lol" * 99,
    b"".join(b'<!ENTITY %c "%b">' % (c, b"&%c;" % (c - 1) * 99) for c in range(ord("b"), ord("z") + 1)),
)


def inspected(*paths: Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = main(["inspect", *map(str, paths)])["files"]
    return files


def png_with(packet: bytes, compressed: bool = False) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=compressed)
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def xmp(properties: str) -> bytes:
    """A packet with our own properties as given."""
    packet = Provenance("image", SHA256, (1,), (1.0,)).packet().decode()
    start, end = packet.index(" catgan:Kind"), packet.index("/></rdf:RDF>")
    return (packet[:start] + properties + packet[end:]).encode()


@pytest.mark.parametrize(
    "options",
    [
        "--n 4 --out a.png",
        "--seeds 3,7-9,2 --psi 0.7 --labels --out a.jpg",
        "--seed 4294967290 --n 9 --out a.webp",
        "--n 3 --truncation-sweep 0.4,1.25 --labels --out a.png",
        "--n 2 --truncation-sweep 0.1 --out a.webp",
        "--n 3 --interpolate a.gif --psi 0.3",
        "--seeds 5,1 --interpolate a.webp",
        "--n 2 --interpolate a.mp4",
    ],
)
def test_the_printed_command_makes_the_same_file(
    onnx_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
) -> None:
    onnx = onnx_file.rename(tmp_path / "it's $HOME.onnx")
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    main(["--onnx", str(onnx), "--device", "cpu", *options.split()])
    (made,) = (tmp_path / "first").iterdir()

    monkeypatch.chdir(tmp_path / "second")
    record = inspected(made, onnx)[0]
    assert capsys.readouterr().err.splitlines()[-1] == record["command"]
    program, *words = shlex.split(record["command"])
    assert program == "catinfer"
    main(words)
    (again,) = (tmp_path / "second").iterdir()
    if made.suffix == ".mp4":  # x264 encodes equal frames slightly differently now and then
        for path in (again, made):
            with path.open("rb") as file:
                assert (
                    find_xmp(file, "mp4")
                    == Provenance("walk", record["generator_sha256"], (0, 1), (1.0,), device="cpu").packet()
                )
        frames, others = (decoded(path) for path in (again, made))
        assert frames.shape == others.shape == (40, 8, 8, 3)
        assert np.abs(frames - others).mean() < 8 < np.abs(frames - np.roll(others, 20, 0)).mean()
    else:
        assert again.read_bytes() == made.read_bytes()


def decoded(path: Path) -> np.ndarray:
    """The frames of a video, float ``[n, height, width, 3]`` in [0, 255]."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(float)


@pytest.mark.parametrize("options", ["--format png", "--format jpg", "--format webp", "--shards"])
def test_single_files_and_members_of_shards_are_made_again(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--onnx", "gen.onnx", "--seeds", "3,2", "--psi", "0.7", "--device", "cpu", "--out", "out/", *options.split()])
    if options == "--shards":
        with tarfile.open("out/train-000000.tar") as tar:
            tar.extractall("members", filter="data")
        made = [path for path in Path("members").iterdir() if path.suffix == ".png"] + [Path("out/contact.png")]
        about = json.loads(Path("members/00000002.json").read_bytes())
        assert about["digital_source_type"] == SOURCE_TYPE
        assert (about["psi"], about["seed"]) == (0.7, 2)
        assert about["generator_sha256"] == inspected(onnx_file)[0]["generator_sha256"]
    else:
        made = list(Path("out").iterdir())
    assert len(made) == (3 if options == "--shards" else 2)
    for path in made:
        main(shlex.split(inspected(path)[0]["command"])[1:])
        seed = int(path.stem.removeprefix("cat-")) if path.name != "contact.png" else None
        again = Path("again.png") if seed is None else Path("again", f"cat-{seed:06d}{path.suffix}")
        assert again.read_bytes() == path.read_bytes()


def test_everything_that_a_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    origin = Provenance("sweep", SHA256, (3, 7, 8), (0.5, 1.0), labels=True, device="cuda", software="catgan 99")
    path = tmp_path / "a.png"
    path.write_bytes(encode(PIXELS, ".png", origin.packet()))
    (record,) = inspected(path)
    words = "--onnx gen.onnx --seeds 3,7-8 --truncation-sweep 0.5,1.0 --labels --device cuda --out again.png"
    assert record == {
        "file": str(path),
        "format": "png",
        "digital_source_type": SOURCE_TYPE,
        "creator_tool": "catgan 99",
        "kind": "sweep",
        "generator_sha256": SHA256,
        "seeds": "3,7-8",
        "seed_count": 3,
        "seeds_sha256": None,
        "psi": [0.5, 1.0],
        "labels": True,
        "device": "cuda",
        "mix": None,
        "directions": None,
        "classes": None,
        "class_count": None,
        "command": f"catinfer {words}",
    }
    said = capsys.readouterr().err
    assert "made by catgan 99, this is catgan" in said
    assert f"gen.onnx stands for the generator with SHA-256 {SHA256}" in said


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Provenance("training"), "images of a generator in training"),
        (Provenance("blend", SHA256, (3, 4), (0.5,), mix=25), "#left=3&right=4&mix=25&psi=0.5"),
        (Provenance("blend", SHA256, (4, 4), (0.5,), mix=0), "#left=4&right=4&mix=0&psi=0.5"),
        (Provenance("sheet", SHA256, range(0, 200_000, 2), (1.0,)), "does not hold all that is needed"),
        (Provenance("image", SHA256, (2**32,), (1.0,)), "does not hold all that is needed"),
        (Provenance("walk", SHA256, range(2), (1.0,)), "does not hold all that is needed"),  # a PNG is no walk
    ],
)
def test_files_that_no_command_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: Provenance, said: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(PIXELS, ".png", origin.packet()))
    (record,) = inspected(path)
    assert record["command"] is None
    assert record["digital_source_type"] == SOURCE_TYPE
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_generator_shows_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(build(metadata={"z_dim": "16", "recipe": "tiny\x1b"}).SerializeToString())
    (record,) = inspected(path)
    assert record["format"] == "onnx"
    assert record["metadata"] == {"z_dim": "16", "recipe": "tiny\x1b"}
    assert len(record["generator_sha256"]) == 64
    path.write_bytes(build(metadata={"long": "x" * 2**20}).SerializeToString())
    with pytest.raises(UserError, match="bytes of metadata"):
        inspected(path)


def test_directions_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(build(metadata={"z_dim": "16", ENTRY: encode_directions(np.eye(8, 16))}).SerializeToString())
    (record,) = inspected(path)
    assert record["metadata"] == {"z_dim": "16", ENTRY: "346 characters"}


@pytest.mark.parametrize("seeds", ["3,4", "3-4", "3-3,4", "3,4-4"])
def test_a_blend_is_shown_again_by_the_address_of_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seeds: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(xmp(f' catgan:Kind="blend" catgan:Seeds="{seeds}" catgan:Psi="1" catgan:Mix="50"')))
    assert inspected(path)[0]["command"] is None
    assert "#left=3&right=4&mix=50&psi=1" in capsys.readouterr().err


def test_files_without_metadata_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix, kind in ((".png", "png"), (".jpg", "jpeg"), (".webp", "webp"), (".gif", "gif")):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(PIXELS).save(path)
        (record,) = inspected(path)
        assert (record.pop("file"), record.pop("format")) == (str(path), kind)
        assert set(record.values()) == {None}
        assert "says nothing about its origin" in capsys.readouterr().err


def test_metadata_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Properties as elements, arrays, nested structures, and another namespace for the same prefix."""
    path = tmp_path / "a.png"
    packet = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
      <rdf:Description rdf:about="" xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
        xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:catgan="http://example.com/" catgan:Kind="sheet">
       <i:DigitalSourceType rdf:resource="{SOURCE_TYPE}"/>
       <dc:creator><rdf:Seq><rdf:li>A &amp; B</rdf:li></rdf:Seq></dc:creator>
       <xmp:CreatorTool xmlns:xmp="http://ns.adobe.com/xap/1.0/"> A &lt;b&gt; </xmp:CreatorTool>
      </rdf:Description></rdf:RDF></x:xmpmeta>"""
    for compressed in (False, True):
        path.write_bytes(png_with(packet.encode(), compressed))
        (record,) = inspected(path)
        assert (record["digital_source_type"], record["creator_tool"]) == (SOURCE_TYPE, "A <b>")
        assert record["kind"] is record["command"] is None
        assert "not made by catgan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image, video or generator"),
        (b"MZ\x90\x00 no image", "not an image, video or generator"),
        (png_with(BOMB), "document type"),
        (png_with(b"<x><y></x>"), "not XML"),
        (png_with(b"<x>&z;</x>"), "not XML"),
        (png_with(b"x" * (2**20 + 1)), "1,048,5.. bytes of XMP"),
        (png_with(b"<x>" + b" " * 2**24 + b"</x>", compressed=True), "more than 1,048,576 bytes of XMP"),
        (png_with(b"<x/>")[:60], "cut short"),
        (png_with(b"<x/>").replace(b"<x/>", b"<y/>"), "checksum"),
        (encode(PIXELS, ".jpg")[:100], "cut short"),
        (encode(PIXELS, ".webp")[:-9], "cut short"),
        (b"GIF89a" + b"\0" * 7 + b"?", "no block"),
        (b"\xff\xd8\xff\xe0\0\x02hello", "no marker"),
        (struct.pack(">I4s", 2**31, b"ftyp") + b"x" * 20, "cut short"),
        (png_with(xmp(' catgan:Kind="poem"')), "Kind 'poem'"),
        (png_with(xmp(' catgan:Kind="image" catgan:Seeds="1; rm -rf"')), "impossible metadata, Seeds"),
        (png_with(xmp(' catgan:Kind="image" catgan:Seeds="9-1"')), "Seeds '9-1'"),
        (png_with(xmp(' catgan:Kind="image" catgan:Seeds="0-9999999999"')), "Seeds"),
        (png_with(xmp(f' catgan:Kind="image" catgan:Seeds="{"1," * 30_000}1"')), "Seeds"),
        (png_with(xmp(f' catgan:Kind="image" catgan:Psi="{"1," * 6_000}1"')), "Psi"),
        (png_with(xmp(' catgan:Kind="image" catgan:Psi="nan"')), "Psi 'nan'"),
        (png_with(xmp(' catgan:Kind="image" catgan:Device="$(reboot)"')), "Device"),
        (png_with(xmp(' catgan:Kind="image" catgan:Labels="yes"')), "Labels"),
        (png_with(xmp(' catgan:Kind="image" catgan:GeneratorSHA256="x"')), "GeneratorSHA256"),
        (png_with(xmp(' catgan:Kind="blend" catgan:Seeds="3" catgan:Psi="1" catgan:Mix="1"')), "incomplete"),
        (png_with(xmp(' catgan:Kind="blend" catgan:SeedCount="2" catgan:Psi="1" catgan:Mix="1"')), "incomplete"),
        (png_with(xmp(' catgan:Kind="blend" catgan:Mix="101"')), "Mix"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run_command(NAME, main, ["inspect", str(path)])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(UserError, match=message):
        inspected(path)


def test_a_missing_file_a_folder_and_a_damaged_generator(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.png", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=message):
            inspected(path)
    (tmp_path / "gen.onnx").write_bytes(b"\x08\x08broken")
    with pytest.raises(UserError, match="not an ONNX model"):
        inspected(tmp_path / "gen.onnx")


@pytest.fixture
def samples(onnx_file: Path, tmp_path: Path) -> dict[str, bytes]:
    """A file of each format: format -> content."""
    files = {"png": "a.png", "jpeg": "a.jpg", "webp": "a.webp", "gif": "w.gif", "mp4": "w.mp4"}
    for name in files.values():
        option = "--out" if name.startswith("a") else "--interpolate"
        main(["--onnx", str(onnx_file), "--n", "2", "--device", "cpu", option, str(tmp_path / name)])
    return {kind: (tmp_path / name).read_bytes() for kind, name in files.items()}


def test_mutants_give_a_packet_or_a_clear_error(samples: dict[str, bytes]) -> None:
    """Cut at each of many places, and with changed bytes: nothing but ``DamagedError`` is raised."""
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "nothing": 0, "damaged": 0}
    for kind, content in samples.items():
        mutants = [content[:i] for i in range(12, len(content), 1 + len(content) // 300)]
        for _ in range(300):
            mutant = bytearray(content)
            # Half of the changes are among the first bytes, where lengths and flags are.
            for limit in (64, len(content)):
                mutant[rng.integers(8, limit)] = rng.integers(256)
            mutants.append(bytes(mutant))
        for mutant in mutants:
            try:
                packet = find_xmp(io.BytesIO(mutant), kind)
                outcomes["read" if packet and read_packet(packet) else "nothing"] += 1
            except DamagedError:
                outcomes["damaged"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_the_number_of_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_PARTS", 1000)
    chunk = struct.pack(">I4sI", 0, b"teXt", zlib.crc32(b"teXt"))
    png = encode(PIXELS, ".png")
    many = {
        "png": png[:33] + chunk * 1001 + png[33:],
        "jpeg": b"\xff\xd8" + b"\xff" * 1001,
        "webp": b"RIFF\0\0\0\0WEBP" + b"\0" * 8 * 1001,
        "gif": b"GIF89a" + b"\0" * 7 + b"!\xfe" + b"\x01x" * 1001 + b"\0;",
        "mp4": struct.pack(">I4s", 8, b"ftyp") * 1001,
    }
    for kind, content in many.items():
        assert file_format(content[:12]) == kind
        with pytest.raises(DamagedError, match="more than 1,000 parts"):
            find_xmp(io.BytesIO(content), kind)


def test_a_gif_packet_of_blocks_is_read_and_a_long_one_refused() -> None:
    """Some writers put a packet into blocks with lengths, without the trailer."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "GIF")
    plain = file.getvalue()
    packet = Provenance("training").packet()
    marked = gif_with_xmp(plain, packet)
    assert find_xmp(io.BytesIO(marked), "gif") == packet
    trailer = bytes([1, *range(255, -1, -1), 0])
    blocks = b"".join(bytes([len(part)]) + part for i in range(0, len(packet), 200) if (part := packet[i : i + 200]))
    assert find_xmp(io.BytesIO(marked.replace(packet + trailer, blocks + b"\0")), "gif") == packet
    with pytest.raises(DamagedError, match="bytes of XMP"):
        find_xmp(io.BytesIO(gif_with_xmp(plain, b"x" * (2**20 + 500))), "gif")


def test_inspecting_images_imports_neither_numpy_nor_pillow(samples: dict[str, bytes], tmp_path: Path) -> None:
    done = blocked({"numpy", "PIL", "onnxruntime", "av"}, "inspect", tmp_path / "a.png", tmp_path / "gen.onnx")
    assert done.returncode == 0, done.stderr
    assert [record["format"] for record in json.loads(done.stdout)["files"]] == ["png", "onnx"]


@pytest.mark.parametrize("name", ["a 'b' $c.onnx", "-c.onnx"])
def test_the_command_runs_in_a_shell(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx = Path(onnx_file.rename(tmp_path / name).name)
    main([f"--onnx={onnx}", "--seeds", "5,1", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    command = main(["inspect", str(tmp_path / "a.png"), f"./{onnx}"])["files"][0]["command"]
    script = f"""catinfer() {{ {shlex.quote(sys.executable)} -c 'from infer.cli import entry; entry()' "$@"; }}
    cd {shlex.quote(str(tmp_path))}; {command}"""
    root = str(Path(__file__).parents[2])
    subprocess.run(["sh", "-c", script], check=True, capture_output=True, env={"PYTHONPATH": root})
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
