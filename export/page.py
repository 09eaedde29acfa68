"""``catexport --web``: a static web page that generates images in the browser.

The page's own files are in ``export/web``. onnxruntime-web is downloaded once with npm, under the user's npm
configuration, in a pinned version with a pinned digest, and cached.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.files import atomic_write, cache_dir
from catgan.location import resolved_path
from infer.directions import read_directions
from infer.onnxfile import read_model
from infer.provenance import this_software
from infer.session import Generator

ONNXRUNTIME_WEB = "onnxruntime-web@1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
_RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PAGE_FILES = (
    "index.html",
    "style.css",
    "app.js",
    "classes.js",
    "directions.js",
    "favourites.js",
    "generator.js",
    "provenance.js",
    "random.js",
)
_NPM_TIMEOUT = 600  # seconds


def check_folder(folder: Path) -> None:
    """Raise ``UserError`` unless ``folder`` is missing, empty or an earlier page."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--web {folder}: is a file; give a folder")
    if resolved_path(folder) in (here := resolved_path("."), *here.parents):
        raise UserError(f"--web {folder}: is the working directory, which cannot be replaced: cd to another one")
    page = {*_RUNTIME_FILES, *_PAGE_FILES, "gen.onnx", "gen.json"}
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(found - page if {"index.html", "gen.json"} <= found else found):
        raise UserError(f"--web {folder}: has other files, such as {others[0]}; give a new folder or an earlier page")


def write_page(onnx: Path, folder: Path) -> None:
    """Write a page with the generator ``onnx`` to ``folder``, replacing an earlier page, which stays if that fails.

    Raises:
        UserError: ``onnx`` is not a generator with float output, the folder has other files, or npm fails.
    """
    check_folder(folder)
    generator = Generator(onnx, "cpu")
    if generator.is_uint8:
        raise UserError(f"--web: {onnx} rounds to pixels itself; the page needs a file without --uint8")
    facts: dict[str, Any] = {
        "size": generator.size,
        "z_dim": generator.z_dim,
        "sha256": generator.sha256,
        "software": this_software(),
    }
    directions = read_directions(generator.metadata, generator.z_dim, onnx)
    if len(directions):
        facts["directions"] = directions.tolist()
    if generator.classes:
        facts["classes"] = generator.classes
    model = read_model(onnx)
    files = {name: resources.files("export").joinpath("web", name).read_bytes() for name in _PAGE_FILES}
    files |= {"gen.onnx": model.data, "gen.json": json.dumps(facts).encode() + b"\n"}
    try:
        _replace(resolved_path(folder), files | _onnxruntime_web())
    except OSError as error:
        raise UserError(f"--web {folder}: cannot be written ({error.strerror or error})") from error


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace ``folder`` by one with ``files``. Raises OSError, which leaves the old folder as it was."""
    hidden = f".{folder.name}-{uuid.uuid4().hex[:8]}"
    new, old = folder.with_name(f"{hidden}.new"), folder.with_name(f"{hidden}.old")
    try:
        new.mkdir(parents=True)
        for name, content in files.items():
            (new / name).write_bytes(content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _onnxruntime_web() -> dict[str, bytes]:
    """The files of onnxruntime-web that the page needs: name -> content."""
    archive = cache_dir() / f"{ONNXRUNTIME_WEB}.tgz"
    data = archive.read_bytes() if archive.exists() else b""
    if hashlib.sha512(data).hexdigest() != SHA512:
        data = _npm_pack()
        atomic_write(archive, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {name: tar.extractfile(f"package/dist/{name}") for name in _RUNTIME_FILES}
        return {name: file.read() for name, file in files.items() if file}


def _npm_pack() -> bytes:
    """Download the archive with npm and check its digest."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--web needs npm once, to download {ONNXRUNTIME_WEB}; install Node.js with npm")
    say(f"downloading {ONNXRUNTIME_WEB} with npm")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", ONNXRUNTIME_WEB, "--pack-destination", folder, "--ignore-scripts", "--loglevel=error"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_NPM_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UserError(f"npm pack {ONNXRUNTIME_WEB} did not finish in {_NPM_TIMEOUT} s; see `npm ping`") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
            raise UserError(f"npm pack {ONNXRUNTIME_WEB} failed ({reason}); see `npm ping`") from None
        data = b"".join(path.read_bytes() for path in Path(folder).glob("*.tgz"))
    if hashlib.sha512(data).hexdigest() != SHA512:
        raise UserError(f"the SHA-512 of {ONNXRUNTIME_WEB} from npm is not the expected one; not used")
    return data
