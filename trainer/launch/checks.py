"""Validation of a configuration, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from trainer.config import Config, Schedule
from trainer.features.extractors import MIN_FID
from trainer.launch.options import schedules
from trainer.losses import LOSSES
from trainer.models import ARCHITECTURES

Check = Callable[[bool, str], None]

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "1 or more",
        lambda value: value >= 1,
        "batch model.z_dim model.g_width model.d_width model.max_width model.blocks model.expansion model.group_width"
        " loss.n_critic loss.penalty_every loader.shuffle_buffer eval.every",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "seed loss.gamma loss.gp loss.drift loss.clip loss.lecam augment.noise optim.g_lr optim.d_lr"
        " ema.half_life_kimg stop.patience_kimg stop.rollbacks loader.workers loader.memory_mib",
    ),
    ("more than 0", lambda value: value > 0, "kimg augment.target_kimg ema.ramp track.tick_kimg"),
    (
        "0 or more, below 1",
        lambda value: 0 <= value < 1,
        "model.d_dropout augment.target optim.beta1 optim.beta2 loader.max_broken",
    ),
    ("0 or more, below 0.5", lambda value: 0 <= value < 0.5, "loss.smoothing"),
    ("0 to 1", lambda value: 0 <= value <= 1, "augment.p"),
    ("2 or more", lambda value: value >= 2, "eval.num"),
    ("1 to 1024", lambda value: 1 <= value <= 1024, "track.grid"),
)
"""Which values are allowed, a test for them, and the fields they apply to; in a schedule, to its start and end."""


def problems(config: Config) -> list[str]:
    """All problems of a configuration by itself, without data and workers: one sentence each, empty if it is valid."""
    found: list[str] = []

    def check(is_valid: bool, sentence: str) -> None:
        if not is_valid:
            found.append(sentence)

    _check_ranges(config, check)
    _check_model(config, check)
    _check_loss(config, check)
    _check_training(config, check)
    _check_schedules(config, check)
    return found


def _is_on(schedule: Schedule) -> bool:
    return max(schedule.start, schedule.end) > 0


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


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
    check(m.size in (8, 16, 32, 64, 128, 256, 512), f"--model.size {m.size}: give a power of two from 8 to 512")
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
        loss.smoothing == 0 or loss.name == "bce",
        f"--loss.smoothing with --loss.name {loss.name}: only the labels of bce can be smoothed",
    )
    check(
        loss.penalty_every <= 1 or _is_on(loss.gamma),
        f"--loss.penalty-every {loss.penalty_every} without --loss.gamma: there is no penalty to compute",
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
        1 <= config.accumulate <= max(config.batch, 1),
        f"--accumulate {config.accumulate}: give 1 to --batch, {config.batch}: each part needs an image",
    )
    check(
        config.accumulate == 1 or not config.loss.share_batch,
        f"--accumulate {config.accumulate} with --loss.share-batch: the shared generator pass keeps the whole"
        " batch in memory; add --loss.no-share-batch",
    )
    check(
        config.eval.num >= MIN_FID or config.eval.extractor != "inception" or bool(config.eval.weights),
        f"--eval.num {config.eval.num}: FID needs at least {MIN_FID}; give more, or --eval.extractor efflite0",
    )
    check(
        track.snapshot_kimg >= track.tick_kimg,
        f"--track.snapshot-kimg {track.snapshot_kimg:g}: give at least --track.tick-kimg ({track.tick_kimg:g})",
    )


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
