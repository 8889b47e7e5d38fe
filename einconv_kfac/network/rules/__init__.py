"""Rewrite rules: each returns a simpler network, or None if it does not apply.

A rule never changes the value, the data type or the shape of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from einconv_kfac.network.network import Network
from einconv_kfac.network.rules.indices import (
    contract_deltas,
    drop_duplicate_deltas,
    drop_units,
    merge_parallel,
    sum_lonely_deltas,
)
from einconv_kfac.network.rules.sums import sum_patterns, unite_patterns
from einconv_kfac.network.rules.windows import (
    crop,
    dense,
    down_sample,
    swap,
    trim_kernel,
    trim_output,
    whole,
)

Rule: TypeAlias = Callable[[Network], Network | None]

RULES: tuple[Rule, ...] = (
    drop_duplicate_deltas,
    sum_lonely_deltas,
    contract_deltas,
    trim_kernel,
    trim_output,
    crop,
    whole,
    dense,
    down_sample,
    swap,
    unite_patterns,
    sum_patterns,
    drop_units,
    merge_parallel,
)
"""All rules, in the order in which they are tried."""
