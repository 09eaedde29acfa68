"""The configuration of a training: frozen dataclasses, nothing else.

The unit of progress is the number of reals that the discriminator has seen (``nimg``), given in thousands (``kimg``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

SIDES = (8, 16, 32, 64, 128, 256, 512)
"""Sides of images, in pixels, that the networks can be built for."""


@dataclass(frozen=True)
class Schedule:
    """A cosine from ``start`` to ``end`` over the first ``kimg`` thousand images, then constant. One value
    sets a constant: ``--optim.g-lr 1e-4``."""

    start: float
    """Value at the first image."""
    end: float
    """Value from ``kimg`` on."""
    kimg: float = 0.0
    """Length of the ramp in thousands of images; 0: ``end`` from the beginning."""

    @property
    def is_used(self) -> bool:
        """Whether it is ever other than zero."""
        return bool(self.start or self.end)

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
    """dcgan: strided 4x4 convolutions. progan: progressive growing. r3gan: residual blocks, no normalisation.
    stylegan2: a mapping network and modulated convolutions. fastgan: skip-layer excitation, a discriminator that
    reconstructs. biggan: residual blocks, conditional batch norm."""
    size: int = 32
    """Side of the images in pixels, one of ``SIDES``."""
    z_dim: int = 100
    """Length of the latent vector."""
    g_width: int = 64
    """Generator's channels at the highest resolution; they double with each halving of the resolution."""
    d_width: int = 64
    """Discriminator's channels at the highest resolution."""
    max_width: int = 1024
    """Upper limit of the channels of a layer."""
    g_head: Literal["conv", "dense"] = "conv"
    """First layer of a dcgan generator, from z to the 4x4 map: a transposed convolution, or a dense layer."""
    d_norm: Literal["batch", "none"] = "batch"
    """Normalisation in a dcgan discriminator. Gradient penalties need "none"."""
    d_dropout: float = 0.0
    """Probability of dropping an activation in a dcgan discriminator."""
    blocks: int = 2
    """Residual blocks per stage (r3gan)."""
    expansion: int = 2
    """Channels of a block's grouped convolution as a multiple of the block's channels (r3gan)."""
    group_width: int = 16
    """Channels per group of the grouped convolution (r3gan)."""
    mapping_layers: int = 2
    """Layers of the mapping network (stylegan2)."""
    attention: int = 0
    """Side of the feature map with self-attention in both networks (biggan); 0: none."""
    g_spectral_norm: bool = False
    """Spectral norm in the generator's layers too (biggan); the discriminator always has it."""
    conditional: bool = False
    """Give both networks the class of an image (dcgan, r3gan, stylegan2, biggan). The data set needs classes: catdata
    build --labels."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a conditional model, by their numbers: always those of the data set, leave it out."""


@dataclass(frozen=True)
class GrowConfig:
    """Progressive growing: the resolution doubles at intervals and each new one fades in (arch progan only)."""

    start: int = 4
    """First resolution."""
    hold_kimg: float = 600.0
    """Thousands of images at each resolution, after its fade."""
    fade_kimg: float = 600.0
    """Thousands of images over which a new resolution fades in."""

    def full_resolution_kimg(self, size: int) -> float:
        """Thousands of images until the last resolution has faded in."""
        return math.log2(size / self.start) * (self.hold_kimg + self.fade_kimg)

    def level(self, nimg: int, size: int) -> float:
        """Binary logarithm of the resolution at ``nimg`` images, fractional while a new one fades in: 3.25 is a
        quarter of the way from 8x8 to 16x16."""
        first, last = math.log2(self.start), math.log2(size)
        stage, into = divmod(nimg / 1000, self.hold_kimg + self.fade_kimg)
        fading = max(into - self.hold_kimg, 0.0) / self.fade_kimg if self.fade_kimg > 0 else 0.0
        return min(first + stage + fading, last)


