"""Random vectors at the outputs of a model, which show the layout of each call's examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.late_numbers import LateNumbers
from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.example_layout import (
    FIRST,
    SCATTERED,
    ExampleLayout,
    candidates,
    only,
)
from einconv_kfac.curvature.estimation.random_vectors import random_vectors
from einconv_kfac.curvature.estimation.row_owners import Check, is_other

SHARED_PART = 0.25
"""Least part of the gradients of two examples that meets in the same rows, if they share these."""

MIXING_RATIO = 2.0
"""Least ratio of the gradient in an example's own row to that in the row of another, for layers
that mix examples, such as batch normalisation."""

_TINY = torch.finfo(torch.float64).tiny


def probes(outputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield random vectors at the outputs, of the first and of the second example alone.

    Args:
        outputs: See `random_vectors`.
    """
    drawn = random_vectors(outputs)
    for example in range(2):
        yield [only(vector, example) for vector in drawn]


def bit_probes(
    outputs: Sequence[Tensor], examples: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield, for each bit of the examples' numbers, vectors of those with and without it."""
    drawn = random_vectors(outputs, seed=1)
    for bit in range((examples - 1).bit_length()):
        yield _of_bit(drawn, bit, 1), _of_bit(drawn, bit, 0)


def _of_bit(vectors: Sequence[Tensor], bit: int, value: int) -> list[Tensor]:
    """Return vectors ``[n, ...]`` that are zero for examples with another bit in their number."""
    own = []
    for vector in vectors:
        if not vector.ndim:  # of all examples
            own.append(vector)
            continue
        numbers = torch.arange(len(vector), device=vector.device)
        mask = ((numbers >> bit) & 1 == value).reshape(-1, *[1] * (vector.ndim - 1))
        own.append(torch.where(mask, vector, torch.zeros_like(vector)))
    return own


@dataclass(frozen=True)
class Probed:
    """A call, and the gradients at its output for the two `probes`.

    Args:
        call: The call.
        gradients: The gradients; ``None`` where no graph leads to the call.
        examples: The number of examples.
        checks: The gradients for random vectors of all examples.
    """

    call: LayerCall
    gradients: Sequence[Tensor | None]
    examples: int
    checks: Sequence[Check] = ()

    @property
    def possible(self) -> list[ExampleLayout]:
        """The layouts that the call can have."""
        return candidates(self.call.x.shape, self.call.y_shape, self.examples)

    def known(self) -> list[Tensor]:
        """Return the gradients, zero where there are none."""
        like = self.call.x
        return [
            torch.zeros(self.call.y_shape, device=like.device) if g is None else g
            for g in self.gradients
        ]

    def shares(self) -> list[Tensor]:
        """Return numbers that decide on the layout, as far as it is regular.

        For each possible layout and each gradient these are its `_shares`; where no layout is
        possible, whether each gradient has entries that are not zero.
        """
        gradients = self.known()
        if not self.possible:
            return [gradient.any().double().reshape(1) for gradient in gradients]
        return [
            _shares(e, gradient, self.examples) for e in self.possible for gradient in gradients
        ]

    def others(self) -> list[Tensor]:
        """Return for each possible layout whether all examples show rows of others, ``[1]``."""
        found: list[Tensor] = []
        for layout in self.possible if self.checks else ():
            flags = [
                is_other(layout, one, two, powers)
                for powers, one, two in self.checks
                if one is not None and two is not None
            ]
            wrong = torch.stack(flags).any() if flags else torch.zeros(1, device=self.call.x.device)
            found.append(wrong.double().reshape(1))
        return found

    def overlap(self) -> Tensor:
        """Return the part of the gradients of two examples that meets in the same rows."""
        rows = -1 if self.call.row_dim == 1 else 1
        first, second = [_row_shares(gradient, rows) for gradient in self.known()]
        return torch.minimum(first, second).sum().reshape(1)


class AskedLayouts:
    """Layouts of calls, of which the device was asked for the numbers that decide on them.

    Args:
        probed: The calls.
        mixes: Whether the model normalises over the batch, so that rows of other examples have
            gradients as well.
    """

    def __init__(self, probed: Sequence[Probed], *, mixes: bool) -> None:
        self._probed, self._mixes = probed, mixes
        parts = [(*own.shares(), *own.others()) for own in probed]
        self._numbers = _Numbers([part for own in parts for part in own])

    def are_of(self, calls: Sequence[LayerCall]) -> bool:
        """Return whether they are those of these calls."""
        own = [each.call for each in self._probed]
        return len(own) == len(calls) and all(a is b for a, b in zip(own, calls))

    def read(self) -> list[tuple[bool, ExampleLayout | None]]:
        """Return whether a probe reached each call, and its layout.

        The layout is ``None`` if rows are shared between examples. The host waits a second time if
        a call has no regular layout.
        """
        numbers = iter(self._numbers.read())
        regular: list[tuple[bool, ExampleLayout | None]] = []
        for own in self._probed:
            count = max(len(own.possible), 1)
            shares = [[next(numbers) for _ in own.gradients] for _ in range(count)]
            reached = any(total != 0 for total, *_ in shares[0])
            flags = [bool(own.checks) and next(numbers)[0] != 0 for _ in own.possible]
            pairs = zip(own.possible, shares, flags)
            possible = [(layout, share) for layout, share, is_wrong in pairs if not is_wrong]
            regular.append((reached, _regular(possible, mixes=self._mixes)))
        others = [own for own, (reached, e) in zip(self._probed, regular) if reached and e is None]
        overlaps = iter(_Numbers([own.overlap() for own in others]).read())

        def layout(reached: bool, known: ExampleLayout | None) -> ExampleLayout | None:
            if known is not None or not reached:
                return known
            return None if next(overlaps)[0] >= SHARED_PART else SCATTERED

        return [(reached, layout(reached, e)) for reached, e in regular]


def _regular(
    possible: Sequence[tuple[ExampleLayout, Sequence[list[float]]]], *, mixes: bool
) -> ExampleLayout | None:
    """Return the layout of a call whose examples have rows of their own, ``None`` for others.

    Args:
        possible: The layouts that it can have, with the `_shares` of the two gradients.
        mixes: See `AskedLayouts`.
    """
    for layout, pair in possible:
        if all(total - own[i] <= 0 for i, (total, *own) in enumerate(pair)):
            return layout
    if not possible or possible[0][0] != FIRST:
        return None
    first, second = [[part / max(total, _TINY) for part in own] for total, *own in possible[0][1]]
    is_own = first[0] > MIXING_RATIO * second[0] and second[1] > MIXING_RATIO * first[1]
    return FIRST if mixes or is_own else None


class _Numbers:
    """Entries of vectors, all of which the host reads at once.

    Args:
        parts: The vectors.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._sizes = [len(part) for part in parts]
        own = [part.to(parts[0].device) for part in parts]
        joined = torch.cat(own) if own else torch.empty(0)
        self._joined = LateNumbers(joined) if joined.is_cuda else joined

    def read(self) -> list[list[float]]:
        """Return the entries of each vector."""
        late = self._joined
        own = iter(late.read() if isinstance(late, LateNumbers) else late.tolist())
        return [[next(own) for _ in range(size)] for size in self._sizes]


def meets(call: LayerCall, one: Tensor, other: Tensor) -> bool:
    """Return whether two gradients at a call are nonzero in the same rows."""
    rows = -1 if call.row_dim == 1 else 1
    return bool(torch.minimum(_row_shares(one, rows), _row_shares(other, rows)).any())


def _row_shares(gradient: Tensor, end: int) -> Tensor:
    """Return the part of each row, ``shape[:end]``, in a squared gradient."""
    squares = gradient.detach().double().abs().square()
    rows = squares.reshape(*squares.shape[:end], -1).sum(-1).flatten()
    return rows / rows.sum().clamp_min(_TINY)


def _shares(layout: ExampleLayout, gradient: Tensor, examples: int) -> Tensor:
    """Return the sum of squares of a gradient, and the parts of the first two examples, ``[3]``."""
    rows = layout.by_example(gradient, examples).double().abs().square()
    own = rows.flatten(1).sum(1)
    return torch.cat([own.sum().reshape(1), own[:2]])
