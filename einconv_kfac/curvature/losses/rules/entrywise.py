"""Losses that are sums over output entries, each a function of its own entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.loss_call import targets_of
from einconv_kfac.curvature.losses.loss_rule import LossExample, TorchLossRule


def _regression(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw outputs and targets of ``[4, 3, 2]``; the targets are probabilities."""
    drawn = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1].sigmoid()


def _with_variance(generator: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Draw outputs ``[4, 3]``, and targets with their variances."""
    drawn = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    return drawn[0], (drawn[1], drawn[2].exp())


class EntrywiseRule(TorchLossRule):
    """A loss ``sum_j l_j(f_j)``, whose Hessian is diagonal; autograd differentiates it twice.

    It serves squared errors, logistic, Poisson and Gaussian likelihoods, with every weight
    and reduction they have. Samples are random signs times the root of the diagonal: they
    have the second moment of sampled targets and less variance.
    """

    kinds = (nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss)
    examples = (
        LossExample(nn.MSELoss, _regression),
        LossExample(nn.BCEWithLogitsLoss, _regression),
        LossExample(nn.PoissonNLLLoss, _regression),
        LossExample(nn.GaussianNLLLoss, _with_variance),
    )

    def roots(self, loss: nn.Module, output: Tensor, target: Any) -> Iterator[Tensor]:
        """Yield the root of the diagonal, one entry of every example at a time."""
        root = self._root(loss, output, target).reshape(output.shape[0], -1)
        for entry in range(root.shape[1]):
            part = torch.zeros_like(root)
            part[:, entry] = root[:, entry]
            yield part.reshape(output.shape)

    def sample(self, loss: nn.Module, output: Tensor, target: Any, generator: Generator) -> Tensor:
        """Return the root of the diagonal with random signs."""
        root = self._root(loss, output, target)
        signs = torch.randint(2, root.shape, generator=generator, device=root.device)
        return root * (2 * signs - 1)

    def _root(self, loss: nn.Module, output: Tensor, target: Any) -> Tensor:
        """Return the root of the Hessian's diagonal, ``[n, *f]``."""
        targets = targets_of(target)
        self._check(output, targets[0])
        with torch.enable_grad():
            entries = output.detach().requires_grad_()
            value = loss.forward(entries, *targets)  # `forward`, so that no hook is called
            (slope,) = torch.autograd.grad(value, entries, create_graph=True)
        if not slope.requires_grad:
            raise ValueError(
                f"`loss_fn` must be curved in the output, got {type(loss).__name__}, which is "
                "linear. fisher='empirical' takes any loss."
            )
        (curvature,) = torch.autograd.grad(slope.sum(), entries)
        return curvature.sqrt()

    def _check(self, output: Tensor, target: Any) -> None:
        """Check that the output is a batch and that its target is not broadcast."""
        if output.ndim == 0 or output.numel() == 0:
            raise ValueError(
                f"The model's output must be a non-empty batch [n, *f], got {tuple(output.shape)}."
            )
        if isinstance(target, Tensor) and target.shape != output.shape:
            raise ValueError(
                f"The target must have the output's shape {tuple(output.shape)}, got "
                f"{tuple(target.shape)}."
            )
