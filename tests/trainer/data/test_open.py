"""Opening data sets, and the embedded one."""

from pathlib import Path

import pytest

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.config import LoaderConfig
from trainer.data import open as opening
from trainer.data.build.shards import write_shards
from trainer.data.open import open_data


@pytest.fixture(autouse=True)
def few_cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "NUM_DRAWN", 20)


def test_the_loader_options_are_part_of_the_manifest(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(manifest.root).parent)
    opened = open_data(manifest.root, 64, LoaderConfig(cache="shards-cache", max_broken=0.2))
    assert opened.digest == manifest.digest
    assert opened.size == manifest.size  # the data's, not the one asked for
    assert opened.cache == str(Path(manifest.root).parent / "shards-cache")
    assert opened.max_broken == 0.2
    assert open_data(manifest.root, 64, LoaderConfig()).cache == ""


def test_drawn_cats_are_made_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    first = open_data(None, 16, LoaderConfig())
    assert "drawing 20 cats at 16x16" in capfd.readouterr().err
    assert (first.size, sum(split.images for split in first.splits.values())) == (16, 20)
    assert Path(first.root).parent == tmp_path / "cache"
    assert open_data(None, 16, LoaderConfig()).digest == first.digest
    assert "drawing" not in capfd.readouterr().err


def test_a_process_that_draws_second_uses_the_set_of_the_first(monkeypatch: pytest.MonkeyPatch):
    def beaten(out, images, **options) -> Manifest:
        write_shards(out, images, **options)
        raise UserError(f"{out} exists and is not an empty folder")

    monkeypatch.setattr(opening, "write_shards", beaten)
    assert open_data(None, 16, LoaderConfig()).size == 16
    monkeypatch.setattr(opening, "write_shards", lambda *_, **__: (_ for _ in ()).throw(UserError("no space left")))
    with pytest.raises(UserError, match="no space left"):
        open_data(None, 32, LoaderConfig())
