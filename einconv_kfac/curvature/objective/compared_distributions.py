"""The curvature of a loss that compares entries of distributions, by the scores of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class ComparedDistributions:
    """``P^T M P`` for ``K`` tensors of scores with probabilities ``p``, side by side.

    ``P`` takes the mean by ``p`` from every tensor of scores; ``M = R R^T`` has a block
    ``[K, K]`` for each entry. With ``M = diag(w p)`` it is the Hessian of cross entropies.

    Args:
        p: The probabilities, ``[*a, K]``.
        factors: ``R``, ``[*a, K, K]``.
        dim: The dimension of the classes, not negative.
        by_scores: Whether the argument is scores; else it is probabilities, and ``P`` divides
            them by ``p``.
    """

    name: ClassVar[str] = "the Hessian or a Gauss-Newton matrix, by scores of classes"

    p: Tensor
    factors: Tensor
    dim: int
    by_scores: bool

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.p.select(-1, 0).select(self.dim, 0).shape

    def support(self) -> Tensor:
        """See `LocalCurvature`."""
        return self.factors.square().sum(-1)

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`; random signs."""
        signs = torch.randint(2, self.p.shape, generator=generator, device=self.p.device)
        signed = self.factors @ (2 * signs - 1).to(self.factors.dtype).unsqueeze(-1)
        return self._transposed(signed.squeeze(-1))

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`; one for each class and column of ``R``."""
        for v in range(self.p.shape[self.dim]):
            for column in range(self.p.shape[-1]):
                root = torch.zeros_like(self.p)
                own = self.factors[..., column].select(self.dim, v)
                root.select(self.dim, v).copy_(own)
                yield self._transposed(root)

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(kept.unsqueeze(self.dim).unsqueeze(-1), 0)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        p, factors = self.p.double(), self.factors.double()
        own = []
        for vector in vectors:
            v = vector.double()
            v = v - (p * v).sum(self.dim, keepdim=True) if self.by_scores else _divided(v, p)
            own.append((factors.mT @ v.unsqueeze(-1)).flatten())
        left = torch.stack(own)
        return left @ left.mT

    def _transposed(self, root: Tensor) -> Tensor:
        """Return ``P^T r``."""
        if not self.by_scores:
            return _divided(root, self.p)
        return root - self.p * root.sum(self.dim, keepdim=True)


def _divided(values: Tensor, p: Tensor) -> Tensor:
    """Return values divided by probabilities; zero where these are zero."""
    return (values / p).where(p > 0, 0)
