"""The kinds of a layer's calls; all calls of one kind have the same layout of examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.example_layout import candidates

Signature: TypeAlias = tuple[object, ...]


def signatures_of(calls: Sequence[LayerCall], examples: int) -> list[Signature]:
    """Return what identifies the kind of each call: layer, number, and possible layouts."""
    counts: dict[str, int] = defaultdict(int)
    found: list[Signature] = []
    for call in calls:
        possible = candidates(call.x.shape, call.y_shape, examples)
        found.append((call.layer, counts[call.layer], call.x.ndim, examples > 1, *possible))
        counts[call.layer] += 1
    return found
