"""Taking over weights: what fits, across sizes too, and a report of what did not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from catgan.command import UserError
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import rng_state
from trainer.checkpoints.storage import Storage
from trainer.checkpoints.transfer import init_from, write_networks
from trainer.config import Config, ModelConfig
from trainer.step import GAN

CPU = torch.device("cpu")
SMALL = Config("small", ModelConfig(size=16, z_dim=8, g_width=16, d_width=16, d_norm="none"), batch=4)
LARGE = replace(SMALL, model=replace(SMALL.model, size=32, g_width=8, d_width=8))


def saved(config: Config, folder: Path) -> GAN:
    torch.manual_seed(1)
    gan = GAN(config, CPU)
    for module in (gan.generator, gan.discriminator, gan.ema.module):
        for p in module.parameters():
            torch.nn.init.normal_(p)
    extra = {"best": None, "last_metric": None, "run_id": "r", "dataset_digest": "d"}
    state = {"nimg": 4000, "config": config.to_dict(), "rng": [rng_state(CPU)], **gan.state_dict()}
    Storage(folder.parent).save(folder.name, checkpoint.encode(state | extra))
    return gan


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_checkpoint_gives_both_networks(tmp_path: Path):
    source = saved(SMALL, tmp_path / checkpoint.folder_name(4000))
    gan = GAN(SMALL, CPU)
    for path in (tmp_path, tmp_path / checkpoint.folder_name(4000)):
        report = init_from(gan, path)
        assert report.count("100% of the values") == 2
        assert same(gan.generator, source.ema.module)
        assert same(gan.ema.module, source.ema.module)
        assert same(gan.discriminator, source.discriminator)


def test_released_weights_give_the_generator(tmp_path: Path):
    source = saved(SMALL, tmp_path / "x")
    info = {"recipe": "small", "kimg": 4, "metric": None, "config": SMALL.to_dict()}
    (tmp_path / "gen.safetensors").write_bytes(checkpoint.encode_generator(source.ema.module.state_dict(), info))
    gan = GAN(SMALL, CPU)
    before = {n: t.clone() for n, t in gan.discriminator.state_dict().items()}
    report = init_from(gan, tmp_path / "gen.safetensors")
    assert "discriminator: nothing in gen.safetensors, is initialised at random" in report
    assert same(gan.generator, source.ema.module)
    assert all(torch.equal(t, before[n]) for n, t in gan.discriminator.state_dict().items())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    source = saved(SMALL, tmp_path / "x")
    weights = {name: t.clone() for name, t in source.ema.module.state_dict().items()}
    next(iter(weights.values())).fill_(torch.nan)
    info = {"recipe": "small", "kimg": 4, "metric": None, "config": SMALL.to_dict()}
    (tmp_path / "gen.safetensors").write_bytes(checkpoint.encode_generator(weights, info))
    with pytest.raises(UserError, match=r"gen\.safetensors: it has weights that are not finite"):
        init_from(GAN(SMALL, CPU), tmp_path / "gen.safetensors")


def test_frozen_layers_of_the_discriminator_need_weights(tmp_path: Path):
    source = saved(SMALL, tmp_path / "x")
    info = {"recipe": "small", "kimg": 4, "metric": None, "config": SMALL.to_dict()}
    (tmp_path / "gen.safetensors").write_bytes(checkpoint.encode_generator(source.ema.module.state_dict(), info))
    freezing = replace(SMALL, optim=replace(SMALL.optim, freeze_d=1))
    with pytest.raises(UserError, match=r"--optim\.freeze-d 1: .*gen\.safetensors has no weights for .*rgb"):
        init_from(GAN(freezing, CPU), tmp_path / "gen.safetensors")
    wider = replace(freezing, model=replace(freezing.model, d_width=2 * freezing.model.d_width))
    saved(SMALL, tmp_path / "run" / checkpoint.folder_name(4000))
    with pytest.raises(UserError, match=r"--optim\.freeze-d 1: .* has no weights for"):
        init_from(GAN(wider, CPU), tmp_path / "run")
    gan = GAN(freezing, CPU)
    init_from(gan, tmp_path / "run")
    assert not next(gan.discriminator.parameters()).requires_grad


def test_both_networks_of_a_checkpoint_as_safetensors_give_what_the_checkpoint_gives(tmp_path: Path):
    source = saved(SMALL, tmp_path / "run" / checkpoint.folder_name(4000))
    write_networks(tmp_path / "run", tmp_path / "base")
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == ["disc.safetensors", "gen.safetensors"]
    gan = GAN(SMALL, CPU)
    report = init_from(gan, tmp_path / "base")
    assert report.count("100% of the values") == 2
    assert same(gan.generator, source.ema.module)
    assert same(gan.discriminator, source.discriminator)
    loaded, info = checkpoint.load_generator(tmp_path / "base")
    assert same(loaded, source.ema.module)
    assert (info["recipe"], info["kimg"], info["run_id"]) == ("small", 4, "r")


def test_both_networks_need_a_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoint"):
        write_networks(tmp_path, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_broken_discriminator_beside_the_generator_is_named(tmp_path: Path):
    saved(SMALL, tmp_path / "run" / checkpoint.folder_name(4000))
    write_networks(tmp_path / "run", tmp_path / "base")
    (tmp_path / "base" / "disc.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"disc\.safetensors is not a safetensors file"):
        init_from(GAN(SMALL, CPU), tmp_path / "base")


def test_layers_of_the_same_resolution_go_to_a_larger_model(tmp_path: Path):
    source = saved(SMALL, tmp_path / "x")
    gan = GAN(LARGE, CPU)
    fresh = {n: t.clone() for n, t in gan.generator.state_dict().items()}
    report = init_from(gan, tmp_path / "x")
    own, other = gan.generator.state_dict(), source.ema.module.state_dict()
    for name in ("layers.to4.weight", "layers.norm4.weight", "layers.to8.weight"):
        assert torch.equal(own[name], other[name]), name
        assert f" {name}" not in report.split("discriminator")[0]
    for name in ("layers.to16.weight", "layers.rgb32.weight"):
        assert torch.equal(own[name], fresh[name]), name
        assert f" {name}" in report.split("discriminator")[0]


def test_weights_that_do_not_fit_at_all_are_refused(tmp_path: Path):
    saved(SMALL, tmp_path / "x")
    other = replace(SMALL, model=replace(SMALL.model, arch="r3gan", z_dim=5))
    with pytest.raises(UserError, match="same architecture"):
        init_from(GAN(other, CPU), tmp_path / "x")
