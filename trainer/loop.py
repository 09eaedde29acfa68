"""The training loop, the same in one process and in the workers of Ray Train.

Every *tick* logs losses and speed, and checks for stop and preemption requests. Every *snapshot* generates samples,
evaluates, keeps the best generator and saves a checkpoint. Between ticks nothing waits for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.checkpoints import transfer
from trainer.checkpoints.state import Position, check_fits, restore, rng_state, seed_rank
from trainer.checkpoints.storage import Storage, load_checkpoint
from trainer.config import Config
from trainer.data.stream import StreamPosition, TrainStream, share
from trainer.distributed.collectives import broadcast, gather, mean_over_ranks
from trainer.distributed.context import Context
from trainer.distributed.load import Load
from trainer.features.extractors import choose_extractor, offline_network
from trainer.metrics.by_class import ByClass
from trainer.metrics.evaluate import Evaluator
from trainer.models import full_resolution_kimg
from trainer.sample import generate
from trainer.step import GAN
from trainer.trace import traced
from trainer.tracking.recorder import NullRecorder


@dataclass(frozen=True)
class Run:
    """Where a training is stored, and what it starts from."""

    storage: Storage
    """The run's folder or bucket. Training continues from the latest checkpoint there."""
    run_id: str
    """The run in MLflow. Resuming from a checkpoint of another run resets the best metric."""
    resume_from: str | None = None
    """Path or URL of another run's checkpoint to start from while this run has none."""
    init_from: Path | None = None
    """Weights to start from where there is no checkpoint, see ``transfer.init_from``."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended: complete, after a stop request, or with values that are not finite."""

    status: Literal["done", "stopped", "diverged"]
    message: str = ""


class Diverged(Exception):
    """A loss or a weight is not finite; ``lr_scale`` is that of the ``GAN``."""

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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self, nimg: int) -> dict[str, float]:
        """Means over steps and ranks, and speed; one collective and one wait for the device."""
        names = sorted(self.sums)
        means = mean_over_ranks(torch.stack([self.sums[n] / self.counts[n] for n in names])).tolist()
        seconds = time.perf_counter() - self.started
        return dict(zip(names, means, strict=True)) | {
            "speed/images_per_second": (nimg - self.nimg) / seconds,
            "speed/data_wait": self.waited / seconds,
        }


def train(config: Config, manifest: Manifest, context: Context, run: Run, recorder: NullRecorder) -> Outcome:
    """Train until ``config.kimg``, until the metric stalls (``config.stop``) or until a stop request.

    Args:
        recorder: rank 0's keeps samples, metrics, checkpoints and the best generator; the others' do nothing.

    Raises:
        UserError: the checkpoint does not fit the configuration.
    """
    return _Training(config, manifest, context, run, recorder).train()


