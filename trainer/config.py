"""The configuration of a training: frozen dataclasses, nothing else.

Every amount of progress is in images seen by the discriminator as reals (``nimg``), given in thousands (``kimg``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Schedule:
    """A cosine from ``start`` to ``end`` over the first ``kimg`` thousand images, then constant."""

    start: float
    """Value at the first image."""
    end: float
    """Value from ``kimg`` on."""
    kimg: float = 0.0
    """Length of the ramp in thousands of images; 0: ``end`` from the beginning."""

    def __call__(self, nimg: int) -> float:
        """Value at ``nimg`` images."""
        done = min(nimg / (self.kimg * 1000), 1.0) if self.kimg > 0 else 1.0
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


def constant(value: float) -> Schedule:
    return Schedule(value, value)


@dataclass(frozen=True)
class ModelConfig:
    """The two networks."""

    arch: Literal["dcgan", "r3gan"] = "dcgan"
    """dcgan: strided 4x4 convolutions. r3gan: residual blocks of grouped convolutions, no normalisation."""
    size: int = 32
    """Side of the pictures in pixels, a power of two."""
    z_dim: int = 100
    """Length of the latent vector."""
    g_width: int = 64
    """Generator's channels at the highest resolution; they double per halving of the side."""
    d_width: int = 64
    """Discriminator's channels at the highest resolution."""
    max_width: int = 1024
    """Upper limit of the channels."""
    d_norm: Literal["batch", "none"] = "batch"
    """Normalisation in a dcgan discriminator. Gradient penalties want none."""
    blocks: int = 2
    """Residual blocks per stage (r3gan)."""
    expansion: int = 2
    """Widening of a block's grouped convolution (r3gan)."""
    group_width: int = 16
    """Channels per group of the grouped convolution (r3gan)."""


@dataclass(frozen=True)
class LossConfig:
    """What the networks minimise."""

    name: Literal["bce", "rpgan"] = "bce"
    """bce: non-saturating cross-entropy. rpgan: relativistic, paired."""
    gamma: Schedule = constant(0.0)
    """Weight of R1 and R2, the squared gradients at reals and at fakes; 0: none."""
    penalty_every: int = 1
    """Compute the penalties every so many iterations, times as strong (lazy regularisation)."""
    share_batch: bool = True
    """Use one batch of latents and reals for both phases of an iteration: one generator pass fewer."""


@dataclass(frozen=True)
class AugmentConfig:
    """What the discriminator sees."""

    flip: bool = True
    """Mirror the reals at random: doubles the data where left and right do not matter."""
    policy: tuple[Literal["colour", "translation", "cutout"], ...] = ()
    """DiffAugment transforms, applied to reals and fakes alike."""
    p: Schedule = constant(0.0)
    """Probability of each transform."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks."""

    g_lr: Schedule = constant(2e-4)
    """Generator's learning rate."""
    d_lr: Schedule = constant(2e-4)
    """Discriminator's learning rate."""
    beta1: float = 0.5
    """First moment's decay."""
    beta2: Schedule = constant(0.999)
    """Second moment's decay."""


@dataclass(frozen=True)
class EMAConfig:
    """The average of the generator's weights, which is what gets judged and exported."""

    half_life_kimg: float = 10.0
    """Half-life in thousands of images."""
    ramp: float = 0.05
    """Upper limit of the half-life as a share of the images seen so far."""


@dataclass(frozen=True)
class LoaderConfig:
    """Reading shards."""

    workers: int = 1
    """Reader processes per training worker; 0 reads in the training process."""
    shuffle_buffer: int = 2000
    """Samples held to be shuffled, per reader."""


@dataclass(frozen=True)
class EvalConfig:
    """The metric that chooses the best generator."""

    extractor: Literal["auto", "inception", "efflite0"] = "auto"
    """inception gives FID; efflite0 works offline; auto takes inception if its weights can be had."""
    weights: str | None = None
    """pytorch-fid's InceptionV3 weights file."""
    num: int = 2048
    """Generated pictures per evaluation."""


@dataclass(frozen=True)
class TrackConfig:
    """Records for people."""

    uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else an SQLite file beside the runs."""
    experiment: str = "catgan"
    """MLflow experiment."""
    model: str = "catgan"
    """Name in MLflow's model registry."""
    tick_kimg: float = 2.0
    """Log losses and speed every so many thousand images."""
    snapshot_kimg: float = 16.0
    """Evaluate, draw samples and save a checkpoint every so many thousand images."""
    grid: int = 64
    """Pictures in a sample grid."""


