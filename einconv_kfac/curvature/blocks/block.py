"""The protocol of one layer's block of curvature."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Generator, Tensor

from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout


class Block(Protocol):
    """One layer's block of curvature: a symmetric matrix per channel group, immutable.

    It acts on matrices ``[*v, g, co, d]``, which its layout makes of the layer's parameters.
    """

    @property
    def layout(self) -> Layout:
        """The parameters, and how they form matrices."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weight and, if it has one, the bias."""

    @property
    def terms(self) -> tuple[Block, ...]:
        """The blocks whose sum this is; the block itself if it is not a sum."""

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the product with matrices ``[*v, g, co, d]``."""

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[g, co, d]``."""

    def trace(self) -> Tensor:
        """Return the trace, summed over groups."""

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm over all groups."""

    def eigh(self) -> EigenBlock:
        """Return the eigendecomposition."""

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues ``[g, co, d]``, unordered."""

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(block + damping I)``, summed over groups."""

    def inverse(self, damping: float, exact: bool = True) -> Block:
        """Return ``(block + damping I)^-1``, or its factored approximation if not ``exact``."""

    def sample(
        self, count: int, *, damping: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """Draw ``[count, g, co, d]`` from the Gaussian with precision ``block + damping I``."""

    def scaled(self, factor: float) -> Block:
        """Return the block times a number."""

    def to(self, *args: Any, **kwargs: Any) -> Block:
        """Return the block on another device or with another dtype, as ``Tensor.to``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the fields by name, as tensors, numbers and names."""
