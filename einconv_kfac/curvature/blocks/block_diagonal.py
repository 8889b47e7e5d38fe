"""The curvature of a model as a block-diagonal operator, by names of layers and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.arguments import described, plain, shown
from einconv_kfac.curvature.blocks.block import Block
from einconv_kfac.curvature.blocks.block_state import BLOCKS, block_of, check_block
from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.blocks.own_precision import in_own_precision
from einconv_kfac.curvature.blocks.sums import added, pooled_block

CURVATURE_STATE_VERSION = 1
"""Version of the format of `KroneckerFactors.state_dict`."""


@in_own_precision
class KroneckerFactors(Mapping[str, Any]):
    """Curvature of a model by layer name: an immutable, block-diagonal operator.

    Vectors are mappings from parameter names to tensors ``[*v, *shape]``, with any leading
    dimensions ``v``. Parameters that no block covers are not part of the operator.

    Args:
        blocks: A block per layer: `KroneckerBlock`, `EigenBlock`, `SumBlock`.

    >>> from einconv_kfac.curvature import KroneckerBlock, Layout
    >>> layout = Layout("fc.weight", None, (2, 3), (1, 2, 3), (0, 1, 2))
    >>> block = KroneckerBlock(torch.eye(3)[None], 2 * torch.eye(2)[None], layout)
    >>> curvature = KroneckerFactors({"fc": block})
    >>> (curvature @ {"fc.weight": torch.ones(2, 3)})["fc.weight"]
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    >>> curvature.inverse(damping=2.0)["fc"].values
    tensor([[[0.2500, 0.2500, 0.2500],
             [0.2500, 0.2500, 0.2500]]])
    """

    __array_ufunc__ = None  # numbers of NumPy multiply it from the left

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        if not isinstance(blocks, Mapping):
            raise TypeError(f"`blocks` must be a mapping of layers, got {described(blocks)}.")
        for name, block in blocks.items():
            if not isinstance(block, BLOCKS):
                kinds = ", ".join(kind.__name__ for kind in BLOCKS)
                raise TypeError(
                    f"`blocks` must have values of {kinds}, got {described(block)} for {name!r}."
                )
            check_block(name, block)
        self._blocks = dict(blocks)

    def __getitem__(self, name: str) -> Any:  # fields such as `A` depend on the type of block
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        rows = (
            f"  {name}: {block.layout.shape}{_diagonals(block)}"
            for name, block in self._blocks.items()
        )
        return "\n".join([f"{type(self).__name__}(  # [g, co, d] by layer", *rows, ")"])

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the blocks cover."""
        return tuple(name for block in self._blocks.values() for name in block.parameters)

    def __matmul__(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the product with a vector.

        Raises:
            TypeError: If the vector is no mapping of tensors.
            ValueError: If the vector lacks a parameter, or has one of another shape.
        """
        _check_vector(vector, self.parameters)
        result: dict[str, Tensor] = {}
        for block in self._blocks.values():
            product = block.matmul(block.layout.to_matrix(vector))
            result.update(block.layout.from_matrix(product))
        return result

    def __mul__(self, factor: float) -> KroneckerFactors:
        return self._mapped(lambda block: block.scaled(factor))

    __rmul__ = __mul__

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        """Return the exact sum as an operator, for example over several tasks.

        Raises:
            ValueError: If the two cover different layers.
        """
        if not isinstance(other, KroneckerFactors):
            return NotImplemented
        self._check_same(other)
        return KroneckerFactors({name: added([self[name], other[name]]) for name in self})

    def eigh(self) -> KroneckerFactors:
        """Return the eigendecomposition of every block."""
        return self._mapped(lambda block: block.eigh())

    def inverse(self, damping: float, *, exact: bool = True) -> KroneckerFactors:
        """Return the damped inverse of every block; see `KroneckerBlock.inverse`."""
        return self._mapped(lambda block: block.inverse(damping, exact))

    def solve(
        self, vector: Mapping[str, Tensor], damping: float, *, exact: bool = True
    ) -> dict[str, Tensor]:
        """Return ``(K + damping I)^-1`` times a vector."""
        return self.inverse(damping, exact=exact) @ vector

    def eigenvalues(self) -> dict[str, Tensor]:
        """Return the eigenvalues ``[g, co, d]`` by layer."""
        return {name: block.eigenvalues() for name, block in self._blocks.items()}

    def diagonal(self) -> dict[str, Tensor]:
        """Return the diagonal, a tensor of each parameter's shape by name.

        That of ``inverse(damping)`` has the variances of the Gaussian from which `sample` draws.
        """
        result: dict[str, Tensor] = {}
        for block in self._blocks.values():
            result.update(block.layout.from_matrix(block.diagonal()))
        return result

    def trace(self) -> Tensor:
        """Return the trace."""
        return self._sum(lambda block: block.trace())

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(K + damping I)``."""
        return self._sum(lambda block: block.logdet(damping))

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return self._sum(lambda block: block.frobenius_norm() ** 2).sqrt()

    def sample(
        self, count: int = 1, *, damping: float = 0.0, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw vectors ``[count, *shape]`` from the Gaussian with precision ``K + damping I``."""
        result: dict[str, Tensor] = {}
        for block in self._blocks.values():
            draws = block.sample(count, damping=damping, generator=generator)
            result.update(block.layout.from_matrix(draws))
        return result

    def to(self, *args: Any, **kwargs: Any) -> KroneckerFactors:
        """Return the blocks on another device or with another dtype, as ``Tensor.to``."""
        if not (dtype := torch.empty(0).to(*args, **kwargs).dtype).is_floating_point:
            raise ValueError(f"`dtype` must be a real floating-point type, got {dtype}.")
        return self._mapped(lambda block: block.to(*args, **kwargs))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and names only; it loads with ``weights_only=True``."""
        return {
            "version": CURVATURE_STATE_VERSION,
            "blocks": {name: block.state_dict() for name, block in self._blocks.items()},
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> KroneckerFactors:
        """Return the curvature that a `state_dict` describes.

        Raises:
            ValueError: If the state is of another version, or an entry is not what it must be.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if type(version) is not int or version != CURVATURE_STATE_VERSION:
            found = shown(version if isinstance(state, Mapping) else state)
            raise ValueError(
                f"`state` must be of version {CURVATURE_STATE_VERSION}, got {found}. Compute the "
                "factors anew."
            )
        blocks = state.get("blocks")
        if not isinstance(blocks, Mapping):
            raise ValueError(f"`state` must have a dictionary at blocks, got {shown(blocks)}.")
        return KroneckerFactors({n: block_of(f"blocks.{n}", own) for n, own in blocks.items()})

    def _check_same(self, other: KroneckerFactors) -> None:
        """Raise a ``ValueError`` if another operator covers other layers."""
        if self.keys() != other.keys():
            differ = sorted(self.keys() ^ other.keys())
            raise ValueError(
                f"Both sides must cover the same layers, they differ in {differ}. Compute both "
                "with the same `exclude` and `parameters`."
            )

    def _mapped(self, change: Callable[[Block], Block]) -> KroneckerFactors:
        """Return the operator with every block changed."""
        return KroneckerFactors({name: change(block) for name, block in self._blocks.items()})

    def _sum(self, value: Callable[[Block], Tensor]) -> Tensor:
        """Return the sum of a value over the blocks, in float64."""
        found = [value(block).double().cpu() for block in self._blocks.values()]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)


def pooled(factors: Sequence[KroneckerFactors], weights: Sequence[float]) -> KroneckerFactors:
    """Return the Kronecker factors of pooled data sets.

    ``A`` and ``B`` are the means of the data sets' factors, weighted by their numbers of
    examples. If all examples have the same number of positions, this equals `kronecker_factors` of
    all data at once (for a sum loss, divided by the number of data sets).

    Args:
        factors: The curvature of each data set.
        weights: Their numbers of examples, or other positive weights.

    Raises:
        ValueError: If there is not one positive weight for each of at least one data set, or the
            data sets do not have Kronecker products of the same layers.
    """
    if not isinstance(factors, Sequence) or not all(
        isinstance(own, KroneckerFactors) for own in factors
    ):
        raise TypeError(f"`factors` must be a list of KroneckerFactors, got {shown(factors)}.")
    numbers = _positive(weights)
    if not factors or len(factors) != len(numbers):
        raise ValueError(
            f"`weights` must be a positive number for each of {len(factors)} factors, got "
            f"{shown(weights)}."
        )
    for other in factors[1:]:
        factors[0]._check_same(other)
    return KroneckerFactors(
        {name: pooled_block([own[name] for own in factors], numbers) for name in factors[0]}
    )


def _positive(weights: Any) -> list[float]:
    """Return finite positive numbers, or none where one of them is something else."""
    is_row = isinstance(weights, Sequence) or getattr(weights, "ndim", None) == 1
    numbers = [plain(weight) for weight in weights] if is_row else []
    are_real = all(isinstance(own, (int, float)) and not isinstance(own, bool) for own in numbers)
    return numbers if are_real and all(0 < own < float("inf") for own in numbers) else []


def _diagonals(block: Block) -> str:
    """Return which factors of a block are diagonal, as a suffix of its line."""
    factors = {name: getattr(block, name, None) for name in "AB"}
    found = [name for name, own in factors.items() if own is not None and is_diagonal(own)]
    return f", {' and '.join(found)} diagonal" if found else ""


def _check_vector(vector: Any, names: Sequence[str]) -> None:
    """Raise an error if a vector is not a mapping from names to real tensors."""
    if not isinstance(vector, Mapping):
        raise TypeError(
            f"The vector must be a mapping from names of parameters to tensors, got "
            f"{described(vector)}."
        )
    for name in names:
        own = vector.get(name)
        if name in vector and not isinstance(own, Tensor):
            raise TypeError(f"The vector's entry '{name}' must be a tensor, got {shown(own)}.")
        if isinstance(own, Tensor) and own.is_complex():
            raise ValueError(f"The vector's entry '{name}' must be real, got {own.dtype}.")
