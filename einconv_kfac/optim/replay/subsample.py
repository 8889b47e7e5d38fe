"""Forward passes on a part of their examples.

The curvature of a loss that is a sum over examples is estimated from some of them (Martens and
Grosse, 2015, section 8). That needs a model that treats every example alone: what mixes them, as
batch normalisation on batch statistics does, is refused. Dropout draws for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from einconv_kfac.optim.hyperparameters import fraction
from einconv_kfac.optim.replay.layer_jvp import Kept

if TYPE_CHECKING:
    from einconv_kfac.optim.replay.recorder import Batch

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Portion:
    """Some of a batch's examples.

    Args:
        rows: Their numbers, in order, ``[k]``.
        size: Number of examples of the batch, ``n``.
    """

    rows: Tensor
    size: int

    @property
    def scale(self) -> float:
        """Return ``n / k``, by which a sum over them estimates that over the batch."""
        return self.size / len(self.rows)

    def spread(self, values: Tensor) -> Tensor:
        """Return values ``[k, ...]`` as ``[n, ...]``, zero for the other examples."""
        return values.new_zeros(self.size, *values.shape[1:]).index_copy(0, self.rows, values)

    def argument(self, name: str, value: Any) -> Any:
        """Return what the model is called with in place of an argument.

        Raises:
            RuntimeError: If the argument is neither a tensor ``[n, ...]`` nor a plain value.
        """
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
            return value[self.rows]
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(
            f"`curvature_fraction` below 1 needs tensors of {self.size} examples, as in the first "
            f"argument of the loss, got {given} for argument {name} of the model. Pass "
            "curvature_fraction=1."
        )

    def kept(self, kept: Kept) -> Kept:
        """Return the outputs that are known of layers, where all have these examples first."""
        return {
            module: [(y[self.rows], version) for y, version in outputs]
            for module, outputs in kept.items()
            if all(y.shape[0] == self.size and y._version == version for y, version in outputs)
        }


def curvature_fraction_of(value: Any, adaptive: bool) -> float:
    """Return the fraction of the examples that products take.

    Raises:
        ValueError: If it is not one, or if there are no products.
    """
    if not adaptive and value != 1:
        raise ValueError(
            "`curvature_fraction` must be 1 when adaptive=False, which has no products, got "
            f"{value}."
        )
    return fraction("curvature_fraction", value)


def with_portions(batches: list[Batch], part: float, seed: int, step: int) -> list[Batch]:
    """Give each batch a random portion of a fraction of its examples, rounded up.

    Args:
        batches: The batches of a step.
        part: The fraction; nothing is drawn if it is 1.
        seed: What is drawn depends on it and on the step alone.
        step: The number of the step.
    """
    if part == 1:
        return batches
    generator = Generator().manual_seed(seed * 1_000_003 + step)
    return [replace(batch, portion=_drawn(batch.output, part, generator)) for batch in batches]


def _drawn(output: Tensor, part: float, generator: Generator) -> Portion:
    """Draw a portion of the examples of an output ``[n, ...]``."""
    size = output.shape[0] if output.ndim else 1
    rows = torch.randperm(size, generator=generator)[: math.ceil(part * size)]
    return Portion(rows.sort().values.to(output.device), size)


def check_separate(model: nn.Module) -> None:
    """Check that no layer mixes examples by its type.

    Raises:
        RuntimeError: If one does.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise RuntimeError(
                "`curvature_fraction` below 1 needs layers that treat every example alone, got "
                f"'{name}' ({type(module).__name__}), which takes its statistics from the batch. "
                "Pass curvature_fraction=1, or put the layer into evaluation mode."
            )


@contextmanager
def whole_masks(model: nn.Module, portion: Portion | None) -> Iterator[None]:
    """Have dropout draw for the whole batch inside the block, as it did there."""
    if portion is None:
        yield
        return
    drawing = (m for m in model.modules() if type(m) in _DROPOUT and m.training)
    changed = [module for module in drawing if "forward" not in vars(module)]
    for module in changed:
        vars(module)["forward"] = partial(_masked, module, portion)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _masked(module: Any, portion: Portion, x: Tensor) -> Tensor:
    """Return a portion's dropout."""
    drop = type(module).forward
    if x.shape[0] != len(portion.rows):
        unknown: Tensor = drop(module, x)
        return unknown
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    ones = x.new_ones(portion.size, *x.shape[1:]).contiguous(memory_format=layout)
    mask: Tensor = drop(module, ones)[portion.rows]
    return x * mask


def _is_channels_last(x: Tensor) -> bool:
    """Tell whether images are stored channels last."""
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def restricted(
    portion: Portion, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a model for a portion; raises like `Portion.argument`."""
    own = tuple(portion.argument(str(i), value) for i, value in enumerate(args))
    return own, {name: portion.argument(f"'{name}'", value) for name, value in kwargs.items()}
