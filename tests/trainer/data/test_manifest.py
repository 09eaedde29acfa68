from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from catgan.command import UserError
from catgan.dataset import Manifest


def rewrite(folder: str, **changes: Any) -> None:
    record = json.loads(Path(folder, "manifest.json").read_text())
    Path(folder, "manifest.json").write_text(json.dumps({**record, **changes}))


def test_manifest_travels_between_processes_and_folders(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(manifest.root).parent)
    loaded = pickle.loads(pickle.dumps(Manifest.load(Path(manifest.root).name)))
    monkeypatch.chdir(tmp_path)
    assert loaded == manifest
    assert all(Path(path).is_file() for path in loaded.paths("train"))


def test_digest_does_not_depend_on_the_location(manifest: Manifest, copy: Manifest) -> None:
    assert Manifest.load(copy.root).digest == manifest.digest


def test_load_reports_a_missing_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set at .*none"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[]", "null", '{"format_version": 1}', "[" * 10**5])
def test_load_refuses_files_that_are_no_manifest(copy: Manifest, text: str) -> None:
    Path(copy.root, "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.load(copy.root)


def test_load_refuses_another_format_version(copy: Manifest) -> None:
    rewrite(copy.root, format_version=99)
    with pytest.raises(UserError, match="format_version 99, this version reads 1"):
        Manifest.load(copy.root)


@pytest.mark.parametrize("seed", [float("inf"), "one", None])
def test_load_refuses_a_value_that_is_no_number(copy: Manifest, seed: object) -> None:
    rewrite(copy.root, seed=seed)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Manifest.load(copy.root)


def test_load_refuses_an_edited_manifest(copy: Manifest) -> None:
    record = json.loads(Path(copy.root, "manifest.json").read_text())
    record["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    rewrite(copy.root, splits=record["splits"])
    with pytest.raises(UserError, match="digest"):
        Manifest.load(copy.root)


def test_load_refuses_shards_outside_the_folder(copy: Manifest) -> None:
    record = json.loads(Path(copy.root, "manifest.json").read_text())
    record["splits"]["val"]["shards"][0]["name"] = "../copy/val-000000.tar"
    rewrite(copy.root, splits=record["splits"])
    with pytest.raises(UserError, match="shard name"):
        Manifest.load(copy.root)


def test_load_reports_missing_and_truncated_shards(copy: Manifest) -> None:
    shard = Path(copy.root, "train-000003.tar")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-000003\.tar has \d+ bytes instead of \d+"):
        Manifest.load(copy.root)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar is missing"):
        Manifest.load(copy.root)
