"""Calls of loss modules between a model's outputs and a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.local_expansion import local_expansion
from einconv_kfac.curvature.losses.loss_call import Targets, depends_on_parameters
from einconv_kfac.curvature.losses.loss_registry import found_rule, has_rule, is_registered
from einconv_kfac.curvature.losses.loss_rule import LossRule
from einconv_kfac.curvature.losses.snapshot import copied, snapshot
from einconv_kfac.curvature.objective.graph import Edge, edge_of
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature

LARGEST_DIFFERENCE = 1e-3
"""Relative difference up to which a loss counts as repeated."""


@dataclass(frozen=True)
class LossCall:
    """A call of a loss module, which can be called again for another first argument.

    Args:
        loss_fn: The loss as it was at the call; no hook of it is called.
        argument: The edge of its first argument.
        value: The first argument, detached.
        targets: The other arguments.
        result: The loss, detached.
        version: The version of the first argument.
    """

    loss_fn: nn.Module
    argument: Edge
    value: Tensor
    targets: tuple[Any, ...]
    result: Tensor
    version: int

    @staticmethod
    def of(loss_fn: nn.Module, arguments: Sequence[Any], loss: Tensor) -> LossCall | None:
        """Return a call, or ``None`` if it depends on parameters by another argument."""
        value, *targets = arguments
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if depends_on_parameters(tuple(targets)):
            return None
        own, x = snapshot(loss_fn), value.detach()
        kept = tuple(map(copied, targets))
        return LossCall(own, edge_of(value), x, kept, loss.detach(), x._version)

    @property
    def is_intact(self) -> bool:
        """Whether the first argument was not changed in place since."""
        return self.value._version == self.version

    def __call__(self, value: Tensor) -> Tensor:
        """Return the loss for another first argument."""
        result: Tensor = self.loss_fn.forward(value, *self.targets)
        return result

    def is_repeated(self) -> bool:
        """Return whether the module returns the recorded loss again, as without random numbers."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            again = self(self.value)
        if not isinstance(again, Tensor) or again.shape != self.result.shape:
            return False
        difference = (again - self.result).abs().max()
        return bool(difference <= LARGEST_DIFFERENCE * self.result.abs().max())

    def curvature(self, weight: Tensor) -> LocalCurvature | None:
        """Return the curvature of the rule that a user registered, or ``None`` without one.

        Args:
            weight: The derivative of the objective with respect to the loss.
        """
        rule = found_rule(self.loss_fn)
        if rule is None or not is_registered(self.loss_fn) or not has_rule(self.loss_fn):
            return None
        if weight.ndim or bool(weight < 0):
            return None
        target = self.targets[0] if len(self.targets) == 1 else Targets(self.targets)
        return Registered(rule, self.loss_fn, self.value, target, weight)


@dataclass(frozen=True)
class Registered:
    """The curvature of a registered rule for a loss.

    Args:
        rule: The rule.
        loss_fn: The loss.
        value: The argument of the loss, ``[n, *f]``.
        target: The target, or several.
        weight: The factor of the loss in the objective, one number.
    """

    name: ClassVar[str] = "by a registered rule"
    rule: LossRule
    loss_fn: nn.Module
    value: Tensor
    target: Any
    weight: Tensor

    @property
    def rows(self) -> torch.Size:
        """See `LocalCurvature`."""
        return self.value.shape[:1]

    def support(self) -> Tensor:
        """See `LocalCurvature`; it is not known, and taken for the whole argument."""
        return torch.ones_like(self.value)

    def sample(self, generator: Generator) -> Tensor:
        """See `LocalCurvature`."""
        drawn = self.rule.sample(self.loss_fn, self.value, self.target, generator)
        return drawn * self.weight.sqrt()

    def roots(self) -> Iterator[Tensor]:
        """See `LocalCurvature`."""
        for root in self.rule.roots(self.loss_fn, self.value, self.target):
            yield root * self.weight.sqrt()

    def masked(self, root: Tensor, kept: Tensor) -> Tensor:
        """See `LocalCurvature`."""
        return root.where(kept.reshape(-1, *[1] * (root.ndim - 1)), 0)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See `LocalCurvature`."""
        found = local_expansion(self.loss_fn, self.value, self.target, vectors).products
        left = torch.stack([vector.flatten() for vector in vectors]).double()
        right = torch.stack([product.flatten() for product in found]).double()
        return self.weight.double() * left @ right.mT
