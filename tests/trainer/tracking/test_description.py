"""What describes a run in MLflow is text that each store takes."""

from __future__ import annotations

import json
from dataclasses import replace

from catgan.dataset import Manifest, Split
from trainer.tracking.description import describe


def test_paths_that_are_not_utf_8_and_control_characters_are_escaped() -> None:
    empty = {"train": Split(()), "val": Split(())}
    manifest = Manifest("/data/caf\udce9\r", 32, empty, seed=0, source=(), options={}, tool="catgan")
    found = describe({"recipe": "dcgan", "loader": {"cache": "/a\udcff\n"}}, replace(manifest, cache="x"))
    assert found["dataset"]["source"] == {"uri": r"/data/caf\xe9\r"}
    assert found["dataset"]["name"] == r"caf\xe9\r"
    assert found["params"]["loader.cache"] == r"/a\xff\n"
    json.dumps(found, ensure_ascii=False).encode()
