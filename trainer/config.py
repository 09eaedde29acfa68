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

    arch: str = "dcgan"
    """dcgan: strided 4x4 convolutions. progan: grows from 4x4. r3gan: residual blocks, no normalisation."""
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
    g_head: Literal["conv", "dense"] = "conv"
    """From z to the 4x4 map of a dcgan generator: a transposed convolution, or dense and reshaped."""
    d_norm: Literal["batch", "none"] = "batch"
    """Normalisation in a dcgan discriminator. Gradient penalties want none."""
    d_dropout: float = 0.0
    """Probability of dropping an activation in a dcgan discriminator."""
    blocks: int = 2
    """Residual blocks per stage (r3gan)."""
    expansion: int = 2
    """Widening of a block's grouped convolution (r3gan)."""
    group_width: int = 16
    """Channels per group of the grouped convolution (r3gan)."""


@dataclass(frozen=True)
class GrowConfig:
    """Progressive growing: the resolution doubles at intervals, each new one fading in (arch progan only)."""

    start: int = 4
    """Side of the first pictures."""
    hold_kimg: float = 600.0
    """Thousands of images at each resolution, after its fade."""
    fade_kimg: float = 600.0
    """Thousands of images over which a new resolution fades in."""

    def grown_kimg(self, size: int) -> float:
        """Thousands of images after which the last resolution has faded in."""
        return math.log2(size / self.start) * (self.hold_kimg + self.fade_kimg)

    def level(self, nimg: int, size: int) -> float:
        """Binary logarithm of the side at ``nimg`` images, fractional while a resolution fades in: 3.25 is one
        quarter of the way from 8x8 to 16x16."""
        first, last = math.log2(self.start), math.log2(size)
        stage, into = divmod(nimg / 1000, self.hold_kimg + self.fade_kimg)
        fading = max(into - self.hold_kimg, 0.0) / self.fade_kimg if self.fade_kimg > 0 else 0.0
        return min(first + stage + fading, last)


@dataclass(frozen=True)
class LossConfig:
    """What the networks minimise."""

    name: str = "bce"
    """An entry of trainer/losses.py: bce, hinge, wasserstein, rpgan (relativistic, paired) or ralsgan (relativistic
    average, least squares)."""
    smoothing: float = 0.0
    """One-sided label smoothing: reals are labelled one minus this (bce)."""
    n_critic: int = 1
    """Discriminator iterations per generator iteration."""
    gamma: Schedule = constant(0.0)
    """Weight of R1 and R2, the squared gradients at reals and at fakes; 0: none."""
    penalty_every: int = 1
    """Compute R1 and R2 every so many iterations, times as strong (lazy regularisation)."""
    gp: float = 0.0
    """Weight of WGAN-GP's penalty: gradients of norm one between reals and fakes; 0: none."""
    drift: float = 0.0
    """Weight of the squared critic values of reals, which keeps a Wasserstein critic near zero."""
    clip: float = 0.0
    """Clip the discriminator's weights to plus and minus this (WGAN); 0: do not."""
    lecam: float = 0.0
    """Weight of LeCam regularisation, for small data sets; 0: none."""
    share_batch: bool = True
    """Use one batch of latents and reals for both phases of an iteration: one generator pass fewer."""


Transform = Literal["colour", "translation", "cutout"]


@dataclass(frozen=True)
class AugmentConfig:
    """What the discriminator sees."""

    flip: bool = True
    """Mirror the reals at random: doubles the data where left and right do not matter."""
    policy: tuple[Transform, ...] = ()
    """DiffAugment transforms, applied to reals and fakes alike."""
    p: Schedule = constant(0.0)
    """Probability of each transform, fixed or a ramp; with --augment.target its first value."""
    target: float = 0.0
    """ADA: steer the probability such that the mean sign of the critic on reals is this (0.6); 0: follow p."""
    target_kimg: float = 500.0
    """ADA: thousands of images in which the probability can go from 0 to 1."""
    noise: Schedule = constant(0.0)
    """Standard deviation of Gaussian noise on what the discriminator sees (instance noise)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser of both networks."""

    name: Literal["adam", "rmsprop"] = "adam"
    """adam, or rmsprop as in the Wasserstein GAN paper."""
    g_lr: Schedule = constant(2e-4)
    """Generator's learning rate."""
    d_lr: Schedule = constant(2e-4)
    """Discriminator's learning rate; another one than the generator's makes two time scales."""
    beta1: float = 0.5
    """First moment's decay (adam)."""
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
class StopConfig:
    """When to end early, and when to warn."""

    patience_kimg: float = 0.0
    """End when the metric has not improved for so many thousand images; 0: never."""
    rollbacks: int = 0
    """When a loss or a weight is no longer finite, go on from the last checkpoint with half the learning rates, so
    many times; then, or with 0, end and keep the best generator."""
    min_diversity: float = 0.2
    """Warn of mode collapse when the spread of the generated pictures' features, relative to that of the reals', is
    below this."""


@dataclass(frozen=True)
class LoaderConfig:
    """Reading shards."""

    workers: int = 1
    """Reader processes per training worker; 0 reads in the training process."""
    shuffle_buffer: int = 2000
    """Samples held to be shuffled, per reader."""
    memory_mib: int = 2048
    """Keep the decoded training pictures in memory that all workers of a machine share, if they need at most so many
    MiB (3 bytes a pixel: 2048 hold 174,000 pictures at 64x64); later epochs then read and decode nothing. 0: never."""
    cache: str | None = None
    """Folder of this machine to keep shards in that come from a bucket or web server; none: read them in each epoch."""
    max_broken: float = 0.01
    """Share of the pictures that may be unusable, 0 to 1. They are passed over, and counted in the metrics."""


@dataclass(frozen=True)
class EvalConfig:
    """The metric that chooses the best generator."""

    extractor: Literal["auto", "inception", "efflite0"] = "auto"
    """inception gives FID; efflite0 works offline; auto takes inception if its weights can be had."""
    weights: str | None = None
    """pytorch-fid's InceptionV3 weights file."""
    num: int = 2048
    """Generated pictures per evaluation."""
    budget: float = 1.0
    """Share of the time that evaluations may take, such as 0.05: where they take more, snapshots go without. The last
    one is always evaluated."""


@dataclass(frozen=True)
class TrackConfig:
    """Records for people."""

    uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else an SQLite file beside the runs."""
    offline: bool = False
    """Train without MLflow: the record is kept in the run's folder, and `cattrain sync RUN` delivers it later."""
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
    grow: GrowConfig = field(default_factory=GrowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    batch: int = 64
    """Global batch: reals per iteration over all workers together."""
    accumulate: int = 1
    """Process each worker's share of a batch in so many parts, to fit in memory. The gradient is that of the whole
    batch, except that batch norm, minibatch standard deviation and ralsgan's means are those of a part."""
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
        GrowConfig,
        LossConfig,
        AugmentConfig,
        OptimConfig,
        EMAConfig,
        StopConfig,
        LoaderConfig,
        EvalConfig,
        TrackConfig,
    )
}
