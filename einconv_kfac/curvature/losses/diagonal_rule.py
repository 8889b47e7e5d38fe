"""Losses whose curvature at the output is a diagonal matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.losses.loss_rule import TorchLossRule


class DiagonalRule(TorchLossRule):
    """A loss whose Hessian or Fisher information at the output is diagonal.

    Samples are random signs times the root of the diagonal: they have the second moment of
    sampled targets and less variance.
    """

    @abstractmethod
    def diagonal(
        self, loss: Any, output: Tensor, target: Any, weights: Tensor | None = None
    ) -> Tensor:
        """Return the diagonal, ``[n, *f]``, in at least float32; no entry is negative.

        Args:
            loss: The loss.
            output: The output, ``[n, *f]``.
            target: Its target, or a tuple of several.
            weights: See `WeightedLossRule`.
        """

    def roots(
        self, loss: Any, output: Tensor, target: Any, weights: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the root of the diagonal, one entry of every example at a time."""
        root = self._root(loss, output, target, weights)
        root = root.reshape(output.shape[0], output.shape[1:].numel())
        for entry in range(root.shape[1]):
            part = torch.zeros_like(root)
            part[:, entry] = root[:, entry]
            yield part.reshape(output.shape)

    def sample(
        self,
        loss: Any,
        output: Tensor,
        target: Any,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the root of the diagonal with random signs."""
        return _with_signs(self._root(loss, output, target, weights), generator)

    def samples(
        self, loss: Any, output: Tensor, target: Any, generator: Generator
    ) -> Iterator[Tensor]:
        """See `TorchLossRule`; the root is computed once, unless a subclass samples otherwise."""
        if type(self).sample is not DiagonalRule.sample:
            yield from super().samples(loss, output, target, generator)
        root = self._root(loss, output, target, None)
        while True:
            yield _with_signs(root, generator)

    def _root(self, loss: Any, output: Tensor, target: Any, weights: Tensor | None) -> Tensor:
        """Return the root of the diagonal in the data type of the output."""
        return self.diagonal(loss, output, target, weights).sqrt().to(output.dtype)

    def closed_product(self, loss: Any, output: Tensor, target: Any, v: Tensor) -> Tensor | None:
        """See `TorchLossRule`."""
        diagonal = self.diagonal(loss, output, target)
        return diagonal * v.to(diagonal)


def _with_signs(root: Tensor, generator: Generator) -> Tensor:
    """Return a tensor with random signs."""
    signs = torch.randint(2, root.shape, generator=generator, device=root.device)
    return root * (2 * signs - 1)
