from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _isolated(isolated_cache: None) -> None:
    """All tests of metric networks use a cache of their own and no network."""
