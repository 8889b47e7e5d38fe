"""Kronecker-factored curvature as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's block of the Fisher or GGN: ``scale * B[g] (x) A[g]`` per channel group.

    Rows are ordered as ``weight.flatten(1)`` within a group, with the bias last.

    Args:
        A: Input-based factor ``[g, d, d]``, averaged over examples.
        B: Gradient-based factor ``[g, co, co]``, averaged over examples (and positions).
        parameters: Names of the weight and, if it has one, the bias.
        scale: 1 for a mean loss, the number of examples for a sum.
    """

    A: Tensor
    B: Tensor
    parameters: tuple[str, ...]
    scale: float = 1.0

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""
        return self.scale * torch.stack([torch.kron(b, a) for a, b in zip(self.A, self.B)])


class KroneckerFactors(Mapping[str, KroneckerBlock]):
    """Kronecker factors by layer name."""

    def __init__(self, blocks: Mapping[str, KroneckerBlock]) -> None:
        self._blocks = dict(blocks)

    def __getitem__(self, name: str) -> KroneckerBlock:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        rows = (
            f"  {name}: A {list(block.A.shape)}, B {list(block.B.shape)}"
            for name, block in self._blocks.items()
        )
        return "\n".join([f"{type(self).__name__}(", *rows, ")"])
