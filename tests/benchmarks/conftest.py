"""Benchmarks measure time: they run only where they were asked for, with ``-m benchmark``."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "benchmark" in config.getoption("-m") and "not benchmark" not in config.getoption("-m")
    for item in items:
        # The hook sees the whole session's tests, not only this folder's.
        if Path(__file__).parent in item.path.parents and not asked:
            item.add_marker(pytest.mark.skip(reason="a benchmark; run with -m benchmark"))
