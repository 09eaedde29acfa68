"""Validation of a configuration, before anything starts."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import Config, Schedule
from trainer.features.extractors import MIN_FID
from trainer.launch.options import schedules
from trainer.losses import LOSSES
from trainer.models import ARCHITECTURES

Check = Callable[[bool, str], None]


def problems(config: Config) -> list[str]:
    """All problems of a configuration by itself, without data and workers: one sentence each, empty if it is valid."""
    found: list[str] = []

    def check(is_valid: bool, sentence: str) -> None:
        if not is_valid:
            found.append(sentence)

    _check_model(config, check)
    _check_loss(config, check)
    _check_augmentation(config, check)
    _check_optimisers(config, check)
    _check_progress(config, check)
    _check_schedules(config, check)
    return found


def _positive(schedule: Schedule) -> bool:
    return max(schedule.start, schedule.end) > 0


def _not_negative(schedule: Schedule) -> bool:
    return min(schedule.start, schedule.end) >= 0


def _check_model(config: Config, check: Check) -> None:
    m, grow = config.model, config.grow
    check(m.arch in ARCHITECTURES, f"--model.arch {m.arch}: give one of {', '.join(ARCHITECTURES)}")
    check(m.size in (8, 16, 32, 64, 128, 256, 512), f"--model.size {m.size}: give a power of two from 8 to 512")
    for name in ("z_dim", "g_width", "d_width", "max_width", "blocks", "expansion", "group_width"):
        value = getattr(m, name)
        check(value >= 1, f"--model.{name.replace('_', '-')} {value}: give 1 or more")
    for name in ("g_width", "d_width", "max_width"):
        inner = getattr(m, name) * m.expansion
        check(
            m.arch != "r3gan" or inner <= m.group_width or inner % m.group_width == 0,
            f"--model.{name.replace('_', '-')} {getattr(m, name)}: times --model.expansion {m.expansion} it must be a"
            f" multiple of --model.group-width {m.group_width}",
        )
    check(
        m.arch == "dcgan" or (m.g_head, m.d_norm, m.d_dropout) == ("conv", "batch", 0.0),
        f"--model.g-head, --model.d-norm and --model.d-dropout have no effect with --model.arch {m.arch}: they are"
        " options of dcgan; leave them out",
    )
    check(0 <= m.d_dropout < 1, f"--model.d-dropout {m.d_dropout:g}: give 0 or more, below 1")
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
    penalised = _positive(loss.gamma) or loss.gp > 0
    check(
        not (penalised and m.arch == "dcgan" and m.d_norm == "batch"),
        "--loss.gamma or --loss.gp with --model.d-norm batch: batch norm mixes samples, so per-sample gradients are"
        " undefined; add --model.d-norm none or set them to 0",
    )
    check(_not_negative(loss.gamma), "--loss.gamma: give 0 or more")
    for name in ("gp", "drift", "clip", "lecam"):
        check(getattr(loss, name) >= 0, f"--loss.{name} {getattr(loss, name):g}: give 0 or more")
    check(0 <= loss.smoothing < 0.5, f"--loss.smoothing {loss.smoothing:g}: give 0 or more, below 0.5")
    check(
        loss.smoothing == 0 or loss.name == "bce",
        f"--loss.smoothing with --loss.name {loss.name}: only the labels of bce can be smoothed",
    )
    check(loss.n_critic >= 1, f"--loss.n-critic {loss.n_critic}: give 1 or more")
    check(loss.penalty_every >= 1, f"--loss.penalty-every {loss.penalty_every}: give 1 or more")
    check(
        loss.penalty_every == 1 or _positive(loss.gamma),
        f"--loss.penalty-every {loss.penalty_every} without --loss.gamma: there is no penalty to compute",
    )
    is_relative = loss.name in LOSSES and not LOSSES[loss.name].has_level
    check(
        not (is_relative and (loss.lecam > 0 or config.augment.target > 0)),
        f"--loss.lecam or --augment.target with --loss.name {loss.name}: both use the mean of D's logits, which this"
        " loss does not determine; use bce or hinge",
    )
    check(
        not (_positive(loss.gamma) and loss.gp > 0),
        f"--loss.gamma and --loss.gp {loss.gp:g} together: the first pushes gradients of D to norm 0, the second to"
        " norm 1; set one of them to 0",
    )
    check(
        1 <= config.accumulate <= max(config.batch, 1),
        f"--accumulate {config.accumulate}: give 1 to --batch, {config.batch}: each part needs an image",
    )
    check(
        config.accumulate == 1 or not loss.share_batch,
        f"--accumulate {config.accumulate} with --loss.share-batch True: the shared generator pass keeps the whole"
        " batch in memory; add --loss.share-batch False",
    )


def _check_augmentation(config: Config, check: Check) -> None:
    a = config.augment
    check(_not_negative(a.p) and max(a.p.start, a.p.end) <= 1, "--augment.p: give probabilities from 0 to 1")
    check(
        not (_positive(a.p) or a.target) or bool(a.policy),
        "--augment.p or --augment.target without --augment.policy: name the transforms (colour translation cutout)",
    )
    check(0 <= a.target < 1, f"--augment.target {a.target:g}: give 0 or more, below 1")
    check(a.target_kimg > 0, f"--augment.target-kimg {a.target_kimg:g}: give more than 0")
    check(_not_negative(a.noise), "--augment.noise: give 0 or more")


def _check_optimisers(config: Config, check: Check) -> None:
    o = config.optim
    for name in ("g_lr", "d_lr"):
        lr = getattr(o, name)
        check(_not_negative(lr) and _positive(lr), f"--optim.{name.replace('_', '-')}: give more than 0")
    check(0 <= o.beta1 < 1, f"--optim.beta1 {o.beta1}: give 0 or more, below 1")
    check(_not_negative(o.beta2) and max(o.beta2.start, o.beta2.end) < 1, "--optim.beta2: give 0 or more, below 1")
    check(config.ema.half_life_kimg >= 0, "--ema.half-life-kimg: give 0 or more")
    check(config.ema.ramp > 0, f"--ema.ramp {config.ema.ramp:g}: give more than 0")


def _check_progress(config: Config, check: Check) -> None:
    track = config.track
    check(config.batch >= 1, f"--batch {config.batch}: give 1 or more")
    check(config.kimg > 0, f"--kimg {config.kimg:g}: give more than 0")
    check(config.seed >= 0, f"--seed {config.seed}: give 0 or more")
    check(config.stop.patience_kimg >= 0, f"--stop.patience-kimg {config.stop.patience_kimg:g}: give 0 or more")
    check(config.stop.rollbacks >= 0, f"--stop.rollbacks {config.stop.rollbacks}: give 0 or more")
    check(config.loader.workers >= 0, f"--loader.workers {config.loader.workers}: give 0 or more")
    check(config.loader.shuffle_buffer >= 1, "--loader.shuffle-buffer: give 1 or more")
    check(config.loader.memory_mib >= 0, f"--loader.memory-mib {config.loader.memory_mib}: give 0 or more")
    check(0 <= config.loader.max_broken < 1, f"--loader.max-broken {config.loader.max_broken}: give 0 to below 1")
    check(config.eval.num >= 2, f"--eval.num {config.eval.num}: give 2 or more")
    check(
        config.eval.num >= MIN_FID or config.eval.extractor != "inception" or bool(config.eval.weights),
        f"--eval.num {config.eval.num}: FID needs at least {MIN_FID}; give more, or --eval.extractor efflite0",
    )
    check(config.eval.every >= 1, f"--eval.every {config.eval.every}: give 1 or more")
    check(track.tick_kimg > 0, "--track.tick-kimg: give more than 0")
    check(
        track.snapshot_kimg >= track.tick_kimg,
        f"--track.snapshot-kimg {track.snapshot_kimg:g}: give at least --track.tick-kimg ({track.tick_kimg:g})",
    )
    check(1 <= track.grid <= 1024, f"--track.grid {track.grid}: give 1 to 1024")


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
