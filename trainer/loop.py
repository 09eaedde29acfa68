"""The training loop: the same in one process and in the workers of Ray Train.

A *tick* reports losses and speed, and heeds what the surroundings ask for; a *snapshot* draws samples, evaluates, keeps
the best generator and saves a checkpoint. Between ticks nothing waits for the device.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from catgan.command import UserError, say
from trainer.checkpoints import checkpoint, transfer
from trainer.checkpoints.storage import Storage, load_checkpoint
from trainer.config import Config
from trainer.data.manifest import Manifest
from trainer.data.stream import TrainBatches, share, train_batches
from trainer.distributed.collectives import broadcast, gather, mean_over_ranks
from trainer.distributed.context import Context
from trainer.features.extractors import choose_extractor
from trainer.metrics.evaluate import Evaluator
from trainer.models import grown_kimg
from trainer.step import GAN
from trainer.tracking.recorder import Position, Recorder, generate


@dataclass(frozen=True)
class Run:
    """Which training this is."""

    storage: Storage
    """Where it is kept; the newest checkpoint there is what it continues from."""
    run_id: str
    """MLflow's. A checkpoint of another run is a starting point, but its best is not this run's."""
    resume_from: str | None = None
    """The checkpoint of another run, a path or URL, to continue from as long as there is none of its own."""
    init_from: Path | None = None
    """Weights to begin with where there is no checkpoint, see ``transfer.init_from``."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended: all done, at somebody's request, or with values that are not finite."""

    status: Literal["done", "stopped", "diverged"]
    message: str = ""


class Diverged(Exception):
    """A loss or a weight is no longer finite; ``lr_scale`` is that of the ``GAN``."""

    def __init__(self, message: str, lr_scale: float) -> None:
        super().__init__(message)
        self.lr_scale = lr_scale


class Meter:
    """Sums of per-step statistics since ``nimg`` images, kept on the device until ``read``."""

    def __init__(self, nimg: int) -> None:
        self.nimg = nimg
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, stats: dict[str, Tensor]) -> None:
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, nimg: int) -> dict[str, float]:
        """Means over steps and ranks, and speed; one collective and one wait for the device."""
        names = sorted(self.sums)
        means = mean_over_ranks(torch.stack([self.sums[n] / self.counts[n] for n in names])).tolist()
        seconds = time.perf_counter() - self.started
        return dict(zip(names, means, strict=True)) | {
            "speed/images_per_second": (nimg - self.nimg) / seconds,
            "speed/data_wait": self.waited / seconds,
        }


class Allowance:
    """Which snapshots are evaluated, such that evaluation takes at most a share of the training's time, that before
    it was continued included."""

    def __init__(self, share: float, position: Position) -> None:
        self.share, self.position = share, position
        self.began = time.perf_counter() - position.trained

    def allows(self) -> bool:
        """Whether one more evaluation, as long as the last one, stays within the share; the same on all ranks."""
        last = (self.position.last_metric or {}).get("seconds", 0.0)
        elapsed = time.perf_counter() - self.began
        return broadcast(self.position.evaluated + last <= self.share * (elapsed + last))

    def spend(self, seconds: float) -> float:
        """Book an evaluation. Returns the share of the time that all of them took."""
        self.position.evaluated += seconds
        self.look()  # a checkpoint that knows of the evaluation has to know of the time, too
        return self.position.evaluated / self.position.trained

    def look(self) -> None:
        """Note the time in the position, to be kept with it."""
        self.position.trained = time.perf_counter() - self.began


def train(config: Config, manifest: Manifest, context: Context, run: Run, recorder: Recorder | None) -> Outcome:
    """Train until ``config.kimg``, until nothing improves or until the surroundings ask to stop.

    Args:
        recorder: on rank 0 only: who keeps samples, metrics, checkpoints and the best generator.

    Raises:
        UserError: the checkpoint does not fit the configuration.
    """
    extractor = choose_extractor(config.eval.extractor, config.eval.weights, context.device, config.eval.num)
    evaluator = Evaluator(extractor, manifest, config.eval.num)
    evaluator.prepare()
    lr_scale: float | None = None
    for rollbacks in range(config.stop.rollbacks + 1):
        try:
            return Outcome(_stretch(config, manifest, context, run, recorder, evaluator, lr_scale))
        except Diverged as error:
            message, lr_scale = str(error), error.lr_scale / 2
        if recorder:
            recorder.saver.finish()
            if rollbacks < config.stop.rollbacks:
                recorder.note("rollback", f"{message}: going back to the last checkpoint with half the learning rates")
    return Outcome("diverged", message)


