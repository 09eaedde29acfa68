"""``catfid`` against ``python -m pytorch_fid``: two commands on the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pytorch_fid.inception import FID_WEIGHTS_URL

ROOT = Path(__file__).parents[4]


@pytest.mark.soak
@pytest.mark.slow
def test_both_commands_give_the_same_fid(
    inception_weights: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The whole path: file, resizing, network, statistics, distance."""
    sides = [str(make_folder("real", 32, size=48)), str(make_folder("fake", 28, size=48, shift=40, seed=1))]
    hub = tmp_path / "torch" / "hub" / "checkpoints"  # where pytorch_fid looks before it downloads
    hub.mkdir(parents=True)
    (hub / FID_WEIGHTS_URL.rpartition("/")[2]).symlink_to(inception_weights)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=os.environ | {"TORCH_HOME": str(tmp_path / "torch"), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = float(run("pytorch_fid", "--device", "cpu", "--num-workers", "0", *sides).split()[-1])
    printed = run(
        "trainer.metrics.catfid.cli", *sides, "--metrics", "fid", "--force", "--weights", str(inception_weights)
    )
    (value,) = json.loads(printed)["metrics"].values()
    assert value == pytest.approx(expected, rel=1e-4)
    assert value > 1
