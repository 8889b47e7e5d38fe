"""Random subsets of a batch's examples.

The curvature of a loss that is a sum over examples can be estimated from some of them (Martens
and Grosse, 2015, section 8). This requires a model in which examples do not interact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from einconv_kfac.optim.hyperparameters import fraction

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Subset:
    """A subset of the examples of a batch.

    Args:
        rows: Indices of its examples, in ascending order, ``[k]``.
        size: Number of examples of the batch, ``n``.
    """

    rows: Tensor
    size: int

    @property
    def scale(self) -> float:
        """Return ``n / k``; a sum over the subset, times this, estimates that over the batch."""
        return self.size / len(self.rows)

    def scattered(self, values: Tensor) -> Tensor:
        """Return values ``[k, ...]`` as ``[n, ...]``, zero for the other examples."""
        return values.new_zeros(self.size, *values.shape[1:]).index_copy(0, self.rows, values)

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with which the model is called for the subset.

        Args:
            args: Positional arguments for the batch.
            kwargs: Keyword arguments for the batch.

        Raises:
            RuntimeError: If an argument is neither a tensor ``[n, ...]`` nor a plain value.
        """
        own = tuple(self._argument(str(i), value) for i, value in enumerate(args))
        return own, {name: self._argument(f"'{name}'", value) for name, value in kwargs.items()}

    def _argument(self, name: str, value: Any) -> Any:
        """Return one argument of the model for the subset."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
            return value[self.rows]
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(
            f"Arguments of the model must be tensors [{self.size}, ...], with the examples of the "
            "loss's first argument in the first dimension, or plain values when "
            f"`curvature_fraction` is below 1, got {given} for argument {name} of the model. Pass "
            "curvature_fraction=1."
        )


def random_rows(size: int, part: float, generator: Generator) -> Tensor:
    """Return the indices of examples drawn without replacement, ``[k]``, in ascending order.

    Args:
        size: Number of examples of the batch, ``n``.
        part: Fraction of the examples; ``k`` is ``part * n``, rounded up.
        generator: The source of randomness; the indices are on its device.
    """
    order = torch.randperm(size, generator=generator, device=generator.device)
    return order[: math.ceil(part * size)].sort().values


def curvature_fraction_of(value: Any, adaptive: bool) -> float:
    """Return the fraction of the examples that the curvature is computed from.

    Raises:
        ValueError: If it is out of range, or below 1 for a step without a quadratic model.
    """
    if not adaptive and value != 1:
        raise ValueError(
            "`curvature_fraction` must be 1 when adaptive=False, where no quadratic model is "
            f"built, got {value}."
        )
    return fraction("curvature_fraction", value)


def check_separate(model: nn.Module) -> None:
    """Check that no layer of a known type lets examples interact.

    Raises:
        RuntimeError: If one does.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise RuntimeError(
                "Layers must treat each example separately when `curvature_fraction` is below 1, "
                f"got '{name}' ({type(module).__name__}), which takes its statistics from the "
                "batch. Pass curvature_fraction=1, or put the layer into evaluation mode."
            )
