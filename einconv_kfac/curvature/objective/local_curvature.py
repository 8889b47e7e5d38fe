"""The curvature of one term of a loss at the argument of that term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.losses.class_scores import random_classes


class LocalCurvature(Protocol):
    """A positive semi-definite matrix ``H`` over the entries of an argument ``[*a]``.

    Attributes:
        name: What ``H`` is, in a few words.
    """

    name: ClassVar[str]

    @property
    def rows(self) -> torch.Size:
        """The shape of the independent units that ``H`` is block-diagonal over."""

    def support(self) -> Tensor:
        """Return positive numbers where ``H`` has entries, and zeros elsewhere, ``[*a]``."""

    def sample(self, generator: Generator) -> Tensor:
        """Draw a vector ``s [*a]`` with second moment ``H``, independent between units."""

    def roots(self) -> Iterator[Tensor]:
        """Yield vectors ``s [*a]`` whose outer products sum to ``H`` within each unit."""

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """Return a vector ``[*a]`` that is zero outside the units that a mask keeps."""

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ``u_i.H.u_j`` for vectors ``u_i [*a]``, ``[m, m]`` in float64."""


@dataclass(frozen=True)
class Diagonal:
    """A diagonal matrix, as of a sum over entries.

    Args:
        values: The diagonal, ``[*a]``, not negative.
        is_whole: Whether zeros are all the curvature there is, as far off in a loss of Huber.
    """

    name: ClassVar[str] = "the Hessian, a diagonal"

    values: Tensor
    is_whole: bool = False

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.values.shape

    def support(self) -> Tensor:
        """See `LocalCurvature`."""
        return torch.ones_like(self.values) if self.is_whole else self.values

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; random signs."""
        return self.values.sqrt() * _signs(self.values.shape, self.values, generator)

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`."""
        yield self.values.sqrt()

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(kept, 0)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        left = torch.stack([vector.flatten() for vector in vectors]).double()
        return (left * self.values.flatten().double()) @ left.mT


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal matrix ``R R^T`` over the last dimensions.

    Args:
        shape: The shape of the argument, ``[*r, *d]``.
        factors: ``R``, ``[*r, d, d]``.
    """

    name: ClassVar[str] = "the Hessian, in blocks"

    shape: torch.Size
    factors: Tensor

    @staticmethod
    def of(blocks: Tensor, shape: torch.Size, tolerance: float) -> Blocks | None:
        """Return blocks ``[*r, d, d]``, or ``None`` if one is not positive semi-definite.

        Args:
            blocks: The blocks, which are symmetric up to rounding.
            shape: The shape of the argument.
            tolerance: Negative eigenvalues, relative to the largest, that are attributed to
                rounding.
        """
        values, vectors = torch.linalg.eigh((blocks + blocks.mT).double() / 2)
        if bool(values.min() < -tolerance * values.max()):
            return None
        factors = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return Blocks(shape, factors.to(blocks.dtype))

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.factors.shape[:-2]

    def support(self) -> Tensor:
        """See `LocalCurvature`."""
        return self.factors.square().sum(-1).reshape(self.shape)

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; random signs."""
        signs = _signs(self.factors.shape[:-1], self.factors, generator)
        return (self.factors @ signs.unsqueeze(-1)).reshape(self.shape)

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`; the columns of ``R``."""
        for column in self.factors.unbind(-1):
            yield column.reshape(self.shape)

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(kept.reshape(*kept.shape, *[1] * (root.ndim - kept.ndim)), 0)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        factors = self.factors.double()
        own = [v.double().reshape(*self.rows, 1, factors.shape[-2]) @ factors for v in vectors]
        left = torch.stack([each.flatten() for each in own])
        return left @ left.mT


@dataclass(frozen=True)
class Categorical:
    """``w (diag(p) - p p^T)`` for each distribution ``p`` along one dimension.

    Args:
        p: The probabilities, ``[*a]``.
        weight: The factor ``w`` of each distribution, ``[*a]`` with size 1 in that dimension.
        dim: The dimension of the classes.
    """

    name: ClassVar[str] = "the Hessian of a cross entropy"

    p: Tensor
    weight: Tensor
    dim: int

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.weight.squeeze(self.dim).shape

    def support(self) -> Tensor:
        """See `LocalCurvature`."""
        return self.p * self.weight

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; ``sqrt(w) (p - onehot)`` for classes drawn from ``p``."""
        return (self.p - self._drawn(generator)) * self.weight.sqrt()

    def _drawn(self, generator: Generator) -> Tensor:
        """Return one-hot vectors of classes drawn from ``p``, in its layout."""
        last = self.p.movedim(self.dim, -1)
        rows = last.reshape(-1, last.shape[-1])
        drawn = random_classes(rows.double(), generator).unsqueeze(1)
        onehot = torch.zeros_like(rows).scatter_(1, drawn, 1.0)
        return onehot.reshape(last.shape).movedim(-1, self.dim)

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`; ``sqrt(w p_v) (onehot_v - p)`` for each class ``v``."""
        for v in range(self.p.shape[self.dim]):
            root = -self.p
            root.select(self.dim, v).add_(1)
            own = self.p.select(self.dim, v).unsqueeze(self.dim)
            yield root * (self.weight * own).sqrt()

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(kept.unsqueeze(self.dim), 0)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        weight, p = self.weight.double(), self.p.double()
        centred = [v.double() - (p * v).sum(self.dim, keepdim=True) for v in vectors]
        left = torch.stack([(weight * p * c).flatten() for c in centred])
        return left @ torch.stack([c.flatten() for c in centred]).mT


@dataclass(frozen=True)
class Probabilities(Categorical):
    """``w diag(1 / p)`` for the results ``p`` of a softmax; by the scores it is `Categorical`."""

    name: ClassVar[str] = "the Fisher information of classes"

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; ``-sqrt(w) onehot / p`` for classes drawn from ``p``."""
        return -self._drawn(generator) * self._divided(self.weight.sqrt())

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`; ``sqrt(w / p_v) onehot_v`` for each class ``v``."""
        values = self._divided(self.weight).sqrt()
        for v in range(self.p.shape[self.dim]):
            root = torch.zeros_like(self.p)
            root.select(self.dim, v).copy_(values.select(self.dim, v))
            yield root

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        return Diagonal(self._divided(self.weight)).products(vectors)

    def _divided(self, weight: Tensor) -> Tensor:
        """Return a factor of each distribution divided by ``p``; zero where that is zero."""
        return (weight / self.p).where(self.p > 0, 0)


@dataclass(frozen=True)
class Empirical:
    """The empirical Fisher ``n sum_i g_i g_i^T / s`` of a mean over ``n`` examples.

    Args:
        gradient: The gradient of the loss, ``[n, *f]``; example ``i`` has the row ``g_i``.
        scale: ``s``, the loss if it is not negative by its form; 1 by default.
        is_one: Whether the gradient ``[*f]`` is that of one example.
    """

    name: ClassVar[str] = "the empirical Fisher"

    gradient: Tensor
    scale: Tensor | None = None
    is_one: bool = False

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.gradient.shape[: not self.is_one]

    def support(self) -> Tensor:
        """See `LocalCurvature`."""
        return self.gradient.abs()

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; a random sign per example."""
        (root,) = self.roots()
        signs = _signs(self.rows, root, generator)
        return root * self._like_rows(signs, root)

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`."""
        rows = torch.tensor(float(self.rows.numel()))
        factor = rows if self.scale is None else rows.to(self.scale.device) / self.scale
        yield self.gradient * factor.sqrt().to(self.gradient.dtype)

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(self._like_rows(kept, root), 0)

    def _like_rows(self, numbers: Tensor, root: Tensor) -> Tensor:
        """Return a number for each example, to be multiplied with a vector."""
        return numbers.reshape(*self.rows, *[1] * (root.ndim - len(self.rows)))

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        (root,) = self.roots()
        entries = [(root * v).double().unsqueeze(-1) for v in vectors]
        entries = [each.unsqueeze(0) if self.is_one else each for each in entries]
        by_example = [each.flatten(1).sum(1) for each in entries]
        left = torch.stack(by_example)
        return left @ left.mT


def _signs(shape: torch.Size, like: Tensor, generator: Generator) -> Tensor:
    """Return random signs on the device of a tensor and in its data type."""
    drawn = torch.randint(2, shape, generator=generator, device=like.device)
    return (2 * drawn - 1).to(like.dtype)
