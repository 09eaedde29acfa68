"""The loop as a whole, in-process: resuming is as good as never having stopped."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest
from export.generator import USUAL_ABS_DIFF, export_onnx, metadata
from infer.grid import grid
from infer.latents import latents
from infer.origin import inspect
from infer.provenance import SOURCE_TYPE
from infer.session import Generator
from tests.trainer.damage import damage
from tests.trainer.tiny import tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import Position
from trainer.checkpoints.storage import Storage
from trainer.config import (
    AugmentConfig,
    Config,
    EvalConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    ProjectedConfig,
    StopConfig,
    TrackConfig,
    constant,
)
from trainer.distributed.context import LocalContext, Request
from trainer.loop import Outcome, Run, plan, train, why_stopped
from trainer.losses import LOSSES
from trainer.recipes import FAMILIES
from trainer.step import GAN
from trainer.tracking.alarms import OverfittingCheck
from trainer.tracking.recorder import Recorder

pytestmark = pytest.mark.usefixtures("tiny_extractor")

CONFIG = Config(
    recipe="tiny",
    model=ModelConfig(size=32, z_dim=8, g_width=4, d_width=4, max_width=8, d_norm="none"),
    loss=LossConfig("rpgan", gamma=constant(0.1), penalty_every=3),
    augment=AugmentConfig(policy=("colour", "translation", "cutout"), p=constant(0.5)),
    loader=LoaderConfig(workers=0, shuffle_buffer=30),
    eval=EvalConfig(extractor="efflite0", num=16),
    track=TrackConfig(tick_kimg=0.032, snapshot_kimg=0.064, grid=4),
    batch=8,
    kimg=0.192,
)


class Notes:
    """Stands in for the tracker: what rank 0 would have sent to MLflow."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.grids: list[int] = []
        self.notes: list[tuple[str, str]] = []
        self.checkpoints: list[dict[str, Any]] = []

    def rewind(self, nimg: int) -> None:
        self.points = [(n, values) for n, values in self.points if n <= nimg]

    def log_scalars(self, values: dict[str, float], nimg: int) -> None:
        self.points.append((nimg, values))

    def log_grid(self, key: str, nimg: int, path: Path) -> None:
        self.grids.append(nimg)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.is_file()

    def note(self, kind: str, text: str, nimg: int) -> None:
        self.notes.append((kind, text))

    def log_checkpoint(self, **values: Any) -> None:
        self.checkpoints.append(values)


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return Manifest.load(shards)


def run(
    config: Config,
    manifest: Manifest,
    run_dir: Path,
    notes: Notes,
    init_from: Path | None = None,
    context: LocalContext | None = None,
) -> Outcome:
    """From the newest checkpoint in ``run_dir``, if there is one."""
    torch.manual_seed(torch.seed())  # a process has no memory of the one before
    storage = Storage(run_dir)
    storage.make()
    recorder = Recorder(manifest, storage, notes, "the-run")  # type: ignore[arg-type]
    return train(config, manifest, context or LocalContext(), Run(storage, "the-run", init_from=init_from), recorder)


class Requests(LocalContext):
    """Answers the first tick with ``first``."""

    def __init__(self, first: Request) -> None:
        super().__init__()
        self.answers: list[Request] = [first]

    def request(self) -> Request | None:
        return self.answers.pop() if self.answers else None


