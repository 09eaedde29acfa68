"""What is kept is what comes back; what is not ours is refused in words."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from catgan.command import UserError
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import _set_rng_state, rng_state
from trainer.checkpoints.storage import Storage
from trainer.config import Config, ModelConfig
from trainer.models import build_generator
from trainer.step import GAN

CONFIG = Config(recipe="tiny", model=ModelConfig(size=16, z_dim=4, g_width=4, d_width=4, max_width=8), batch=4)


def trained(steps: int = 2) -> GAN:
    torch.manual_seed(steps)
    gan = GAN(CONFIG, torch.device("cpu"))
    for i in range(steps):
        gan.step(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), 4 * i)
        gan.ema.update(gan.generator, 4, 4 * i + 4)
    return gan


def save(gan: GAN, folder: Path) -> None:
    extra = {
        "best": None,
        "last_metric": {"name": "fd", "value": 1.0, "kimg": 0.008},
        "run_id": "r",
        "dataset_digest": "d",
    }
    state = {"nimg": 8, "config": gan.config.to_dict(), "rng": [rng_state(gan.device)], **gan.state_dict()}
    Storage(folder.parent).save(folder.name, checkpoint.encode(state | extra))


def test_round_trip_restores_everything(tmp_path: Path):
    gan, other = trained(), trained(0)
    save(gan, tmp_path)
    other.load_state_dict(checkpoint.load(tmp_path))
    for name in ("generator", "discriminator"):
        a, b = getattr(gan, name).state_dict(), getattr(other, name).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    reals = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    results = []
    for g in (gan, other):  # the optimisers' moments came along too: the next step is the same
        torch.manual_seed(5)
        g.step(reals, 8)
        results.append(torch.cat([p.flatten() for p in g.generator.parameters()]))
    assert torch.equal(*results)
    assert gan.num_steps == other.num_steps == 3


def test_random_state_round_trip():
    state = rng_state(torch.device("cpu"))
    first = torch.rand(3)
    _set_rng_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def test_names_sort_by_position(tmp_path: Path):
    for nimg in (2_000_000_000_000, 5_000, 40_000):
        save(trained(0), tmp_path / checkpoint.folder_name(nimg))
    (tmp_path / "checkpoint_latest").mkdir()
    (tmp_path / checkpoint.folder_name(7)).mkdir()  # no state in it
    assert [checkpoint.position(p.name) for p in checkpoint.find_all(tmp_path)] == [5_000, 40_000, 2_000_000_000_000]
    assert checkpoint.find_all(tmp_path / "missing") == []


def forge(folder: Path, state: bytes, **end: object) -> None:
    """A checkpoint of these bytes whose last file is in order, but for ``end``."""
    folder.mkdir(exist_ok=True)
    (folder / "state.pt").write_bytes(state)
    digest = hashlib.sha256(state).hexdigest()
    last = {"format_version": checkpoint.FORMAT_VERSION, "bytes": len(state), "sha256": digest} | end
    (folder / "checkpoint.json").write_text(json.dumps(last))


def test_a_pickle_with_code_is_not_loaded(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    buffer = io.BytesIO()
    torch.save({"format_version": 1, "x": Evil()}, buffer)
    forge(tmp_path, buffer.getvalue())
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_state_is_refused_in_words(tmp_path: Path, content: bytes):
    forge(tmp_path, content)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_every_damage_is_seen(tmp_path: Path):
    folder = tmp_path / checkpoint.folder_name(8)
    save(trained(0), folder)
    whole = (folder / "state.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of a weight, which PyTorch would not notice
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped)):
        (folder / "state.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read: its state\.pt is damaged"):
            checkpoint.load(folder)
    (folder / "state.pt").write_bytes(whole)
    checkpoint.load(folder)
    for damaged in (b"", b"{}", b"[1]", b'{"format_version": 3}'):
        (folder / "checkpoint.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read: its checkpoint\.json is damaged"):
            checkpoint.load(folder)


def test_another_format_version_is_refused(tmp_path: Path):
    forge(tmp_path, b"", format_version=99)
    with pytest.raises(UserError, match="version 99"):
        checkpoint.load(tmp_path)


def test_only_damage_makes_the_checkpoint_before_the_newest(tmp_path: Path):
    """The one after it would be removed in time, though it is good."""
    older, newer = (tmp_path / checkpoint.folder_name(n) for n in (8, 16))
    save(trained(0), older)
    forge(newer, b"", format_version=99)
    with pytest.raises(UserError, match="version 99"):
        Storage(tmp_path).latest()
    forge(newer, b"not what was written", sha256="")
    assert Storage(tmp_path).latest()[0] == older.name
    (newer / "state.pt").unlink()
    assert Storage(tmp_path).latest()[0] == older.name
    (newer / "state.pt").mkdir()  # stands for a disk that does not answer
    with pytest.raises(UserError, match=f"{newer.name} cannot be read"):
        Storage(tmp_path).latest()


def test_generators_come_from_weights_runs_and_checkpoints(tmp_path: Path):
    gan = trained()
    info = {"recipe": "tiny", "kimg": 1.5, "metric": None, "config": CONFIG.to_dict()}
    run = tmp_path / "run"
    Storage(run).write("best/gen.safetensors", checkpoint.encode_generator(gan.ema.module.state_dict(), info))
    save(gan, tmp_path / checkpoint.folder_name(8))
    z = torch.randn(2, 4)
    for path in (run, run / "best", run / "best" / "gen.safetensors", tmp_path, tmp_path / checkpoint.folder_name(8)):
        generator, found = checkpoint.load_generator(path)
        assert torch.equal(generator(z), gan.ema.module(z)), path
        assert not generator.training
        assert found["recipe"] == "tiny"
    assert [p.name for p in (run / "best").iterdir()] == ["gen.safetensors"]


def test_a_checkpoint_of_a_newer_version_is_refused_not_skipped(tmp_path: Path):
    folder = tmp_path / checkpoint.folder_name(8)
    save(trained(), folder)
    state = checkpoint.load(folder)
    state["config"]["loss"]["temperature"] = 0.5
    Storage(tmp_path).save(folder.name, checkpoint.encode(state))
    with pytest.raises(UserError, match=r"000000000008 has a configuration of another version.*temperature") as caught:
        Storage(tmp_path).latest()
    assert not isinstance(caught.value, checkpoint.Damaged)


@pytest.mark.parametrize(("measured_at", "kept"), [(0.008, True), (0.004, False)])
def test_a_checkpoint_has_the_metric_of_its_own_generator_only(tmp_path: Path, measured_at: float, kept: bool):
    """One that was saved out of turn, or past a snapshot that was not evaluated, carries an older one."""
    folder = tmp_path / checkpoint.folder_name(8)
    save(trained(), folder)
    metric = {"name": "fd16_efflite0", "value": 5.0, "kimg": measured_at}
    state = checkpoint.load(folder) | {"nimg": 8, "last_metric": metric}
    Storage(tmp_path).save(folder.name, checkpoint.encode(state))
    _, info = checkpoint.load_generator(folder)
    assert (info["kimg"], info["metric"]) == (0.008, metric if kept else None)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "the header of .* is damaged"),
        ("[]", "the header of .* is damaged"),
        ("[" * 100_000, "the header of .* is damaged"),
        ('{"format_version": 3}', "the configuration in .* does not fit its weights"),
        ('{"format_version": 3, "config": {"model": 1}}', "the configuration in .* does not fit its weights"),
        (
            '{"format_version": 3, "config": {"recipe": "x", "new": 1}}',
            "the configuration in .* does not fit its weights",
        ),
    ],
)
def test_forged_headers_of_weights_are_refused(tmp_path: Path, header: str, message: str):
    save_file({"w": torch.zeros(1)}, tmp_path / "gen.safetensors", metadata={"catgan": header})
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load_generator(tmp_path / "gen.safetensors")
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_shape_are_refused(tmp_path: Path):
    config = trained().config
    info = {"recipe": "x", "kimg": 4, "metric": None, "config": config.to_dict()}
    (tmp_path / "gen.safetensors").write_bytes(checkpoint.encode_generator({"w": torch.zeros(1)}, info))
    with pytest.raises(UserError, match="does not fit its weights") as caught:
        checkpoint.load_generator(tmp_path / "gen.safetensors")
    assert len(str(caught.value).splitlines()) == 1


def test_foreign_weights_are_refused(tmp_path: Path):
    save_file({"w": torch.zeros(1)}, tmp_path / "gen.safetensors")
    with pytest.raises(UserError, match="not written by this program"):
        checkpoint.load_generator(tmp_path / "gen.safetensors")
    (tmp_path / "gen.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a safetensors file"):
        checkpoint.load_generator(tmp_path / "gen.safetensors")
    with pytest.raises(UserError, match="holds no generator"):
        checkpoint.load_generator(tmp_path / "nowhere")


def test_generator_matches_its_config():
    assert build_generator(CONFIG.model).z_dim == 4