@dataclass(frozen=True)
class LossConfig:
    """Adversarial loss and penalties."""

    name: str = "bce"
    """An entry of trainer/losses.py: bce, hinge, wasserstein, rpgan (relativistic, paired) or ralsgan (relativistic
    average, least squares)."""
    smoothing: float = 0.0
    """One-sided label smoothing: the label of reals is one minus this (bce)."""
    n_critic: int = 1
    """Discriminator steps per generator step."""
    gamma: Schedule = constant(0.0)
    """Weight of R1 and R2, the squared gradient norms at reals and at fakes; 0: none."""
    r2: bool = True
    """Penalise the gradient at fakes too (R2), not only at reals (R1)."""
    penalty: Literal["exact", "finite-difference"] = "exact"
    """How R1 and R2 are computed. exact: by differentiating twice. finite-difference: an estimate from a pass
    over slightly changed images, in TF32 or fp32; for GPUs, where differentiating twice is slow."""
    penalty_every: int = 1
    """Compute R1 and R2 every N steps, scaled by N (lazy regularisation)."""
    path_length: float = 0.0
    """Weight of path length regularisation (stylegan2); 0: none."""
    path_every: int = 1
    """Compute it every N steps of the generator, scaled by N."""
    style_mixing: float = 0.0
    """Probability that a fake has the styles of two latents, before and after a random layer (stylegan2)."""
    gp: float = 0.0
    """Weight of WGAN-GP's gradient penalty; 0: none."""
    drift: float = 0.0
    """Weight of the squared critic output of reals, which keeps a Wasserstein critic near zero; 0: none."""
    clip: float = 0.0
    """Clip the discriminator's weights to [-clip, clip] (WGAN); 0: no clipping."""
    lecam: float = 0.0
    """Weight of LeCam regularisation, for small data sets; 0: none."""
    reconstruction: float = 0.0
    """Weight of the discriminator's reconstruction error of reals (fastgan)."""
    share_batch: bool = True
    """Use one batch of latents and reals for both phases of a step, which saves a generator pass. Without it, losses
    that compare reals and fakes read a second batch for each step."""


Transform = Literal["colour", "translation", "cutout"]


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the discriminator's input."""

    flip: bool = True
    """Mirror the reals at random, which doubles the data where left and right do not matter."""
    policy: tuple[Transform, ...] = ()
    """DiffAugment transforms, applied to reals and fakes alike."""
    p: Schedule = constant(0.0)
    """Probability of each transform; with --augment.target its initial value."""
    target: float = 0.0
    """ADA: adapt the probability so that the mean sign of the logits of reals is this (0.6); 0: follow p."""
    target_kimg: float = 500.0
    """ADA: thousands of images in which the probability can go from 0 to 1."""
    noise: Schedule = constant(0.0)
    """Standard deviation of Gaussian noise added to the discriminator's input (instance noise)."""


@dataclass(frozen=True)
class ProjectedConfig:
    """A second discriminator on the features of a frozen network (Sauer et al. 2021), which joins a training late."""

    weight: float = 0.0
    """Norm of its gradient at the generated images as a multiple of that of the recipe's own discriminator; 0: none."""
    start_kimg: float = 0.0
    """Thousands of images after which it joins: once samples are recognisable."""
    strides: tuple[int, ...] = (4, 8, 16)
    """Strides of the feature maps it sees (4, 8, 16 or 32), ascending."""
    lr: float = 2e-4
    """Its learning rate."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser of both networks."""

    name: Literal["adam", "rmsprop"] = "adam"
    """adam, or rmsprop as in the Wasserstein GAN paper."""
    g_lr: Schedule = constant(2e-4)
    """Generator's learning rate."""
    d_lr: Schedule = constant(2e-4)
    """Discriminator's learning rate; one that differs from the generator's is a two time-scale update (TTUR)."""
    beta1: float = 0.5
    """Decay of the first moment (adam)."""
    beta2: Schedule = constant(0.999)
    """Decay of the second moment."""
    freeze_d: int = 0
    """Keep the weights of so many layers of the discriminator, those next to the image (Freeze-D, Mo et al. 2020). For
    --init-from."""


@dataclass(frozen=True)
class EMAConfig:
    """The EMA of the generator's weights, which is evaluated and exported."""

    half_life_kimg: float = 10.0
    """Half-life of the EMA in thousands of images."""
    ramp: float = 0.05
    """Upper limit of the half-life as a share of the images seen so far."""


@dataclass(frozen=True)
class StopConfig:
    """Early stopping, divergence and warnings."""

    patience_kimg: float = 0.0
    """Stop when the metric has not improved for this many thousand images; 0: never."""
    overfitting: float = 0.0
    """Stop when d/overfitting is above this and the metric has become worse: the discriminator memorises the training
    images; 0: never. Needs a val split."""
    rollbacks: int = 0
    """How many times to go back to the latest checkpoint with half the learning rates when a loss or a weight is not
    finite; after that, training ends and keeps the best generator."""
    min_diversity: float = 0.2
    """Warn of mode collapse when the spread of the generated images' features, relative to that of the reals, is below
    this."""


