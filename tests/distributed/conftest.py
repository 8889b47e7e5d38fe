"""Tests of models that `fully_shard` divides are skipped where torch divides none on a CPU."""

from __future__ import annotations

import pytest
import torch
from worker_cases import DIVIDES_ON_CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DIVIDES_ON_CPU:
        return
    reason = f"`fully_shard` of torch {torch.__version__} needs a GPU"
    for item in items:
        if "sharded" in item.nodeid.partition("tests/distributed/")[2]:
            item.add_marker(pytest.mark.skip(reason=reason))
