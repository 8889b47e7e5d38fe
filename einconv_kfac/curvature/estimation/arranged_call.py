"""A call of a layer, arranged so that its first dimension is that of the examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.example_layout import (
    FIRST,
    SCATTERED,
    ExampleLayout,
    calls_of,
    parts,
)


@dataclass(frozen=True)
class ArrangedCall:
    """A call of a layer, with its examples in the first dimension.

    Args:
        call: The call.
        layout: Its layout, ``None`` if its rows are shared between examples.
        by_example: Whether shared rows are given a gradient for each example, instead of one of
            all examples together.
        examples: The number of examples.
        is_scattered: Whether rows belong to unknown examples, in this call or in another one of
            its layer.
    """

    call: LayerCall
    layout: ExampleLayout | None
    by_example: bool
    examples: int
    is_scattered: bool = False

    @property
    def is_regular(self) -> bool:
        """Whether rows have a regular order of examples."""
        return self.layout not in (SCATTERED, None)

    @property
    def is_shared(self) -> bool:
        """Whether gradients for single examples are needed."""
        return self.layout is None and self.by_example

    @property
    def is_together(self) -> bool:
        """Whether one row of calls stands for all examples together."""
        return self.layout == SCATTERED or (self.layout is None and not self.by_example)

    @property
    def weight(self) -> int:
        """The number of examples that share each row, where `is_together`."""
        return 1 if self.layout == SCATTERED else self.examples

    def is_like(self, other: ArrangedCall) -> bool:
        """Return whether the examples of another arrangement of the call are the same."""
        own, theirs = ((a.layout, a.by_example, a.is_scattered) for a in (self, other))
        return own == theirs

    @cached_property
    def calls(self) -> list[LayerCall]:
        """The call as calls with ``[n, ...]``, or ``[1, ...]`` for all examples together."""
        if self.layout == FIRST:
            return [self.call]
        like = torch.empty(self.call.y_shape, device="meta")
        pairs = zip(self._parts(self.call.x), self._parts(like))
        return [replace(self.call, x=x, y_shape=y.shape) for x, y in pairs]

    def gradients(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """Return gradients for each of these calls, those of several roots one after the other.

        Args:
            gradients: The gradient at the call for each root, ``[*y]``; that of each example alone,
                ``[n, *y]``, where `is_shared`.
        """
        split = self._split if self.is_shared else self._parts
        several = zip(*(split(gradient) for gradient in gradients))
        return [own[0] if len(own) == 1 else torch.cat(own) for own in several]

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        """Return a tensor of the call for each of these calls."""
        if self.layout is not None:
            return parts(tensor, self.layout, self.examples, self.call.row_dim)
        count = self.examples if self.by_example else 1
        return self._split(tensor.unsqueeze(0).expand(count, *tensor.shape))

    def _split(self, tensor: Tensor) -> list[Tensor]:
        """Return shared rows ``[n, rows, ...]`` for each of these calls."""
        return calls_of(tensor, self.call.row_dim)


def by_layer(arranged: Sequence[ArrangedCall]) -> dict[str, list[ArrangedCall]]:
    """Return the calls by the name of their layer."""
    result: dict[str, list[ArrangedCall]] = defaultdict(list)
    for each in arranged:
        result[each.call.layer].append(each)
    return result