@dataclass(frozen=True)
class Config:
    """One training."""

    recipe: str
    """Name of the recipe these values come from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    batch: int = 64
    """Global batch: reals per iteration over all workers together."""
    kimg: float = 1000.0
    """Length of the training in thousands of reals seen."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the hardware multiplies bf16 natively, else fp32."""
    seed: int = 0
    """Seed of everything random."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: ``Config.from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        return _build(Config, values)


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """A dataclass from nested dicts; tuples come back from JSON as lists."""
    kwargs: dict[str, Any] = {}
    defaults = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if isinstance(value, dict):
            kwargs[name] = _build(_NESTED[str(defaults[name].type)], value)
        else:
            kwargs[name] = tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)


_NESTED = {
    c.__name__: c
    for c in (
        Schedule,
        ModelConfig,
        LossConfig,
        AugmentConfig,
        OptimConfig,
        EMAConfig,
        LoaderConfig,
        EvalConfig,
        TrackConfig,
    )
}


def problems(config: Config) -> list[str]:
    """Everything that is wrong with a configuration in itself, one sentence each; empty if it is sound."""
    found: list[str] = []

    def check(sound: bool, sentence: str) -> None:
        if not sound:
            found.append(sentence)

    m, loss = config.model, config.loss
    check(
        m.size in (8, 16, 32, 64, 128, 256, 512),
        f"--model.size {m.size}: give a power of two from 8 to 512",
    )
    for name in ("z_dim", "g_width", "d_width", "max_width", "blocks", "expansion", "group_width"):
        value = getattr(m, name)
        check(value >= 1, f"--model.{name.replace('_', '-')} {value}: give 1 or more")
    penalised = max(loss.gamma.start, loss.gamma.end) > 0
    check(
        not (penalised and m.arch == "dcgan" and m.d_norm == "batch"),
        "--loss.gamma with --model.d-norm batch: batch norm mixes samples, so a per-sample gradient means nothing;"
        " add --model.d-norm none or set gamma to 0",
    )
    check(min(loss.gamma.start, loss.gamma.end) >= 0, "--loss.gamma: give 0 or more")
    check(loss.penalty_every >= 1, f"--loss.penalty-every {loss.penalty_every}: give 1 or more")
    check(
        loss.penalty_every == 1 or penalised,
        f"--loss.penalty-every {loss.penalty_every} without --loss.gamma: there is no penalty to compute",
    )
    p = config.augment.p
    check(min(p.start, p.end) >= 0 and max(p.start, p.end) <= 1, "--augment.p: give probabilities from 0 to 1")
    check(
        max(p.start, p.end) == 0 or bool(config.augment.policy),
        "--augment.p without --augment.policy: name the transforms (colour translation cutout)",
    )
    for name in ("g_lr", "d_lr"):
        lr = getattr(config.optim, name)
        check(min(lr.start, lr.end) >= 0 and max(lr.start, lr.end) > 0, f"--optim.{name}: give more than 0")
    beta2 = config.optim.beta2
    check(0 <= config.optim.beta1 < 1, f"--optim.beta1 {config.optim.beta1}: give 0 or more, below 1")
    check(0 <= min(beta2.start, beta2.end) <= max(beta2.start, beta2.end) < 1, "--optim.beta2: give 0 or more, below 1")
    check(config.batch >= 1, f"--batch {config.batch}: give 1 or more")
    check(config.kimg > 0, f"--kimg {config.kimg:g}: give more than 0")
    check(config.seed >= 0, f"--seed {config.seed}: give 0 or more")
    check(config.ema.half_life_kimg >= 0, "--ema.half-life-kimg: give 0 or more")
    check(config.loader.workers >= 0, f"--loader.workers {config.loader.workers}: give 0 or more")
    check(config.loader.shuffle_buffer >= 1, "--loader.shuffle-buffer: give 1 or more")
    check(config.eval.num >= 2, f"--eval.num {config.eval.num}: give 2 or more")
    check(config.track.tick_kimg > 0, "--track.tick-kimg: give more than 0")
    check(
        config.track.snapshot_kimg >= config.track.tick_kimg,
        f"--track.snapshot-kimg {config.track.snapshot_kimg:g}: give at least --track.tick-kimg"
        f" ({config.track.tick_kimg:g})",
    )
    check(1 <= config.track.grid <= 1024, f"--track.grid {config.track.grid}: give 1 to 1024")
    return found
