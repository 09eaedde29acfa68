"""Failures of a training in one process: stop requests, damaged checkpoints, full disks, divergence."""

import errno
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from catgan.command import UserError
from catgan.dataset import Manifest
from tests.trainer.test_loop import CONFIG, Notes, run, same, without_times
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage
from trainer.config import EvalConfig, LoaderConfig, StopConfig
from trainer.distributed.context import LocalContext
from trainer.loop import Run, train
from trainer.step import GAN
from trainer.tracking.recorder import Recorder

pytestmark = [pytest.mark.usefixtures("tiny_extractor"), pytest.mark.slow]


class Watch(Notes):
    """Calls ``at_<nimg>`` once when the scalars at ``nimg`` images are logged."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = {int(name.removeprefix("at_")): action for name, action in actions.items()}

    def log_scalars(self, values: dict[str, float], nimg: int) -> None:
        super().log_scalars(values, nimg)
        if action := self.actions.pop(nimg, None):
            action()


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return Manifest.load(shards)


def last_state(folder: Path) -> dict:
    """The state in the latest checkpoint, without times."""
    return without_times(checkpoint.load(checkpoint.find_all(folder)[-1]))


def poison(monkeypatch: pytest.MonkeyPatch, at: int, lr: float) -> list[int]:
    """The step at ``at`` images makes a weight NaN, unless the learning rate is below ``lr``. Returns the list to which
    each such step appends its position."""
    original, hits = GAN.step, []

    def step(self: GAN, reals: torch.Tensor, nimg: int, *others: torch.Tensor | None) -> dict:
        if nimg == at and self.g_optimiser.param_groups[0]["lr"] >= lr:
            hits.append(nimg)
            with torch.no_grad():
                next(self.generator.parameters()).fill_(float("nan"))
        return original(self, reals, nimg, *others)

    monkeypatch.setattr(GAN, "step", step)
    return hits


@pytest.mark.parametrize("readers", [0, 2])
def test_a_stopped_training_saves_within_a_segment_and_continues_bit_for_bit(
    manifest: Manifest, tmp_path: Path, readers: int
):
    config = replace(CONFIG, loader=LoaderConfig(workers=readers, shuffle_buffer=30))
    run(config, manifest, tmp_path / "whole", Notes())

    context, storage = LocalContext(), Storage(tmp_path / "parts")
    storage.make()
    notes = Watch(at_96=context.stop)
    recorder = Recorder(manifest, storage, notes, "the-run")  # type: ignore[arg-type]
    assert train(config, manifest, context, Run(storage, "the-run"), recorder).status == "stopped"
    assert storage.checkpoints()[-1] == checkpoint.folder_name(96), "a tick between snapshots"
    assert run(config, manifest, tmp_path / "parts", notes).status == "done"
    assert same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))


def test_a_damaged_checkpoint_is_skipped_with_a_warning(manifest: Manifest, tmp_path: Path, capsys):
    run(CONFIG, manifest, tmp_path / "whole", Notes())
    run(replace(CONFIG, kimg=0.128), manifest, tmp_path / "parts", notes := Notes())
    older, latest = checkpoint.find_all(tmp_path / "parts")
    data = bytearray((latest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (latest / "state.pt").write_bytes(data)
    (tmp_path / "parts" / checkpoint.folder_name(10**6)).mkdir()  # incomplete
    capsys.readouterr()
    run(CONFIG, manifest, tmp_path / "parts", notes)
    said = capsys.readouterr().err
    assert f"taking {older.name}, the checkpoint before, instead of {latest.name}" in said
    assert same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))

    for folder in checkpoint.find_all(tmp_path / "parts"):
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        run(replace(CONFIG, kimg=1), manifest, tmp_path / "parts", Notes())


def test_training_continues_on_a_full_disk(manifest: Manifest, tmp_path: Path, capsys):
    """The sample grid and the checkpoint at 64 images cannot be written: the system limits files to a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # noqa: E731
    notes = Watch(at_32=lambda: limit(1 << 6), at_96=lambda: limit(before[0]))
    try:
        outcome = run(CONFIG, manifest, tmp_path, notes)
    finally:
        limit(before[0])
    assert outcome.status == "done"
    failed = ("samples/fakes_000000kimg.png not kept", "checkpoint not saved")
    for (kind, text), problem in zip(notes.notes, failed, strict=True):
        assert kind == "save"
        assert text.startswith(f"{problem} in {tmp_path} (File too large)")
    assert notes.grids == [0, 128, 192]
    assert [p.name for p in checkpoint.find_all(tmp_path)] == [checkpoint.folder_name(n) for n in (128, 192)]
    assert not list(tmp_path.rglob(".*"))
    _, info = checkpoint.load_generator(tmp_path)
    values = [values["fd16_efflite0"] for _, values in notes.points if "fd16_efflite0" in values]
    assert info["metric"]["value"] == min(values), "the generator at 64 images is kept later if it is the best"


