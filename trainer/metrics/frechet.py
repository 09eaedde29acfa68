"""The Fréchet distance between Gaussians, and streaming sums to compute their means and covariances."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from catgan.command import UserError
from catgan.files import atomic_path
from trainer.distributed.collectives import sum_over_ranks


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean float64 ``[d]`` and unbiased covariance float64 ``[d, d]`` of ``n`` features (None: unknown)."""

    mean: np.ndarray
    cov: np.ndarray
    n: int | None

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> np.ndarray:
        """A matrix ``L`` with ``L @ L.T == cov``. The covariance may be singular (fewer features than dimensions)."""
        values, vectors = np.linalg.eigh(self.cov)
        return vectors * np.sqrt(values.clip(min=0.0))

    def save(self, path: Path) -> None:
        """Write an .npz file with ``mu`` and ``sigma``, as pytorch-fid names them, and ``n``; atomic.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {"mu": self.mean, "sigma": self.cov}
        if self.n is not None:
            arrays["n"] = np.asarray(self.n)
        with atomic_path(path) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """Read a file written by ``save`` or by ``pytorch-fid --save-stats`` (which has no ``n``).

        Raises:
            UserError: the file has another format, or values that are not finite.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, cov = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
                n = int(file["n"]) if "n" in file else None
        except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, zipfile.BadZipFile):
            raise UserError(
                f"{path} is not an .npz of statistics (mu, sigma): make it with pytorch-fid --save-stats"
            ) from None
        if (
            mean.ndim != 1
            or cov.shape != (len(mean), len(mean))
            or not (np.isfinite(mean).all() and np.isfinite(cov).all())
        ):
            raise UserError(f"{path}: mu {mean.shape} and sigma {cov.shape} are not a finite mean and covariance")
        return cls(mean, cov, n)


class Moments:
    """Count, sum and sum of outer products of features, in float64, over any number of batches and ranks.

    All three are parts of one tensor, so that one reduction combines the ranks.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._packed = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)
        self.dim = dim

    @property
    def n(self) -> int:
        return int(self._packed[0].item())

    def update(self, features: Tensor) -> None:
        """Add features ``[n, dim]``."""
        assert features.shape[1:] == (self.dim,), (features.shape, self.dim)
        rows = features.to(self._packed)
        self._packed[0] += len(rows)
        self._packed[1 : 1 + self.dim] += rows.sum(0)
        self._packed[1 + self.dim :].view(self.dim, self.dim).addmm_(rows.T, rows)

    def all_reduce(self) -> None:
        """Combine the moments of all ranks; afterwards every rank has those of all features."""
        self._packed = sum_over_ranks(self._packed)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of at least 2 features."""
        n = self.n
        assert n >= 2, n
        packed = self._packed.cpu().numpy()
        mean = packed[1 : 1 + self.dim] / n
        outer = packed[1 + self.dim :].reshape(self.dim, self.dim)
        return Gaussian(mean, (outer - n * np.outer(mean, mean)) / (n - 1), n)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))`` (Dowson and Landau, 1982; as FID: Heusel
    et al., 2017).

    With ``C_a = L L^T`` the eigenvalues of ``C_a C_b`` are those of the symmetric ``L^T C_b L``, so no matrix square
    root, with its imaginary rounding errors, is needed (torch-fidelity#54, scipy#20178). ``L`` is cached in ``a``: pass
    the Gaussian that is used repeatedly, the real one, first. A distance that rounding makes negative becomes 0.
    """
    assert a.dim == b.dim, (a.dim, b.dim)
    product = a.factor.T @ b.cov @ a.factor
    values = np.linalg.eigvalsh((product + product.T) / 2)
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(values.clip(min=0.0)).sum()
    return max(float(distance), 0.0)