def same(a: object, b: object) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_times(state: dict) -> dict:
    drop = {"config", "best", "last_metric"}
    kept = {k: v for k, v in state.items() if k not in drop}
    return kept | {k: {n: v for n, v in state[k].items() if n != "seconds"} for k in ("best", "last_metric")}


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("share_batch", [True, False])
def test_resumed_is_bit_for_bit_uninterrupted(manifest: Manifest, tmp_path: Path, readers: int, share_batch: bool):
    config = replace(
        CONFIG,
        loader=LoaderConfig(workers=readers, shuffle_buffer=30),
        loss=replace(CONFIG.loss, share_batch=share_batch),
    )
    whole, parts = Notes(), Notes()
    run(config, manifest, tmp_path / "whole", whole)
    run(replace(config, kimg=0.064), manifest, tmp_path / "parts", parts)
    # Cut off after a tick that no checkpoint covers: its points must not stand twice.
    parts.points.append((96, {"loss/generator": -1.0}))
    run(config, manifest, tmp_path / "parts", parts)

    a, b = (checkpoint.load(checkpoint.find_all(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert a["nimg"] == 192
    assert same(without_times(a), without_times(b))

    def values(notes: Notes) -> list:
        return [(n, {k: v for k, v in p.items() if not k.startswith(("speed/", "system/"))}) for n, p in notes.points]

    assert values(whole) == values(parts)
    assert whole.grids == parts.grids == [0, 64, 128, 192]


def test_resumed_with_a_projected_discriminator_is_bit_for_bit_uninterrupted(
    manifest: Manifest, tmp_path: Path, monkeypatch
):
    """Cut off before it joins, and stopped after that."""
    monkeypatch.setattr("trainer.projected._ALONE", 16)
    config = replace(tiny("dcgan-cpu"), projected=ProjectedConfig(weight=3.0, start_kimg=0.07))
    config = replace(config, eval=replace(config.eval, extractor="opennsfw"))
    run(config, manifest, tmp_path / "whole", Notes())
    notes = Notes()
    run(replace(config, kimg=0.064), manifest, tmp_path / "parts", notes)
    run(config, manifest, tmp_path / "parts", notes, context=Requests("stop"))
    run(config, manifest, tmp_path / "parts", notes)
    a, b = (checkpoint.load(checkpoint.find_all(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert a["nimg"] == 192
    assert a["projected"]["num_images"] == 192 - 72
    assert same(without_times(a), without_times(b))
    joined = [nimg for nimg, values in notes.points if "projected/real" in values]
    assert joined == [96, 128, 160, 192]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_resumes_as_if_uninterrupted_and_exports(family: str, manifest: Manifest, tmp_path: Path):
    """Cut off in the middle of a fade where it grows, then stopped between snapshots; steered by its critic where the
    loss allows that."""
    config = tiny(family)
    if LOSSES[config.loss.name].has_level:
        policy = AugmentConfig(policy=("colour", "cutout"), p=constant(0.5), target=0.6, target_kimg=0.3)
        config = replace(config, augment=policy, loss=replace(config.loss, lecam=0.1))
    assert config.grow.level(64, 32) % 1, "the cut is not in a fade"
    whole, parts = Notes(), Notes()
    run(config, manifest, tmp_path / "whole", whole)
    run(replace(config, kimg=0.064), manifest, tmp_path / "parts", parts)
    run(config, manifest, tmp_path / "parts", parts, context=Requests("stop"))
    assert checkpoint.find_all(tmp_path / "parts")[-1].name == checkpoint.folder_name(96), "not between snapshots"
    run(config, manifest, tmp_path / "parts", parts)
    a, b = (checkpoint.load(checkpoint.find_all(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert a["nimg"] == 192
    assert same(without_times(a), without_times(b))

    generator, info = checkpoint.load_generator(tmp_path / "whole")
    assert export_onnx(generator, tmp_path / "gen.onnx", metadata(info)) <= USUAL_ABS_DIFF


@pytest.mark.parametrize("request_", ["stop", "save"])
def test_a_checkpoint_between_snapshots_exports_what_training_would_show(
    manifest: Manifest, tmp_path: Path, request_: Request
):
    """Also before the first snapshot, when the EMA has moved far from its initial weights."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, g_lr=constant(1e-2)))
    run(replace(config, kimg=0.032), manifest, tmp_path / "shown", Notes())  # its last step is a snapshot
    outcome = run(replace(config, kimg=0.064), manifest, tmp_path / "asked", Notes(), context=Requests(request_))
    assert outcome.status == ("stopped" if request_ == "stop" else "done")
    folder = tmp_path / "asked" / checkpoint.folder_name(32)
    a, b = checkpoint.load(tmp_path / "shown" / folder.name), checkpoint.load(folder)
    assert same(a["ema"], b["ema"])
    assert same(a["rng"], b["rng"])

    generator, info = checkpoint.load_generator(folder)
    export_onnx(generator, tmp_path / "gen.onnx", metadata(info))
    exported = Generator(tmp_path / "gen.onnx", "cpu")
    sheet = np.asarray(grid(exported(latents(range(4), exported.z_dim))), dtype=int)
    with Image.open(tmp_path / "shown" / "samples" / "fakes_000000kimg.png") as shown:
        assert np.abs(sheet - np.asarray(shown)).max() <= 1


def test_training_ends_when_nothing_improves(manifest: Manifest, tmp_path: Path, capsys):
    still = replace(
        CONFIG,
        optim=replace(CONFIG.optim, g_lr=constant(1e-30), d_lr=constant(1e-30)),
        stop=StopConfig(patience_kimg=0.1),
        kimg=1.0,
    )
    run(still, manifest, tmp_path, Notes())
    (last, end) = checkpoint.find_all(tmp_path)
    assert checkpoint.position(end.name) == 192, "the first evaluation at 64 stays the best"
    assert "no better for 0.1 kimg" in capsys.readouterr().err
    run(still, manifest, tmp_path, Notes())
    assert checkpoint.find_all(tmp_path) == [last, end], "asked again, it has nothing to do"


def test_training_ends_when_the_discriminator_overfits_and_the_metric_is_worse(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    still = replace(
        CONFIG,
        optim=replace(CONFIG.optim, g_lr=constant(1e-30), d_lr=constant(1e-30)),
        stop=StopConfig(overfitting=0.7),
        kimg=1.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OverfittingCheck, "__call__", lambda self, gan: {"d/overfitting": 0.75})
        run(still, manifest, tmp_path, Notes())
    assert checkpoint.position(checkpoint.find_all(tmp_path)[-1].name) == 128, "the first evaluation at 64 is the best"
    assert "(d/overfitting 0.75, --stop.overfitting 0.7), and the metric was better at 0.064" in capsys.readouterr().err
    before = checkpoint.find_all(tmp_path)
    run(still, manifest, tmp_path, Notes())
    assert checkpoint.find_all(tmp_path) == before, "the checkpoint knows it"


@pytest.mark.parametrize(
    ("overfitting", "last", "stops"), [(0.8, 2, True), (0.6, 2, False), (0.8, 1, False), (None, 2, False)]
)
def test_overfitting_alone_is_no_reason_to_stop(overfitting: float | None, last: float, stops: bool):
    position = Position(2000, best={"kimg": 1.0}, last_metric={"kimg": float(last)}, overfitting=overfitting)
    assert (why_stopped(replace(CONFIG, stop=StopConfig(overfitting=0.7)), position) is not None) == stops
    assert why_stopped(CONFIG, position) is None


def test_a_new_run_begins_with_given_weights(manifest: Manifest, tmp_path: Path, capsys):
    run(CONFIG, manifest, tmp_path / "a", Notes())
    frozen = replace(CONFIG, optim=replace(CONFIG.optim, g_lr=constant(1e-30), d_lr=constant(1e-30)), kimg=0.064)
    run(frozen, manifest, tmp_path / "b", Notes(), init_from=tmp_path / "a")
    a, b = (checkpoint.load(checkpoint.find_all(tmp_path / name)[-1]) for name in "ab")
    parameters = [n for n in a["ema"] if "running" not in n and "num_batches" not in n]
    assert parameters
    assert all(torch.allclose(a["ema"][n], b["generator"][n], rtol=0, atol=1e-12) for n in parameters)
    assert b["nimg"] == 64
    assert "of the values) loaded" in capsys.readouterr().err


def test_what_a_run_leaves_behind(manifest: Manifest, tmp_path: Path):
    notes = Notes()
    run(CONFIG, manifest, tmp_path, notes)
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {
        "reals.png",
        "samples/fakes_000000kimg.png",
        "best/gen.safetensors",
        *(f"checkpoint_000000000{n}/{file}" for n in (128, 192) for file in ("state.pt", "checkpoint.json")),
    }
    grids = [str(tmp_path / name) for name in ("samples/fakes_000000kimg.png", "reals.png")]
    generated, photos = inspect(grids)["files"]
    assert (generated["digital_source_type"], generated["kind"]) == (SOURCE_TYPE, "training")
    assert photos["digital_source_type"] is photos["creator_tool"] is None
    ticks = [values for _, values in notes.points if "loss/generator" in values]
    assert len(ticks) == 6
    assert {"loss/discriminator", "loss/r1r2", "d/real", "d/fake", "lr/generator", "augment/p"} <= set(ticks[0])
    assert "augment/noise" not in ticks[0]  # always zero here
    assert all(0 <= values["system/cpu_utilization_percentage"] <= 100 for values in ticks)
    assert all(values["system/system_memory_usage_megabytes"] > 1 for values in ticks)
    assert all(values["speed/images_per_second"] > 0 and 0 <= values["speed/data_wait"] < 1 for values in ticks)
    metrics = [values["fd16_efflite0"] for _, values in notes.points if "fd16_efflite0" in values]
    assert len(metrics) == 3
    for values in (values for _, values in notes.points if "fd16_efflite0" in values):
        assert {"diversity", "d/train", "d/val"} <= set(values)
    _, info = checkpoint.load_generator(tmp_path)
    assert info["metric"]["value"] == min(metrics)
    saved = [64, 128, 192]
    assert [(c["nimg"], c["kept"]) for c in notes.checkpoints] == [
        (n, [checkpoint.folder_name(k) for k in saved if k <= n][-2:]) for n in saved
    ]
    assert [c["metric"]["value"] for c in notes.checkpoints] == metrics
    assert [c["best"]["value"] for c in notes.checkpoints] == [min(metrics[:i]) for i in (1, 2, 3)]
    assert (info["recipe"], info["run_id"], info["dataset_digest"]) == ("tiny", "the-run", manifest.digest)
    json.dumps(info)


def test_ranks_compute_in_bf16_only_if_all_can(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another rank's machine multiplies no bf16 natively."""
    used: list[bool] = []
    step = GAN.step

    def noting(self: GAN, *args: Any) -> Any:
        used.append(self.bf16)
        return step(self, *args)

    monkeypatch.setattr("trainer.networks.native_bf16", lambda _: True)
    monkeypatch.setattr(GAN, "step", noting)
    run(CONFIG, manifest, tmp_path / "a", Notes())
    assert set(used) == {True}
    used.clear()
    monkeypatch.setattr("trainer.loop.gather", lambda value: [value, False] if value is True else [value])
    run(CONFIG, manifest, tmp_path / "b", Notes())
    assert set(used) == {False}


def test_a_checkpoint_holds_everything(manifest: Manifest, tmp_path: Path):
    run(CONFIG, manifest, tmp_path, Notes())
    state = checkpoint.load(checkpoint.find_all(tmp_path)[-1])
    assert {
        *("format_version", "nimg", "num_steps", "config", "generator", "discriminator", "ema"),
        *(
            "g_optimiser",
            "d_optimiser",
            "lr_scale",
            "anchors",
            "anchor_steps",
            "rng",
            "best",
            "last_metric",
            "overfitting",
            "run_id",
            "dataset_digest",
        ),
    } == set(state)
    assert len(state["rng"]) == 1
    assert not any(key.startswith("module.") for key in state["generator"])
    assert Config.from_dict(state["config"]) == CONFIG


def test_unusable_pictures_are_counted_by_shard_and_too_many_stop_the_training(shards: Path, tmp_path: Path):
    manifest = replace(Manifest.load(shutil.copytree(shards, tmp_path / "shards")), max_broken=0.2)
    names = [damage(manifest, number) for number in range(len(manifest.splits["train"].shards))]
    notes = Notes()
    run(CONFIG, manifest, tmp_path / "run", notes)
    met = {key: count for _, values in notes.points for key, count in values.items()}
    counts = {key: count for key, count in met.items() if key.startswith("data/broken/")}
    assert set(counts.values()) == {1}
    assert set(counts) <= {f"data/broken/{Path(name).stem}" for name in names}
    strict = replace(manifest, max_broken=0.001)
    with pytest.raises(UserError, match=r"unusable.*train-000"):
        run(CONFIG, strict, tmp_path / "other", Notes())


def test_another_world_size_draws_fresh_random_numbers(manifest: Manifest, tmp_path: Path, monkeypatch):
    """None that were drawn before the checkpoint, none that a rank of before would have drawn, always the same."""
    honest, drawn = GAN.step, []

    def step(self: GAN, *arguments: object) -> dict:
        drawn[-1].append(torch.get_rng_state().numpy().tobytes())
        return honest(self, *arguments)  # type: ignore[arg-type]

    def states(kimg: float, folder: Path) -> list[bytes]:
        drawn.append([])
        run(replace(CONFIG, kimg=kimg), manifest, folder, Notes())
        return drawn[-1]

    monkeypatch.setattr(GAN, "step", step)
    before = states(0.064, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (folder,) = checkpoint.find_all(tmp_path / "two")
    state = checkpoint.load(folder)
    state["rng"] = state["rng"] * 2  # as two ranks would have left it
    Storage(tmp_path / "two").save(folder.name, checkpoint.encode(state))
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    one, two, three = (states(0.096, tmp_path / name) for name in ("one", "two", "three"))
    assert two == three
    assert len({*before, *one, *two}) == len(before) + len(one) + len(two) == 16


def test_another_model_is_refused(manifest: Manifest, tmp_path: Path):
    run(replace(CONFIG, kimg=0.064), manifest, tmp_path, Notes())
    with pytest.raises(UserError, match="another model"):
        run(replace(CONFIG, model=replace(CONFIG.model, z_dim=9)), manifest, tmp_path, Notes())


def test_a_projected_discriminator_of_other_maps_is_refused(manifest: Manifest, tmp_path: Path):
    config = replace(tiny("dcgan-cpu"), kimg=0.064, projected=ProjectedConfig(weight=1.0, strides=(4, 8)))
    run(config, manifest, tmp_path, Notes())
    other = replace(config, kimg=0.128, projected=ProjectedConfig(weight=1.0, strides=(4, 16)))
    with pytest.raises(UserError, match=r"give --projected\.strides 4 8, or another --name"):
        run(other, manifest, tmp_path, Notes())


def test_plan_makes_snapshots_of_whole_ticks():
    config = replace(CONFIG, track=TrackConfig(tick_kimg=0.03, snapshot_kimg=0.1), kimg=1.0)
    tick, snapshot, total = plan(config)
    assert (tick, snapshot % tick, total) == (4, 0, 125)