def test_old_checkpoints_that_cannot_be_removed_are_reported(manifest: Manifest, tmp_path: Path, monkeypatch):
    def refuse(self: Storage, name: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Storage, "remove", refuse)
    assert run(CONFIG, manifest, tmp_path, notes := Notes()).status == "done"
    assert notes.notes == [
        ("save", f"older checkpoints stay in {tmp_path} (Permission denied) until the next is saved")
    ]
    assert len(checkpoint.find_all(tmp_path)) == 3


def test_divergence_ends_the_training_within_a_tick_and_keeps_the_best(manifest: Manifest, tmp_path: Path, monkeypatch):
    poison(monkeypatch, 72, 0.0)
    outcome = run(CONFIG, manifest, tmp_path, Notes())
    assert outcome.status == "diverged"
    assert "not finite at 0.096 kimg" in outcome.message
    assert [p.name for p in checkpoint.find_all(tmp_path)] == [checkpoint.folder_name(64)]
    generator, info = checkpoint.load_generator(tmp_path)
    assert info["kimg"] == 0.064
    assert all(torch.isfinite(t).all() for t in generator.state_dict().values())


def test_a_weight_that_is_not_finite_after_the_last_step_is_not_saved(manifest: Manifest, tmp_path: Path, monkeypatch):
    original = GAN.step

    def step(self, reals, nimg, *others):
        stats = original(self, reals, nimg, *others)
        if nimg == 120:  # the losses of this step are still finite
            with torch.no_grad():
                next(self.generator.parameters()).fill_(float("nan"))
        return stats

    monkeypatch.setattr(GAN, "step", step)
    outcome = run(CONFIG, manifest, tmp_path, Notes())
    assert (outcome.status, outcome.message) == ("diverged", "weights not finite at 0.128 kimg")
    assert [p.name for p in checkpoint.find_all(tmp_path)] == [checkpoint.folder_name(64)]


def test_a_weight_that_is_not_finite_at_a_stop_request_is_not_saved(manifest: Manifest, tmp_path: Path, monkeypatch):
    original, context, storage = GAN.step, LocalContext(), Storage(tmp_path)

    def step(self, reals, nimg, *others):
        stats = original(self, reals, nimg, *others)
        if nimg == 88:
            with torch.no_grad():
                next(self.generator.parameters()).fill_(float("nan"))
            context.stop()
        return stats

    monkeypatch.setattr(GAN, "step", step)
    storage.make()
    recorder = Recorder(manifest, storage, Notes(), "the-run")  # type: ignore[arg-type]
    outcome = train(CONFIG, manifest, context, Run(storage, "the-run"), recorder)
    assert (outcome.status, outcome.message) == ("diverged", "weights not finite at 0.096 kimg")
    assert storage.checkpoints() == [checkpoint.folder_name(64)]


