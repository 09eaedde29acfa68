"""Fréchet distances against closed forms and scipy's matrix square root; moments against NumPy."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from catgan.command import UserError
from trainer.metrics.frechet import Gaussian, Moments, frechet_distance


def gaussian(mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    return Gaussian(np.asarray(mean, float), np.asarray(cov, float), None)


def random_rotation(dim: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


def of_rows(rows: np.ndarray) -> Gaussian:
    return Gaussian(rows.mean(0), np.cov(rows, rowvar=False), len(rows))


def test_one_dimension():
    """(3 - 1)^2 + (sqrt(9) - sqrt(4))^2"""
    assert frechet_distance(gaussian([3], [[9]]), gaussian([1], [[4]])) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("dim", [2, 50])
def test_scaled_identities(dim: int):
    a, b = gaussian(np.zeros(dim), 4 * np.eye(dim)), gaussian(np.full(dim, 0.5), 0.25 * np.eye(dim))
    assert frechet_distance(a, b) == pytest.approx(dim * (0.25 + 1.5**2), rel=1e-12)


def test_equal_covariances():
    rng = np.random.default_rng(0)
    cov = np.cov(rng.standard_normal((100, 20)), rowvar=False)
    mean = rng.standard_normal(20)
    assert frechet_distance(gaussian(mean, cov), gaussian(mean + 2, cov)) == pytest.approx(80, rel=1e-9)


def test_commuting_covariances():
    rng = np.random.default_rng(0)
    rotation, a, b = random_rotation(30, rng), rng.uniform(0, 5, 30), rng.uniform(0, 5, 30)
    distance = frechet_distance(
        gaussian(np.zeros(30), rotation * a @ rotation.T), gaussian(np.zeros(30), rotation * b @ rotation.T)
    )
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_any_covariances_agree_with_the_matrix_square_root(seed: int):
    rng = np.random.default_rng(seed)
    a, b = (of_rows(rng.standard_normal((200, 40)) @ rng.standard_normal((40, 40))) for _ in range(2))
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_fewer_features_than_dimensions():
    """For singular covariances X'X and Y'Y the trace of the square root is the nuclear norm of XY'."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-3, 300)
    rows = [rng.standard_normal((num, 300)) * scales for num in (40, 60)]
    a, b = map(of_rows, rows)
    x, y = ((r - r.mean(0)) / np.sqrt(len(r) - 1) for r in rows)
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num", [20, 500])
def test_the_distance_to_itself_is_zero(num: int):
    a = of_rows(np.random.default_rng(0).standard_normal((num, 64)))
    assert 0 <= frechet_distance(a, a) < 1e-6 * np.trace(a.cov)


def test_moments_do_not_depend_on_batches():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((103, 12)) @ rng.standard_normal((12, 12)) + 100).astype(np.float32)
    moments = Moments(12)
    for batch in np.array_split(rows, [1, 50, 50, 57]):
        moments.update(torch.from_numpy(batch))
    got = moments.gaussian()
    assert got.n == 103
    np.testing.assert_allclose(got.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(got.cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)


def _rows() -> torch.Tensor:
    return torch.randn(31, 7, generator=torch.Generator().manual_seed(0))


def _rank(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    moments = Moments(7)
    moments.update(_rows()[:20] if rank == 0 else _rows()[20:])
    moments.all_reduce()
    moments.gaussian().save(Path(folder) / f"{rank}.npz")
    dist.destroy_process_group()


@pytest.mark.slow
def test_moments_of_ranks_equal_those_of_one_process(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (2, port, str(tmp_path)), 2)
    alone = of_rows(_rows().double().numpy())
    for rank in range(2):
        got = Gaussian.load(tmp_path / f"{rank}.npz")
        assert got.n == 31
        np.testing.assert_allclose(got.mean, alone.mean, rtol=1e-12)
        np.testing.assert_allclose(got.cov, alone.cov, rtol=1e-9, atol=1e-12)


def test_statistics_are_saved_and_loaded(tmp_path: Path):
    a = of_rows(np.random.default_rng(0).standard_normal((20, 5)))
    a.save(tmp_path / "a.npz")
    b = Gaussian.load(tmp_path / "a.npz")
    assert b.n == 20
    assert np.array_equal(a.mean, b.mean)
    assert np.array_equal(a.cov, b.cov)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_files_of_pytorch_fid_have_no_n(tmp_path: Path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert Gaussian.load(tmp_path / "theirs.npz").n is None


def _write_not_numpy(path: Path) -> None:
    path.write_text("mu, sigma")


def _write_empty(path: Path) -> None:
    path.touch()


def _write_one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.eye(3))


def _write_truncated(path: Path) -> None:
    np.savez(path, mu=np.zeros(30), sigma=np.eye(30))
    path.write_bytes(path.read_bytes()[:3000])


def _write_pickle(path: Path) -> None:
    np.savez(path, mu=np.array([{}, {}]), sigma=np.eye(2))


def _write_without_sigma(path: Path) -> None:
    np.savez(path, mu=np.zeros(3))


def _write_other_shapes(path: Path) -> None:
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))


def _write_nan(path: Path) -> None:
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))


@pytest.mark.parametrize(
    "write",
    [
        _write_not_numpy,
        _write_empty,
        _write_one_array,
        _write_truncated,
        _write_pickle,
        _write_without_sigma,
        _write_other_shapes,
        _write_nan,
    ],
)
def test_other_files_are_rejected(write, tmp_path: Path):
    write(tmp_path / "bad.npz")
    with pytest.raises(UserError, match=r"bad\.npz"):
        Gaussian.load(tmp_path / "bad.npz")