def _stretch(
    config: Config,
    manifest: Manifest,
    context: Context,
    run: Run,
    recorder: Recorder | None,
    evaluator: Evaluator,
    lr_scale: float | None,
) -> Literal["done", "stopped"]:
    """Train from the newest checkpoint on, with its learning rates, or after a rollback with ``lr_scale`` times the
    configuration's.

    Raises:
        Diverged: a loss was not finite at the end of a tick, or a weight before it was to be saved.
    """
    rank, world_size, device = context.rank, context.world_size, context.device
    torch.manual_seed(config.seed)  # every rank builds the same networks
    gan = GAN(config, device, world_size)
    torch.manual_seed(_rank_seed(config.seed, rank, 0))
    position = _resume(config, context, run, gan, evaluator)
    if lr_scale is not None:
        gan.lr_scale = lr_scale
    start, stop = share(config.batch, rank, world_size)
    draws = 2 if gan.fresh_reals else 1
    tick, snapshot, total = plan(config)
    batches = train_batches(
        manifest,
        rank=rank,
        seed=config.seed,
        nimg=position.nimg,
        batch=stop - start,
        batches_per_segment=snapshot * draws,
        images_per_segment=snapshot * config.batch,
        readers=config.loader.workers,
        buffer=config.loader.shuffle_buffer,
        memory=config.loader.memory_mib << 20,
        pin_memory=device.type == "cuda",
    )
    if recorder:
        recorder.start(gan, position.nimg)

    allowance = Allowance(config.eval.budget, position)
    meter = Meter(position.nimg)
    for step in range(position.nimg // config.batch + 1, total + 1):
        if stalled(config, position):
            if recorder:
                say(f"stopping: no better for {config.stop.patience_kimg:g} kimg (--stop.patience-kimg)")
            break
        waiting = time.perf_counter()
        reals = next(batches)
        more_reals = next(batches) if gan.fresh_reals else None
        meter.waited += time.perf_counter() - waiting
        meter.add(gan.step(reals, position.nimg, more_reals))
        position.nimg += config.batch
        gan.ema.update(gan.generator, config.batch, position.nimg)

        at_snapshot = step % snapshot == 0 or step == total
        if step % tick == 0 or at_snapshot:
            values = meter.read(position.nimg)
            gan.schedule(position.nimg)
            _check_finite(values, gan, position.nimg)
            if recorder:
                recorder.tick(values | _hyperparameters(gan) | _unusable(batches), position.nimg)
            notice = context.notice()
            if (at_snapshot or notice) and not broadcast(gan.is_finite()):
                raise Diverged(f"weights not finite at {position.nimg / 1000:g} kimg", gan.lr_scale)
            allowance.look()
            if at_snapshot:
                _snapshot(context, gan, position, recorder, evaluator, allowance, is_last=step == total)
            elif notice:
                _save(context, gan, position, recorder)
            if notice == "stop":
                if recorder:
                    recorder.saver.finish()
                return "stopped"
            meter = Meter(position.nimg)
    if recorder:
        recorder.saver.finish()
    return "done"


def plan(config: Config) -> tuple[int, int, int]:
    """Steps per tick (a whole number of generator steps), per snapshot (a whole number of ticks) and in all."""
    n_critic = config.loss.n_critic
    tick = max(round(config.track.tick_kimg * 1000 / config.batch / n_critic), 1) * n_critic
    snapshot = max(round(config.track.snapshot_kimg * 1000 / config.batch / tick), 1) * tick
    return tick, snapshot, math.ceil(config.kimg * 1000 / config.batch / n_critic) * n_critic


def _rank_seed(seed: int, rank: int, nimg: int) -> int:
    """A seed for latents and augmentation that no other rank or position shares."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{nimg}".encode()).digest()[:7], "big")


def _resume(config: Config, context: Context, run: Run, gan: GAN, evaluator: Evaluator) -> Position:
    """Fill ``gan`` with what there is to continue from. Rank 0 decides what that is."""
    found = run.storage.newest() if context.rank == 0 else None
    name = broadcast(found[0] if found else None)
    if name is not None:
        state, origin = found[1] if found else run.storage.load(name), run.storage.join(name)
    elif run.resume_from is not None:
        state, origin = load_checkpoint(run.resume_from), run.resume_from
    else:
        if run.init_from is not None:
            report = transfer.init_from(gan, run.init_from)
            if context.rank == 0:
                say(report)
        return Position()
    _check_fits(config, state["config"], origin)
    gan.load_state_dict(state)
    gan.schedule(state["nimg"])
    if len(state["rng"]) == context.world_size:
        checkpoint.set_rng_state(state["rng"][context.rank], context.device)
    else:
        torch.manual_seed(_rank_seed(config.seed, context.rank, state["nimg"]))
    if context.rank == 0:
        say(f"continuing from {origin} at {state['nimg'] / 1000:g} kimg")
    position = Position(state["nimg"], state["best"], state["last_metric"], **state["seconds"])
    if state["run_id"] != run.run_id:
        position.best = None
    last = position.last_metric
    if last and not (evaluator.is_like(last) and state["dataset_digest"] == evaluator.manifest.digest):
        if context.rank == 0:
            say(f"{last['name']} was measured in another way or on other data than from now on: the best starts anew")
        position.best = position.last_metric = None
    return position


def _check_fits(config: Config, saved: dict[str, Any], origin: str) -> None:
    own = config.to_dict()
    if (saved["model"], saved["grow"], saved["optim"]["name"]) != (own["model"], own["grow"], own["optim"]["name"]):
        raise UserError(
            f"checkpoint {origin} has another model, growth or optimiser than this configuration; give the same"
            " --model, --grow and --optim.name options, or another --name to start afresh"
        )


def _check_finite(values: dict[str, float], gan: GAN, nimg: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} not finite at {nimg / 1000:g} kimg", gan.lr_scale)


def stalled(config: Config, position: Position) -> bool:
    """Whether the metric has not improved for the patience of the configuration, at the latest evaluation."""
    if not config.stop.patience_kimg or position.best is None or position.last_metric is None:
        return False
    # What no longer improves at a low resolution does at the next one.
    since = max(position.best["kimg"], grown_kimg(config))
    return position.last_metric["kimg"] - since >= config.stop.patience_kimg


def _hyperparameters(gan: GAN) -> dict[str, float]:
    return {
        "lr/generator": gan.g_optimiser.param_groups[0]["lr"],
        "lr/discriminator": gan.d_optimiser.param_groups[0]["lr"],
        "augment/p": float(gan.p),
        "augment/noise": gan.noise,
        "loss/gamma": gan.gamma,
        **{f"grow/{name}": value for name, value in gan.growth.items()},
    }


def _unusable(batches: TrainBatches) -> dict[str, float]:
    """Unusable pictures that this rank has met so far, by shard: in time all of them, as each rank reads all shards."""
    return {f"data/broken/{Path(name).stem}": float(count) for name, count in batches.broken.items()}


def _snapshot(
    context: Context,
    gan: GAN,
    position: Position,
    recorder: Recorder | None,
    evaluator: Evaluator,
    allowance: Allowance,
    is_last: bool,
) -> None:
    """Samples, metric, best generator, checkpoint. Every rank takes part in the metric and in the report."""
    gan.settle_average()
    values = {}
    if is_last or allowance.allows():
        result = {**evaluator(lambda seeds: generate(gan, seeds)), "kimg": position.nimg / 1000}
        position.last_metric = result
        if position.best is None or result["value"] < position.best["value"]:
            position.best = result
        values = {result["name"]: result["value"], "speed/evaluation_share": allowance.spend(result["seconds"])}
    if recorder:
        recorder.snapshot(gan, position, values)
    _save(context, gan, position, recorder)


def _save(context: Context, gan: GAN, position: Position, recorder: Recorder | None) -> None:
    """A checkpoint. Every rank takes part, with its random state and in the report."""
    rng = gather(checkpoint.rng_state(context.device))
    if recorder:
        recorder.save(gan, position, rng)
    context.report({"kimg": position.nimg / 1000})