def test_rollbacks_halve_the_learning_rates_until_training_is_stable(manifest: Manifest, tmp_path: Path, monkeypatch):
    lr = CONFIG.optim.g_lr(0)
    hits = poison(monkeypatch, 72, lr / 3)
    config = replace(CONFIG, stop=StopConfig(rollbacks=2))
    outcome = run(config, manifest, tmp_path, notes := Notes())
    assert outcome.status == "done"
    assert hits == [72, 72]
    assert [kind for kind, _ in notes.notes] == ["rollback"] * 2
    assert checkpoint.load(checkpoint.find_all(tmp_path)[-1])["lr_scale"] == 0.25
    rates = {nimg: values["lr/generator"] for nimg, values in notes.points if "lr/generator" in values}
    assert rates == {n: lr if n <= 64 else lr / 4 for n in range(32, 193, 32)}, "each position once"

    assert run(replace(config, kimg=0.256), manifest, tmp_path, notes).status == "done"
    assert notes.points[-1][1].get("lr/generator", lr / 4) == lr / 4, "a continued training keeps the reduced rates"


def test_each_rollback_halves_the_rates_that_diverged(manifest: Manifest, tmp_path: Path, monkeypatch):
    """Also if a checkpoint in between was saved with halved rates."""
    lr = CONFIG.optim.g_lr(0)
    original = GAN.step

    def step(self: GAN, reals: torch.Tensor, nimg: int, *others: torch.Tensor | None) -> dict:
        if self.g_optimiser.param_groups[0]["lr"] >= {72: lr, 136: lr / 2}.get(nimg, torch.inf):
            with torch.no_grad():
                next(self.generator.parameters()).fill_(float("nan"))
        return original(self, reals, nimg, *others)

    monkeypatch.setattr(GAN, "step", step)
    config = replace(CONFIG, stop=StopConfig(rollbacks=2))
    assert run(config, manifest, tmp_path, Notes()).status == "done"
    scales = [checkpoint.load(folder)["lr_scale"] for folder in checkpoint.find_all(tmp_path)]
    assert scales == [0.5, 0.25]


def test_evaluation_interval_skips_evaluations_but_no_checkpoints(manifest: Manifest, tmp_path: Path):
    config = replace(CONFIG, kimg=0.32, eval=EvalConfig(extractor="efflite0", num=16, every=2))
    run(replace(config, kimg=0.192), manifest, tmp_path / "parts", parts := Notes())
    run(config, manifest, tmp_path / "parts", parts)
    run(config, manifest, tmp_path / "whole", whole := Notes())
    for notes, expected in ((whole, [64, 128, 256, 320]), (parts, [64, 128, 192, 256, 320])):
        evaluated = [(nimg, values) for nimg, values in notes.points if "fd16_efflite0" in values]
        assert [nimg for nimg, _ in evaluated] == expected, "every second snapshot, the first and the last"
        assert all(0 < values["speed/evaluation_share"] < 1 for _, values in evaluated)
        assert notes.grids == [0, 64, 128, 192, 256, 320]
    assert [p.name for p in checkpoint.find_all(tmp_path / "whole")] == [checkpoint.folder_name(n) for n in (256, 320)]


def test_the_best_metric_is_reset_when_the_metric_changes(manifest: Manifest, tmp_path: Path):
    """A distance of 0 stays the best only as long as the metric's settings are the same."""
    run(CONFIG, manifest, tmp_path, Notes())
    state = checkpoint.load(checkpoint.find_all(tmp_path)[-1])
    state["best"]["value"] = 0.0
    Storage(tmp_path).save(checkpoint.folder_name(state["nimg"]), checkpoint.encode(state))
    longer = replace(CONFIG, kimg=CONFIG.kimg + 0.064)
    run(longer, manifest, tmp_path, Notes())
    assert checkpoint.load(checkpoint.find_all(tmp_path)[-1])["best"]["value"] == 0.0
    other = replace(longer, kimg=longer.kimg + 0.064, eval=EvalConfig(extractor="efflite0", num=24))
    run(other, manifest, tmp_path, Notes())
    best = checkpoint.load(checkpoint.find_all(tmp_path)[-1])["best"]
    assert (best["name"], best["kimg"]) == ("fd24_efflite0", other.kimg)
    assert best["value"] > 0
