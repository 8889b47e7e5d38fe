"""Losses that are sums over output entries, each a function of its own entry."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.diagonal_rule import DiagonalRule
from einconv_kfac.curvature.losses.loss_call import (
    check_batch,
    checked_weights,
    constant_targets,
    in_precision,
    precise_type,
    targets_in_precision,
    unreduced,
)
from einconv_kfac.curvature.losses.loss_rule import LossExample

_ROUNDING = 32
"""Multiple of the machine precision to which a negative curvature is taken for rounding."""

_CONVEX = (nn.MSELoss, nn.HuberLoss, nn.SmoothL1Loss)
"""Losses that are convex whatever the targets; their subclasses may be other functions."""


def _regression(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw outputs and targets of ``[4, 3, 2]``; the targets are probabilities."""
    drawn = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1].sigmoid()


def _with_variance(generator: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Draw outputs ``[4, 3]``, and targets with their variances."""
    drawn = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    return drawn[0], (drawn[1], drawn[2].exp())


class EntrywiseRule(DiagonalRule):
    """A convex loss ``sum_j l_j(f_j)``, whose Hessian is diagonal; autograd differentiates twice.

    It serves squared and Huber errors, logistic, Poisson and Gaussian likelihoods, with every
    weight and reduction they have.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.MSELoss,
        nn.BCEWithLogitsLoss,
        nn.PoissonNLLLoss,
        nn.GaussianNLLLoss,
        nn.HuberLoss,
        nn.MultiLabelSoftMarginLoss,
    )
    examples: ClassVar[tuple[LossExample, ...]] = (
        LossExample(nn.MSELoss, _regression),
        LossExample(nn.BCEWithLogitsLoss, _regression),
        LossExample(nn.PoissonNLLLoss, _regression),
        LossExample(nn.GaussianNLLLoss, _with_variance),
        LossExample(nn.HuberLoss, _regression),
        LossExample(nn.MultiLabelSoftMarginLoss, _regression),
    )

    def diagonal(
        self, loss: nn.Module, output: Tensor, target: Any, weights: Tensor | None = None
    ) -> Tensor:
        """Return the second derivative of the loss by each entry."""
        targets = constant_targets(target)
        check_batch(output, targets[0])
        precise = precise_type(output)
        if precise != output.dtype:
            loss, targets = in_precision(loss, precise), targets_in_precision(targets, precise)
        with torch.enable_grad():
            entries = output.detach().to(precise).requires_grad_()
            value = _value(loss, entries, targets, weights)
            (slope,) = torch.autograd.grad(value, entries, create_graph=True)
        if not slope.requires_grad:
            raise ValueError(
                f"`loss_fn` must be curved in the output, got {type(loss).__name__}, which is "
                "linear. fisher='empirical' takes any loss."
            )
        (curvature,) = torch.autograd.grad(slope.sum(), entries)
        if weights is None and type(loss) in _CONVEX:  # the host need not wait for a check
            return curvature.clamp_min(0)
        return _not_negative(curvature, slope.detach(), loss)

    def closed_product(
        self, loss: nn.Module, output: Tensor, target: Any, v: Tensor
    ) -> Tensor | None:
        """See `TorchLossRule`."""
        return None


class SmoothL1Rule(EntrywiseRule):
    """``torch.nn.SmoothL1Loss``, quadratic for errors below ``beta``."""

    kinds = (nn.SmoothL1Loss,)
    examples = (LossExample(nn.SmoothL1Loss, _regression),)

    def fault(self, loss: nn.SmoothL1Loss) -> str | None:
        """See `TorchLossRule`; with ``beta=0`` the loss is an absolute error."""
        if loss.beta > 0:
            return None
        return (
            "`loss_fn.beta` must be positive for a loss with curvature, got SmoothL1Loss with "
            "beta=0, which is L1Loss. Pass a positive beta"
        )


def _value(
    loss: nn.Module, entries: Tensor, targets: tuple[Any, ...], weights: Tensor | None
) -> Tensor:
    """Return the loss, or the weighted sum of its entries; no hook is called."""
    if weights is None:
        value: Tensor = loss.forward(entries, *targets)
        return value
    terms: Tensor = unreduced(loss).forward(entries, *targets)
    return (terms * checked_weights(weights, terms)).sum()


def _not_negative(curvature: Tensor, slope: Tensor, loss: nn.Module) -> Tensor:
    """Return the curvature with negative rounding errors set to zero.

    Raises:
        ValueError: If the curvature is negative.
    """
    scale = slope.abs() + curvature.abs().amax() if curvature.numel() else slope
    rounding = _ROUNDING * torch.finfo(curvature.dtype).eps * scale
    if bool((curvature < -rounding).any()):
        raise ValueError(
            "`loss_fn` must be convex in each output entry, got a second derivative of "
            f"{float(curvature.min()):.4g} from {type(loss).__name__}. fisher='empirical' takes "
            "any loss."
        )
    return curvature.clamp_min(0)
