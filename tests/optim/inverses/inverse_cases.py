"""Factors to invert, and what an optimizer's state says of its inverses."""

from __future__ import annotations

from typing import Any

import torch
from optim_cases import conv_net
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature import find_layers
from einconv_kfac.optim.inverses.protocol import Task

EXACT = {"rtol": 1e-8, "atol": 1e-10}
KINDS: list[Any] = ["factored", "exact", "ekfac"]


def tasks(dtype: torch.dtype = torch.float64, copies: int = 1) -> list[Task]:
    """Return random factors of every layer of `conv_net`, several times, with random seeds."""
    layouts = copies * [layer.layout for layer in find_layers(conv_net())]
    result = []
    for index, layout in enumerate(layouts):
        groups, rows, columns = layout.shape
        a, b = (torch.randn(groups, d, 2 * d, dtype=dtype) for d in (columns, rows))
        result.append(Task(str(index), (a @ a.mT, b @ b.mT), 0.1 * (index + 1), layout))
    return result


def layer_states(optimizer: KFAC) -> dict[str, dict[str, Any]]:
    """Return the states of the layers' factors and inverses, once all threads are done."""
    layers: dict[str, dict[str, Any]] = optimizer.state_dict()["kfac"]["preconditioner"]["layers"]
    return layers


def inverse_steps(optimizer: KFAC) -> set[int]:
    """Return the steps whose factors the present inverses are of."""
    return {layer["inverse_step"] for layer in layer_states(optimizer).values()}


def dampings(optimizer: KFAC) -> dict[str, float]:
    """Return the damping of each layer's inverse."""
    return {name: own["damping"] for name, own in optimizer.layer_statistics().items()}


def at_step(optimizer: KFAC, step: int) -> None:
    """Set the number of steps that were taken."""
    state = optimizer.state_dict()
    state["kfac"]["preconditioner"]["steps"] = step
    optimizer.load_state_dict(state)


def preconditioned(
    model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 1, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradient and the preconditioned gradient after a few steps on one batch."""
    loss_fn, (x, y) = nn.CrossEntropyLoss(), batch
    preconditioner = KFACPreconditioner(model, loss_fn, fisher="exact", **options)
    for _ in range(steps):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        preconditioner.step()
    return gradient, {n: p.grad for n, p in model.named_parameters()}
