"""The training loop: the same in one process and in the workers of Ray Train.

A *tick* reports losses and speed; a *snapshot* draws samples, evaluates, keeps the best generator and saves a
checkpoint. Between ticks nothing waits for the device.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from infer.command import UserError, say
from trainer import checkpoint, transfer
from trainer.config import Config
from trainer.context import Context, gather_objects, mean_over_ranks
from trainer.data.manifest import Manifest
from trainer.data.stream import TrainBatches, share, train_batches
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.extractors import choose_extractor
from trainer.models import grown_kimg
from trainer.recorder import Position, Recorder, generate
from trainer.step import GAN


class Diverged(RuntimeError):
    """A loss is no longer finite."""


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


def train(
    config: Config,
    manifest: Manifest,
    context: Context,
    run_id: str,
    recorder: Recorder | None,
    init_from: Path | None = None,
) -> None:
    """Train until ``config.kimg`` or until nothing improves, from the context's latest checkpoint if it has one.

    Args:
        run_id: MLflow's; a checkpoint of another run is a starting point, but its best is not this run's.
        recorder: on rank 0 only: who keeps samples, metrics and the best generator.
        init_from: weights to begin with where there is no checkpoint, see ``transfer.init_from``.

    Raises:
        Diverged: a loss was not finite at the end of a tick.
        UserError: the checkpoint does not fit the configuration.
    """
    rank, world_size, device = context.rank, context.world_size, context.device
    torch.manual_seed(config.seed)  # every rank builds the same networks
    gan = GAN(config, device, world_size)
    torch.manual_seed(_rank_seed(config.seed, rank, 0))
    position = _resume(config, context, gan, run_id, init_from)
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
    evaluator = Evaluator(
        choose_extractor(config.eval.extractor, config.eval.weights, context.device), manifest, config.eval.num
    )
    evaluator.prepare()
    if recorder:
        recorder.start(gan, position.nimg)

    meter = Meter(position.nimg)
    for step in range(1, total - position.nimg // config.batch + 1):
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

        at_snapshot = step % snapshot == 0 or position.nimg >= total * config.batch
        if step % tick == 0 or at_snapshot:
            values = meter.read(position.nimg)
            gan.schedule(position.nimg)
            _check_finite(values, position.nimg)
            if recorder:
                recorder.tick(values | _hyperparameters(gan) | _unusable(batches), position.nimg)
            if at_snapshot:
                _snapshot(context, gan, position, evaluator, recorder)
            meter = Meter(position.nimg)


def plan(config: Config) -> tuple[int, int, int]:
    """Steps per tick (a whole number of generator steps), per snapshot (a whole number of ticks) and in all."""
    n_critic = config.loss.n_critic
    tick = max(round(config.track.tick_kimg * 1000 / config.batch / n_critic), 1) * n_critic
    snapshot = max(round(config.track.snapshot_kimg * 1000 / config.batch / tick), 1) * tick
    return tick, snapshot, math.ceil(config.kimg * 1000 / config.batch / n_critic) * n_critic


def _rank_seed(seed: int, rank: int, nimg: int) -> int:
    """A seed for latents and augmentation that no other rank or position shares."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{nimg}".encode()).digest()[:7], "big")


def _resume(config: Config, context: Context, gan: GAN, run_id: str, init_from: Path | None) -> Position:
    with context.latest_checkpoint() as folder:
        if folder is None:
            if init_from is not None:
                report = transfer.init_from(gan, init_from)
                if context.rank == 0:
                    say(report)
            return Position()
        state = checkpoint.load(folder)
    saved, own = state["config"], config.to_dict()
    if (saved["model"], saved["grow"], saved["optim"]["name"]) != (own["model"], own["grow"], own["optim"]["name"]):
        raise UserError(
            f"checkpoint {folder} has another model, growth or optimiser than this configuration; give the same"
            " --model, --grow and --optim.name options, or another --name to start afresh"
        )
    gan.load_state_dict(state)
    gan.schedule(state["nimg"])
    if len(state["rng"]) == context.world_size:
        checkpoint.set_rng_state(state["rng"][context.rank], context.device)
    else:
        torch.manual_seed(_rank_seed(config.seed, context.rank, state["nimg"]))
    if context.rank == 0:
        say(f"continuing from {folder} at {state['nimg'] / 1000:g} kimg")
    return Position(state["nimg"], state["best"] if state["run_id"] == run_id else None, state["last_metric"])


def _check_finite(values: dict[str, float], nimg: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} not finite at {nimg / 1000:g} kimg; try a lower learning rate")


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


def _snapshot(context: Context, gan: GAN, position: Position, evaluator: Evaluator, recorder: Recorder | None) -> None:
    """Samples, metric, best generator, checkpoint. Every rank takes part in the metric and in the report."""
    gan.settle_average()
    kimg = position.nimg / 1000
    result = {**evaluator(lambda seeds: generate(gan, seeds)), "kimg": kimg}
    position.last_metric = result
    is_best = position.best is None or result["value"] < position.best["value"]
    if is_best:
        position.best = result
    rng = gather_objects(checkpoint.rng_state(context.device))
    folder = recorder.snapshot(gan, position, is_best, rng) if recorder else None
    context.report({"kimg": kimg, result["name"]: result["value"]}, folder, checkpoint.folder_name(position.nimg))
