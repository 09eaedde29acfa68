"""Recipes are sound, schedules are cosines, contradictions are found all at once."""

import json
from dataclasses import replace

import pytest

from catgan.command import UserError
from trainer.config import (
    AugmentConfig,
    Config,
    EMAConfig,
    GrowConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Schedule,
    StopConfig,
    TrackConfig,
    constant,
)
from trainer.launch.checks import problems
from trainer.launch.unused import without_effect
from trainer.recipes import DEFAULT_CPU, DEFAULT_GPU, FAMILIES, SIZES, resolve


def test_schedule_is_a_cosine_then_constant():
    schedule = Schedule(2.0, 0.0, kimg=10)
    values = [schedule(n) for n in (0, 5_000, 10_000, 99_000)]
    assert values == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert schedule(2_500) == pytest.approx(1 + 2**-0.5)
    assert constant(3.0)(0) == constant(3.0)(10**9) == 3.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_recipes_are_sound_and_survive_json(family: str, size: int):
    config = resolve(f"{family}-{size}", None, gpu=False)
    assert config.recipe == f"{family}-{size}"
    assert config.model.size == size
    assert problems(config) == []
    assert without_effect(config) == []
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_of_a_newer_version_is_refused():
    values = resolve("dcgan-32", None, gpu=False).to_dict()
    values["loss"]["temperature"] = 0.5
    with pytest.raises(ValueError, match="LossConfig has no temperature"):
        Config.from_dict(values)


def test_a_family_takes_the_size_of_the_data():
    assert resolve("r3gan", 128, gpu=False).model.size == 128
    assert resolve(None, 64, gpu=False).recipe == f"{DEFAULT_CPU}-64"
    assert resolve(None, 64, gpu=True).recipe == f"{DEFAULT_GPU}-64"
    assert resolve(None, None, gpu=False).model.size in SIZES


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("progan")])
def test_recipes_for_few_photographs(family: str):
    config, base = (resolve(name, None, gpu=False) for name in (f"{family}-few-64", f"{family}-64"))
    assert config.recipe == f"{family}-few-64"
    assert problems(config) == []
    assert config.augment.policy
    assert config.augment.p(0) == 1
    assert config.kimg < base.kimg
    for of_few, of_base in ((config.optim.g_lr, base.optim.g_lr), (config.loss.gamma, base.loss.gamma)):
        assert of_few.kimg / config.kimg == pytest.approx(of_base.kimg / base.kimg), "the schedule as a whole"
    assert config.model == base.model, "the weights of the recipe itself fit"


def test_few_alone_is_the_default_family():
    assert resolve("few", 64, gpu=False) == resolve(f"{DEFAULT_CPU}-few-64", None, gpu=False)
    assert resolve("few-128", None, gpu=True).recipe == f"{DEFAULT_GPU}-few-128"
    with pytest.raises(UserError, match="no progan-64 for few photographs: it begins at a low resolution"):
        resolve("progan-few-64", None, gpu=False)


@pytest.mark.parametrize("name", ["no-such-recipe", "r3gan-63", "r3gan-", "r3gam-64", "few-few-64", "-few", "few-", ""])
def test_unknown_recipes_are_refused(name: str):
    if name == "":
        assert resolve(None, None, gpu=False)
        return
    with pytest.raises(UserError, match=r"Families: .*dcgan-cpu"):
        resolve(name, None, gpu=False)


def test_a_near_miss_is_named():
    with pytest.raises(UserError, match="did you mean r3gan-64"):
        resolve("r3gam-64", None, gpu=False)


def test_contradictions_are_found_all_at_once():
    config = replace(
        resolve("dcgan-32", None, gpu=False),
        model=ModelConfig(size=33),
        loss=LossConfig(gamma=constant(1.0)),
        track=TrackConfig(tick_kimg=5, snapshot_kimg=1),
        batch=0,
        kimg=-1,
    )
    found = "\n".join(problems(config))
    for part in ("--model.size 33", "batch norm mixes samples", "--track.snapshot-kimg 1", "--batch 0", "--kimg -1"):
        assert part in found, part


