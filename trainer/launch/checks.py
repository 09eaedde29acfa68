"""Validation of the options, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from operator import attrgetter

import torch

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.config import SIDES, Config, Schedule
from trainer.distributed.parallel import freeze_first
from trainer.features.extractors import MIN_FID, OFFLINE
from trainer.launch.connect import Workers
from trainer.launch.options import Options, schedules, values
from trainer.losses import LOSSES
from trainer.models import ARCHITECTURES, build_discriminator, full_resolution_kimg
from trainer.models.projected import STRIDES
from trainer.tracking.names import problem_with_names

Check = Callable[[bool, str], None]

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "1 or more",
        lambda value: value >= 1,
        "batch model.z_dim model.g_width model.d_width model.max_width model.blocks model.expansion model.group_width"
        " model.mapping_layers loss.n_critic loss.penalty_every loss.path_every loader.shuffle_buffer eval.every",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "loss.gamma loss.path_length loss.gp loss.drift loss.clip loss.lecam augment.noise optim.g_lr optim.d_lr"
        " ema.half_life_kimg projected.weight projected.start_kimg stop.patience_kimg stop.overfitting stop.rollbacks"
        " stop.min_diversity loader.workers loader.memory_mib optim.freeze_d profile",
    ),
    ("0 to 2^63 - 1", lambda value: 0 <= value < 2**63, "seed"),
    ("more than 0", lambda value: value > 0, "kimg augment.target_kimg projected.lr ema.ramp track.tick_kimg"),
    (
        "0 or more, below 1",
        lambda value: 0 <= value < 1,
        "model.d_dropout augment.target optim.beta1 optim.beta2 loader.max_broken",
    ),
    ("0 or more", lambda value: value >= 0, "loss.reconstruction"),
    ("0 or more, below 0.5", lambda value: 0 <= value < 0.5, "loss.smoothing"),
    ("0 to 1", lambda value: 0 <= value <= 1, "augment.p loss.style_mixing"),
    ("2 or more", lambda value: value >= 2, "eval.num"),
    ("1 to 1024", lambda value: 1 <= value <= 1024, "track.grid"),
)
"""Which values are allowed, a test for them, and the fields they apply to; in a schedule, to its start and end."""


_LARGEST = 1e9  # of any number but the seed: above what is of use, and positions in images stay exact
_ATTENTION_SIDES = (8, 16, 32, 64)  # at 128 its weights would take 256 MiB for each image
_MIN_IMAGES = 2  # whose features have a covariance
_NAME_BYTES = 250  # file systems allow 255, MLflow 250 characters


def check_options(options: Options, manifest: Manifest | None, workers: Workers) -> None:
    """Check the options by themselves, against the data and the workers.

    Raises:
        UserError: all problems, in one line.
    """
    if found := problems(options.config()) + _problems_of_run(options, manifest, workers):
        raise UserError("; ".join(found))


def problems(config: Config) -> list[str]:
    """All problems of a configuration by itself, without data and workers: one sentence each, empty if it is valid."""
    found: list[str] = []

    def check(is_valid: bool, sentence: str) -> None:
        if not is_valid:
            found.append(sentence)

    _check_numbers(config, check)
    if found:  # the other checks compute with them
        return found
    _check_ranges(config, check)
    _check_model(config, check)
    _check_loss(config, check)
    _check_training(config, check)
    _check_projected(config, check)
    _check_schedules(config, check)
    if not found:  # builds the network
        _check_frozen_layers(config, check)
    return found


def _is_on(schedule: Schedule) -> bool:
    return max(schedule.start, schedule.end) > 0


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _check_numbers(config: Config, check: Check) -> None:
    for name, value in values(config).items():
        numbers = astuple(value) if isinstance(value, Schedule) else (value,)
        for number in {f"{n:g}": n for n in numbers if isinstance(n, int | float) and name != "--seed"}.values():
            is_usable = math.isfinite(number) and abs(number) <= _LARGEST
            check(is_usable, f"{name} {number:g}: give a number up to {_LARGEST:g}")


def _check_ranges(config: Config, check: Check) -> None:
    for allowed, is_allowed, names in _RANGES:
        for field in names.split():
            value = attrgetter(field)(config)
            ends = {value.start, value.end} if isinstance(value, Schedule) else {value}
            for end in ends:
                check(is_allowed(end), f"{_option(field)} {end:g}: give {allowed}")


def _check_model(config: Config, check: Check) -> None:
    m, grow = config.model, config.grow
    check(m.arch in ARCHITECTURES, f"--model.arch {m.arch}: give one of {', '.join(ARCHITECTURES)}")
    check(m.size in SIDES, f"--model.size {m.size}: give a power of two from 8 to 512")
    for field in ("model.g_width", "model.d_width", "model.max_width"):
        width = attrgetter(field)(config)
        inner = width * m.expansion
        check(
            m.arch != "r3gan" or inner <= m.group_width or inner % m.group_width == 0,
            f"{_option(field)} {width}: times --model.expansion {m.expansion} it must be a multiple of"
            f" --model.group-width {m.group_width}",
        )
    check(
        m.arch == "dcgan" or (m.g_head, m.d_norm, m.d_dropout) == ("conv", "batch", 0.0),
        f"--model.g-head, --model.d-norm and --model.d-dropout have no effect with --model.arch {m.arch}: they are"
        " options of dcgan; leave them out",
    )
    check(
        m.arch == "biggan" or (m.attention, m.g_spectral_norm) == (0, False),
        f"--model.attention and --model.g-spectral-norm have no effect with --model.arch {m.arch}: they are options of"
        " biggan; leave them out",
    )
    sides = [side for side in (0, *_ATTENTION_SIDES) if side <= m.size // 2]
    check(
        m.arch != "biggan" or m.attention in sides,
        f"--model.attention {m.attention} with --model.size {m.size}: give one of {', '.join(map(str, sides))}",
    )
    takes_classes = m.arch in ARCHITECTURES and ARCHITECTURES[m.arch][0].takes_classes
    check(
        takes_classes or not m.conditional,
        f"--model.conditional with --model.arch {m.arch}, whose networks take no classes: leave it out, or give one of"
        f" {', '.join(arch for arch, (generator, _) in ARCHITECTURES.items() if generator.takes_classes)}",
    )
    check(
        grow.start in (4, 8, 16, 32, 64, 128, 256) and grow.start <= m.size,
        f"--grow.start {grow.start}: give a power of two from 4 to the size, {m.size}",
    )
    check(
        min(grow.hold_kimg, grow.fade_kimg) >= 0 and grow.hold_kimg + grow.fade_kimg > 0,
        "--grow.hold-kimg and --grow.fade-kimg: give 0 or more, not both 0",
    )


def _check_loss(config: Config, check: Check) -> None:
    m, loss = config.model, config.loss
    check(loss.name in LOSSES, f"--loss.name {loss.name}: give one of {', '.join(LOSSES)}")
    penalised = _is_on(loss.gamma) or loss.gp > 0
    check(
        not (penalised and m.arch == "dcgan" and m.d_norm == "batch"),
        "--loss.gamma or --loss.gp with --model.d-norm batch: batch norm mixes samples, so per-sample gradients are"
        " undefined; add --model.d-norm none or set them to 0",
    )
    check(
        not (penalised and m.arch == "fastgan"),
        "--loss.gamma or --loss.gp with --model.arch fastgan, whose batch norm mixes samples, so per-sample gradients"
        " are undefined; set them to 0",
    )
    check(
        loss.reconstruction == 0 or m.arch == "fastgan",
        f"--loss.reconstruction with --model.arch {m.arch}, whose discriminator has no decoders: it is an option of"
        " fastgan; set it to 0",
    )
    check(
        loss.smoothing == 0 or loss.name == "bce",
        f"--loss.smoothing with --loss.name {loss.name}: only the labels of bce can be smoothed",
    )
    check(
        loss.penalty == "exact" or _is_on(loss.gamma),
        f"--loss.penalty {loss.penalty} without --loss.gamma: there is no penalty to compute",
    )
    check(
        loss.penalty == "exact" or m.d_dropout == 0,
        "--loss.penalty finite-difference with --model.d-dropout: dropout would differ between the two passes whose"
        " difference is the penalty; set one of them back",
    )
    check(
        loss.penalty == "exact" or m.arch != "biggan",
        "--loss.penalty finite-difference with --model.arch biggan: spectral norm changes between the two passes whose"
        " difference is the penalty; give --loss.penalty exact",
    )
    check(
        not (
            config.compile and (loss.gp > 0 or loss.path_length > 0 or (_is_on(loss.gamma) and loss.penalty == "exact"))
        ),
        "--compile with a penalty that differentiates twice, which compiled networks cannot: give --loss.penalty"
        " finite-difference with --loss.gamma, set --loss.gp and --loss.path-length to 0, or leave --compile out",
    )
    check(
        not (config.compile and m.arch == "progan"),
        "--compile with --model.arch progan, whose networks grow and would be compiled again: leave --compile out",
    )
    check(
        loss.penalty_every <= 1 or _is_on(loss.gamma),
        f"--loss.penalty-every {loss.penalty_every} without --loss.gamma: there is no penalty to compute",
    )
    check(
        loss.path_every <= 1 or loss.path_length > 0,
        f"--loss.path-every {loss.path_every} without --loss.path-length: there is no penalty to compute",
    )
    check(
        m.arch == "stylegan2" or (loss.path_length, loss.style_mixing) == (0.0, 0.0),
        f"--loss.path-length or --loss.style-mixing with --model.arch {m.arch}, which has no styles: they are options"
        " of stylegan2; set them to 0",
    )
    check(
        loss.path_length == 0 or not loss.share_batch,
        "--loss.path-length with --loss.share-batch: the penalty needs the generator between the two phases of a shared"
        " batch; add --loss.no-share-batch",
    )
    is_relative = loss.name in LOSSES and not LOSSES[loss.name].has_level
    check(
        not (is_relative and (loss.lecam > 0 or config.augment.target > 0)),
        f"--loss.lecam or --augment.target with --loss.name {loss.name}: both use the mean of D's logits, which this"
        " loss does not determine; use bce or hinge",
    )
    check(
        not (_is_on(loss.gamma) and loss.gp > 0),
        f"--loss.gamma and --loss.gp {loss.gp:g} together: the first pushes gradients of D to norm 0, the second to"
        " norm 1; set one of them to 0",
    )


def _check_training(config: Config, check: Check) -> None:
    augment, track = config.augment, config.track
    check(
        not (_is_on(augment.p) or augment.target) or bool(augment.policy),
        "--augment.p or --augment.target without --augment.policy: name the transforms (colour translation cutout)",
    )
    for field in ("optim.g_lr", "optim.d_lr"):
        lr = attrgetter(field)(config)
        check(lr.start != 0 or lr.end != 0, f"{_option(field)} 0: give more than 0")
    check(
        config.batch < 1 or 1 <= config.accumulate <= config.batch,
        f"--accumulate {config.accumulate}: give 1 to --batch, {config.batch}: each part needs an image",
    )
    check(
        config.accumulate == 1 or not config.loss.share_batch,
        f"--accumulate {config.accumulate} with --loss.share-batch: the shared generator pass keeps the whole"
        " batch in memory; add --loss.no-share-batch",
    )
    extractor = config.eval.extractor
    check(
        extractor not in OFFLINE or not config.eval.weights,
        f"--eval.weights with --eval.extractor {extractor}, which has its own weights: leave one of them out",
    )
    check(
        config.eval.num >= MIN_FID or config.eval.extractor != "inception" or bool(config.eval.weights),
        f"--eval.num {config.eval.num}: FID needs at least {MIN_FID}; give more, or --eval.extractor efflite0",
    )
    check(
        track.snapshot_kimg >= track.tick_kimg,
        f"--track.snapshot-kimg {track.snapshot_kimg:g}: give at least --track.tick-kimg ({track.tick_kimg:g})",
    )


def _check_projected(config: Config, check: Check) -> None:
    projected, size = config.projected, config.model.size
    if projected.weight == 0:
        return
    strides = projected.strides
    allowed = [stride for stride in STRIDES if size % stride == 0]
    check(
        len(strides) > 0 and list(strides) == [stride for stride in allowed if stride in strides],
        f"--projected.strides {' '.join(map(str, strides))}: give some of {', '.join(map(str, allowed))}, ascending",
    )
    full = full_resolution_kimg(config)
    check(
        projected.start_kimg >= full,
        f"--projected.start-kimg {projected.start_kimg:g}: the networks reach full resolution at {full:g} kimg; give"
        " that or more",
    )
    check(
        config.accumulate == 1,
        f"--accumulate {config.accumulate} with --projected.weight: its discriminator takes whole batches; leave one"
        " of them out",
    )
    check(
        config.eval.extractor != "efflite0",
        "--eval.extractor efflite0 with --projected.weight, whose discriminator contains this network: give opennsfw"
        " or inception",
    )


def _check_frozen_layers(config: Config, check: Check) -> None:
    num = config.optim.freeze_d
    if num == 0:
        return
    check(
        config.model.arch != "progan",
        f"--optim.freeze-d {num} with --model.arch progan, whose layers next to the image change as it grows; set it"
        " to 0",
    )
    try:
        with torch.device("meta"):
            freeze_first(build_discriminator(config.model), num)
    except ValueError as error:
        check(False, f"--optim.freeze-d {num}: the discriminator {error}")


def _check_schedules(config: Config, check: Check) -> None:
    """A ramp between two values needs a length, else one of the values is never used."""
    for name, schedule in schedules(config).items():
        start_only = name == "--augment.p" and config.augment.target > 0
        check(
            schedule.start == schedule.end or schedule.kimg > 0 or start_only,
            f"{name} from {schedule.start:g} to {schedule.end:g} within 0 kimg: give {name}.kimg for a ramp, or"
            f" {name} VALUE for a constant",
        )
        check(schedule.kimg >= 0 or start_only, f"{name}.kimg {schedule.kimg:g}: give 0 or more")


def _problems_of_run(options: Options, manifest: Manifest | None, workers: Workers) -> list[str]:
    found = _problems_of_data(options, manifest)
    found += (of_name := problems_of_name(options.name))
    found += problem_with_names(options.track.experiment, options.track.model, None if of_name else options.name)
    most = workers if isinstance(workers, int) else workers[1]
    if 1 <= options.batch < most:
        found.append(
            f"--workers {most} with --batch {options.batch}: each worker needs an image; ask for fewer workers"
        )
    elif 1 <= options.batch < options.accumulate * max(most, 1):
        found.append(
            f"--workers {most} with --batch {options.batch} and --accumulate {options.accumulate}: each part needs an"
            " image; accumulate less"
        )
    return found


def _problems_of_data(options: Options, manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    found, size, images = [], options.model.size, manifest.splits["train"].images
    if options.stop.overfitting and not manifest.splits["val"].images:
        found.append(
            f"--stop.overfitting {options.stop.overfitting:g}: {manifest.root} has no val split to compare with; build"
            " it with --val-fraction 0.1, or leave the option out"
        )
    if manifest.size != size:
        found.append(
            f"{options.recipe} trains at {size}x{size} but the shards hold {manifest.size}x{manifest.size} images;"
            f" take a recipe of that size or build shards with --size {size}"
        )
    if images < _MIN_IMAGES:
        found.append(
            f"--data {options.data}: {images or 'no'} images in the train split, at least {_MIN_IMAGES} are needed"
        )
    return found


def problems_of_name(name: str | None) -> list[str]:
    """The name of a run becomes the name of a folder or the end of a URL."""
    if name is None:
        return []
    rules = {
        "without slashes": not set(name) & set("/\\"),
        "of printable characters": name.isprintable(),
        "without blanks at its ends": name == name.strip(),
        "other than -, . and ..": name not in ("-", ".", ".."),
        f"of at most {_NAME_BYTES} bytes": len(name.encode(errors="surrogateescape")) <= _NAME_BYTES,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    return [f"--name {name[:80]!r}: give a name {', '.join(broken)}"] if broken else []
