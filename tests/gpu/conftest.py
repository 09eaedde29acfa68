"""Tests on a CUDA GPU: ``make gpu``. They need the packages that the Makefile names; a test that needs another one
skips where it is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The GPU, with float32 that is not TF32; settings of PyTorch that a test changes are restored."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    yield torch.device("cuda", 0)
    torch.cuda.set_sync_debug_mode("default")
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.cuda.empty_cache()