NO_NORM = ModelConfig(d_norm="none")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"loss": LossConfig(penalty_every=4)}, "no penalty"),
        ({"seed": -1}, "--seed"),
        ({"model": ModelConfig(z_dim=0)}, "--model.z-dim 0"),
        ({"model": ModelConfig(arch="vae")}, "--model.arch vae: give one of"),
        ({"model": ModelConfig(d_dropout=1.0)}, "--model.d-dropout 1"),
        ({"loss": LossConfig("bcd")}, "--loss.name bcd: give one of"),
        ({"loss": LossConfig(gp=10.0)}, "batch norm mixes samples"),
        ({"loss": LossConfig(penalty="finite-difference")}, "--loss.penalty finite-difference without --loss.gamma"),
        (
            {
                "loss": LossConfig(gamma=constant(1.0), penalty="finite-difference"),
                "model": ModelConfig(d_norm="none", d_dropout=0.3),
            },
            "--loss.penalty finite-difference with --model.d-dropout",
        ),
        (
            {"loss": LossConfig(gamma=constant(1.0)), "model": ModelConfig(d_norm="none"), "compile": True},
            "--compile with a penalty that differentiates twice",
        ),
        ({"model": ModelConfig(arch="progan"), "compile": True}, "--compile with --model.arch progan"),
        ({"profile": -1}, "--profile -1: give 0 or more"),
        ({"loss": LossConfig("hinge", smoothing=0.1)}, "--loss.smoothing with --loss.name hinge"),
        ({"loss": LossConfig("rpgan", lecam=0.1)}, "--loss.lecam"),
        ({"loss": LossConfig(n_critic=0)}, "--loss.n-critic 0"),
        ({"loss": LossConfig(clip=-1.0)}, "--loss.clip -1"),
        ({"accumulate": 2}, "--accumulate 2 with --loss.share-batch"),
        ({"augment": AugmentConfig(target=0.6)}, "--augment.target without --augment.policy"),
        ({"augment": AugmentConfig(policy=("colour",), target=1.0)}, "--augment.target 1"),
        ({"grow": GrowConfig(start=5)}, "--grow.start 5"),
        ({"grow": GrowConfig(hold_kimg=0, fade_kimg=0)}, "not both 0"),
        (
            {"loss": LossConfig(gamma=Schedule(1.0, 0.5)), "model": NO_NORM},
            "--loss.gamma from 1 to 0.5 within 0 kimg",
        ),
        ({"optim": OptimConfig(g_lr=Schedule(1e-3, 2e-4))}, "--optim.g-lr from 0.001 to 0.0002 within 0 kimg"),
        (
            {"loss": LossConfig(gamma=constant(1.0), gp=1.0), "model": NO_NORM},
            "--loss.gamma and --loss.gp 1 together",
        ),
        ({"model": ModelConfig(arch="r3gan", g_width=100)}, "--model.g-width 100"),
        ({"model": ModelConfig(arch="progan", d_dropout=0.5)}, "are options of dcgan"),
        ({"model": ModelConfig(attention=16)}, "with --model.arch dcgan: they are options of biggan; leave them out"),
        ({"model": ModelConfig(arch="r3gan", g_spectral_norm=True)}, "they are options of biggan; leave them out"),
        (
            {"model": ModelConfig(arch="biggan", attention=32)},
            "--model.attention 32 with --model.size 32: give one of 0, 8, 16",
        ),
        ({"model": ModelConfig(arch="biggan", size=512, attention=128)}, "give one of 0, 8, 16, 32, 64"),
        (
            {"model": ModelConfig(arch="biggan", size=8, attention=4)},
            "--model.attention 4 with --model.size 8: give one of 0",
        ),
        ({"model": ModelConfig(arch="biggan", attention=-8)}, "--model.attention -8"),
        ({"loss": LossConfig(path_length=0.2, share_batch=False)}, "they are options of stylegan2"),
        ({"loss": LossConfig(style_mixing=0.9)}, "they are options of stylegan2"),
        (
            {"model": ModelConfig(arch="stylegan2"), "loss": LossConfig(path_length=0.2)},
            "--loss.path-length with --loss.share-batch",
        ),
        (
            {
                "model": ModelConfig(arch="stylegan2"),
                "loss": LossConfig(path_length=0.2, share_batch=False),
                "compile": True,
            },
            "--compile with a penalty that differentiates twice",
        ),
        ({"loss": LossConfig(path_every=2)}, "--loss.path-every 2 without --loss.path-length"),
        ({"ema": EMAConfig(ramp=0.0)}, "--ema.ramp 0"),
        ({"accumulate": 65, "loss": LossConfig(share_batch=False)}, "--accumulate 65: give 1 to --batch, 64"),
        ({"stop": StopConfig(patience_kimg=-1)}, "--stop.patience-kimg -1"),
    ],
)
def test_single_problems(change: dict, part: str):
    (found,) = problems(replace(Config(recipe="x"), **change))
    assert part in found