@dataclass(frozen=True)
class LoaderConfig:
    """Reading shards."""

    workers: int = 1
    """Reader processes per training worker, fewer if the batches between two snapshots cannot be shared equally; 0
    reads in the training process."""
    shuffle_buffer: int = 2000
    """Size of each reader's shuffle buffer in samples."""
    memory_mib: int = 2048
    """Keep the decoded training images in memory that all workers of a machine share if they fit in this many MiB
    (3 bytes per pixel: 2048 holds 174,000 images at 64x64); later epochs then read and decode nothing. 0: never."""
    cache: str | None = None
    """Local folder to cache shards of a bucket or web server in; none: download them in each epoch."""
    max_broken: float = 0.01
    """Share of the images that may be unreadable, 0 to 1. They are skipped, and counted in the metrics."""


@dataclass(frozen=True)
class EvalConfig:
    """The metric that chooses the best generator."""

    extractor: Literal["auto", "inception", "efflite0", "opennsfw"] = "auto"
    """inception gives FID; efflite0 and opennsfw work offline; auto takes inception if its weights can be had, else
    efflite0, or with --projected.weight, whose network efflite0 is, opennsfw."""
    weights: str | None = None
    """pytorch-fid's InceptionV3 weights file."""
    num: int = 2048
    """Generated images per evaluation."""
    every: int = 1
    """Evaluate every N snapshots; the first and the last one are always evaluated."""


@dataclass(frozen=True)
class TrackConfig:
    """Logging and tracking."""

    uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else an SQLite file beside the runs."""
    offline: bool = False
    """Train without MLflow: records stay in the run's folder until `cattrain sync RUN` delivers them."""
    experiment: str = "catgan"
    """MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, else catgan."""
    model: str = "catgan"
    """Name in MLflow's model registry."""
    tick_kimg: float = 2.0
    """Log losses and speed every N thousand images."""
    snapshot_kimg: float = 16.0
    """Generate samples, evaluate and save a checkpoint every N thousand images."""
    grid: int = 64
    """Images in a sample grid."""


@dataclass(frozen=True)
class Config:
    """One training."""

    recipe: str
    """Name of the recipe these values come from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    grow: GrowConfig = field(default_factory=GrowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    projected: ProjectedConfig = field(default_factory=ProjectedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    batch: int = 64
    """Global batch: reals per step over all workers together."""
    accumulate: int = 1
    """Gradient accumulation: process each worker's share of a batch in N parts, to fit in memory. The gradient is that
    of the whole batch, but batch norm, minibatch standard deviation and ralsgan's means are computed per part, and path
    length regularisation takes the latents of the first part."""
    kimg: float = 1000.0
    """Length of the training in thousands of reals seen."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the hardware multiplies bf16 natively, else fp32. fp32 on a GPU: without TF32 too."""
    compile: bool = False
    """Compile both networks with torch.compile, which takes a minute or more at the start and can make GPUs faster; on
    CPUs it gains nothing. Not with penalties that differentiate twice, nor with networks that grow."""
    profile: int = 0
    """Record the time of every operation in N steps at the start: profile_000000kimg.txt and .json.gz in the
    run's folder, named after the images seen before.
    0: none."""
    seed: int = 0
    """Seed of all random numbers."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; ``Config.from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The configuration of ``to_dict``, also one that an older version wrote.

        Raises:
            ValueError: it has fields that this version does not have.
        """
        return _build(Config, values)


_REMOVED = {"EvalConfig": {"budget"}}
"""Fields that configurations of older versions may still have."""


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """A dataclass from nested dicts; tuples come back from JSON as lists."""
    types = get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    given = values.keys() - _REMOVED.get(cls.__name__, set())
    if unknown := sorted(given - types.keys()):
        names = ", ".join(unknown)
        raise ValueError(
            f"{cls.__name__} has no {names} in this version: use the version that wrote it, or a newer one"
        )
    for name in given:
        value = values[name]
        if isinstance(value, dict):
            kwargs[name] = _build(types[name], value)
        else:
            kwargs[name] = tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)
