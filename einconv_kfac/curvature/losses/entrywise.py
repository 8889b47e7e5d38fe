"""Losses that are sums over output entries, each a function of its own entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn


class EntrywiseRule:
    """A loss ``sum_j l_j(f_j)``: its Hessian is diagonal, and autograd knows it.

    It serves squared errors, logistic, Poisson and Gaussian likelihoods, with every weight
    and reduction they have. Samples are random signs times the root of the diagonal: they
    have the second moment of sampled targets and less variance.
    """

    def roots(self, loss: nn.Module, output: Tensor, target: Any) -> Iterator[Tensor]:
        """Yield the root of the diagonal, one entry of every example at a time."""
        root = self._root(loss, output, target).reshape(output.shape[0], -1)
        for entry in range(root.shape[1]):
            part = torch.zeros_like(root)
            part[:, entry] = root[:, entry]
            yield part.reshape(output.shape)

    def sample(self, loss: nn.Module, output: Tensor, target: Any, generator: Generator) -> Tensor:
        """Give the root of the diagonal random signs."""
        root = self._root(loss, output, target)
        signs = torch.randint(2, root.shape, generator=generator, device=root.device)
        return root * (2 * signs - 1)

    def _root(self, loss: nn.Module, output: Tensor, target: Any) -> Tensor:
        """Return the root of the Hessian's diagonal, ``[n, *f]``."""
        targets = target if isinstance(target, tuple) else (target,)
        self._check(output, targets[0])
        with torch.enable_grad():
            entries = output.detach().requires_grad_()
            value = loss.forward(entries, *targets)  # past the hooks of those who watch it
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