class _Training:
    """One rank of a training."""

    def __init__(self, config: Config, manifest: Manifest, context: Context, run: Run, recorder: NullRecorder) -> None:
        self.config, self.manifest, self.context, self.start, self.recorder = config, manifest, context, run, recorder
        if config.model.classes and config.model.classes != manifest.labels:
            raise UserError(
                f"{manifest.root} has other classes than the training began with; give a data set with the same ones,"
                " or another --name to start from scratch"
            )
        e, offline = config.eval, offline_network(config.projected.weight)
        extractor = choose_extractor(e.extractor, e.weights, context.device, e.num, offline)
        self.evaluator = Evaluator(extractor, manifest, config.eval.num)
        self.evaluator.prepare()
        seeds = range(self.evaluator.seed, self.evaluator.seed + config.eval.num)
        labels = self._labels_of(seeds)
        self.by_class = ByClass(manifest, extractor, labels) if labels is not None else None
        self.began, self.evaluating = time.perf_counter(), 0.0
        self.load = Load(context.device, context.local_rank)

    def train(self) -> Outcome:
        """Train; when it diverges, go back to the latest checkpoint with half the learning rates, a few times."""
        lr_scale: float | None = None
        rollbacks = self.config.stop.rollbacks
        for attempt in range(rollbacks + 1):
            try:
                with ExitStack() as end:
                    return Outcome(self._train_from_checkpoint(lr_scale, end))
            except Diverged as error:
                message, lr_scale = str(error), error.lr_scale / 2
            self.recorder.finish()
            if attempt < rollbacks:
                self.recorder.warn("rollback", f"{message}: back to the latest checkpoint with half the learning rates")
        return Outcome("diverged", message)

    def _train_from_checkpoint(self, lr_scale: float | None, end: ExitStack) -> Literal["done", "stopped"]:
        """Train from the latest checkpoint.

        Args:
            lr_scale: factor of the configuration's learning rates after a rollback; None: the checkpoint's.
            end: gets what is to be closed.

        Raises:
            Diverged: at the end of a tick a loss is not finite, or a weight that is about to be saved.
        """
        config, recorder = self.config, self.recorder
        torch.manual_seed(config.seed)  # every rank builds the same networks
        gan = GAN(config, self.context.device, self.context.world_size)
        gan.bf16 = all(gather(gan.bf16))  # machines differ in what they multiply natively; ranks must not
        if config.model.classes:
            gan.class_counts = self.manifest.splits["train"].class_counts
        seed_rank(config.seed, self.context.rank, 0)
        position = self._resume(gan)
        if lr_scale is not None:
            gan.lr_scale = lr_scale
        tick, snapshot, total = plan(config)
        batches = end.enter_context(closing(self._batches(gan, position)))
        recorder.start(gan, position.nimg)
        steps = config.profile if self.context.rank == 0 else 0
        end_step = end.enter_context(traced(steps, self.context.device, self.start.storage.work, position.nimg))

        meter = Meter(position.nimg)
        for step in range(position.nimg // config.batch + 1, total + 1):
            if reason := why_stopped(config, position):
                recorder.say(f"stopping: {reason}")
                break
            with meter.waiting():
                reals, labels = self._next(batches)
                more_reals, more_labels = self._next(batches) if gan.fresh_reals else (None, None)
            meter.add(gan.step(reals, position.nimg, more_reals, labels, more_labels))
            position.nimg += config.batch
            gan.ema.update(gan.generator, config.batch, position.nimg)
            end_step()

            at_snapshot = step % snapshot == 0 or step == total
            if step % tick and not at_snapshot:
                continue
            values = meter.read(position.nimg)
            gan.schedule(position.nimg)
            _check_losses(values, gan, position.nimg)
            recorder.tick(values | _hyperparameters(gan) | _unreadable(batches) | self._load(), position.nimg)
            request = self.context.request()
            if request == "save":
                recorder.say(f"a machine is about to leave the cluster: checkpoint at {position.nimg / 1000:g} kimg")
            if at_snapshot or request:
                _check_weights(gan, position.nimg)
                gan.recompute_ema_statistics()  # samples, metric and checkpoint are of the same generator
            if at_snapshot:
                is_due = step == total or step // snapshot % config.eval.every == 0
                evaluate = is_due or position.best is None  # there is always a generator to export
                self._snapshot(gan, position, evaluate)
                request = request or self.context.request()  # a sweep may end a training for the metric just reported
            elif request:
                self._save(gan, position)
            if request == "stop":
                recorder.finish()
                return "stopped"
            meter = Meter(position.nimg)
        recorder.finish()
        return "done"

    def _resume(self, gan: GAN) -> Position:
        """Restore ``gan`` from the latest checkpoint of the run, or from what the run starts from. Rank 0 decides."""
        run, context = self.start, self.context
        found = run.storage.latest() if context.rank == 0 else None
        name = broadcast(found[0] if found else None)
        if name is not None:
            state, origin = found[1] if found else run.storage.load(name), run.storage.join(name)
        elif run.resume_from is not None:
            state, origin = load_checkpoint(run.resume_from), run.resume_from
        else:
            if run.init_from is not None:
                self.recorder.say(transfer.init_from(gan, run.init_from))
            return Position()
        check_fits(self.config, state, origin)
        position = restore(state, gan, context.rank, context.world_size)
        self.recorder.say(f"continuing from {origin} at {state['nimg'] / 1000:g} kimg")
        if state["run_id"] != run.run_id:
            position.best = None
        last = position.last_metric
        if last and not (self.evaluator.is_comparable(last) and state["dataset_digest"] == self.manifest.digest):
            self.recorder.say(f"metric settings or data changed since {last['name']} was measured: best metric reset")
            position.best = position.last_metric = position.overfitting = None
        return position

    def _load(self) -> dict[str, float]:
        """How busy each machine is, under the names that MLflow shows as system metrics. A collective."""
        readings = gather((self.context.node, self.load.read()))
        is_one = len({node for node, _ in readings}) == 1
        return {
            f"system/{name}" if is_one else f"system/node_{node}/{name}": value
            for node, values in readings
            for name, value in values.items()
        }

    def _batches(self, gan: GAN, position: Position) -> TrainStream:
        """This rank's infinite stream of reals, from ``position`` on."""
        config, context = self.config, self.context
        start, stop = share(config.batch, context.rank, context.world_size)
        _, snapshot, _ = plan(config)
        at = StreamPosition(
            seed=config.seed,
            rank=context.rank,
            nimg=position.nimg,
            batch=stop - start,
            batches_per_segment=snapshot * (2 if gan.fresh_reals else 1),
            images_per_segment=snapshot * config.batch,
        )
        is_cuda, is_conditional = context.device.type == "cuda", bool(config.model.classes)
        return TrainStream(self.manifest, at, config.loader, pin_memory=is_cuda, labelled=is_conditional)

    def _next(self, batches: TrainStream) -> tuple[Tensor, Tensor | None]:
        """The next reals, and their classes for a conditional model."""
        reals, labels = batches.next_labelled()
        return reals, labels if self.config.model.classes else None

    def _labels_of(self, seeds: Sequence[int]) -> list[int] | None:
        """For a conditional model, classes of generated images that are as frequent as those of the reals."""
        return self.manifest.splits["train"].labels_of(seeds) if self.config.model.classes else None

    def _snapshot(self, gan: GAN, position: Position, evaluate: bool) -> None:
        """Samples, metric, best generator, checkpoint. A collective."""
        self.recorder.samples(gan, position.nimg)
        if evaluate:
            began = time.perf_counter()
            best = position.best["value"] if position.best else math.inf
            measured = self.evaluator(
                lambda seeds: generate(gan, seeds, labels=self._labels_of(seeds)), best, self.by_class
            )
            counts = self.manifest.splits["train"].class_counts if self.config.model.classes else ()
            result = {**measured, "kimg": position.nimg / 1000, **({"class_counts": list(counts)} if counts else {})}
            position.last_metric = result
            is_best = position.best is None or result["value"] < best
            if is_best:
                position.best = result
            now = time.perf_counter()
            self.evaluating += now - began
            share_of_time = self.evaluating / (now - self.began)
            position.overfitting = broadcast(self.recorder.evaluation(gan, position, is_best, share_of_time))
        self._save(gan, position)

    def _save(self, gan: GAN, position: Position) -> None:
        """A checkpoint with the random state of every rank. A collective."""
        self.recorder.save(gan, position, gather(rng_state(self.context.device)))
        last = position.last_metric
        is_new = last is not None and last["kimg"] == position.nimg / 1000
        self.context.report({"kimg": position.nimg / 1000, "metric": last if is_new else None})


def plan(config: Config) -> tuple[int, int, int]:
    """Steps per tick (a whole number of generator steps), per snapshot (a whole number of ticks) and in total."""
    n_critic = config.loss.n_critic
    tick = max(round(config.track.tick_kimg * 1000 / config.batch / n_critic), 1) * n_critic
    snapshot = max(round(config.track.snapshot_kimg * 1000 / config.batch / tick), 1) * tick
    return tick, snapshot, math.ceil(config.kimg * 1000 / config.batch / n_critic) * n_critic


def why_stopped(config: Config, position: Position) -> str | None:
    """Why a training ends before its last step, as of the latest evaluation; None: it goes on."""
    stop, best, last = config.stop, position.best, position.last_metric
    if best is None or last is None:
        return None
    # A metric that stalls at a low resolution improves again at the next one.
    since = max(best["kimg"], full_resolution_kimg(config))
    if stop.patience_kimg and last["kimg"] - since >= stop.patience_kimg:
        return f"no better for {stop.patience_kimg:g} kimg (--stop.patience-kimg)"
    if stop.overfitting and last["kimg"] > since and (position.overfitting or 0.0) > stop.overfitting:
        return (
            f"the discriminator overfits the training images (d/overfitting {position.overfitting:.2f},"
            f" --stop.overfitting {stop.overfitting:g}), and the metric was better at {best['kimg']:g} kimg"
        )
    return None


def _check_losses(values: dict[str, float], gan: GAN, nimg: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} not finite at {nimg / 1000:g} kimg", gan.lr_scale)


def _check_weights(gan: GAN, nimg: int) -> None:
    if not broadcast(gan.is_finite()):
        raise Diverged(f"weights not finite at {nimg / 1000:g} kimg", gan.lr_scale)


def _hyperparameters(gan: GAN) -> dict[str, float]:
    """The values that schedules and feedback set, except those that are always zero."""
    augment, gamma = gan.config.augment, gan.config.loss.gamma
    return {
        "lr/generator": gan.g_optimiser.param_groups[0]["lr"],
        "lr/discriminator": gan.d_optimiser.param_groups[0]["lr"],
        **({"augment/p": float(gan.p)} if augment.policy and (augment.target or augment.p.is_used) else {}),
        **({"augment/noise": gan.noise} if augment.noise.is_used else {}),
        **({"loss/gamma": gan.gamma} if gamma.is_used else {}),
        **{f"grow/{name}": value for name, value in gan.growth.items()},
    }


def _unreadable(batches: TrainStream) -> dict[str, float]:
    """Unreadable images that this rank has met so far, by shard. Each rank reads all shards in the course of time."""
    return {f"data/broken/{Path(name).stem}": float(count) for name, count in batches.broken.items()}
