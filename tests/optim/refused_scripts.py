"""What a script is that a step refuses, and what such scripts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = (X @ torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)).argmax(1)
CROSS_ENTROPY = nn.CrossEntropyLoss()
Script = Callable[[nn.Module, KFAC], Tensor]
"""Computes and backpropagates the loss, and returns it."""


def net(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), *last).double()


@dataclass(frozen=True)
class Refused:
    """A script that is refused by a step or by its backward pass.

    Args:
        words: What the message contains.
        script: The script.
        remedy: The remedied script; the good batches of the same optimizer as well, where the
            model is the same.
        build: Makes the model.
        remedied: Makes the model of the remedied script, if another one.
        options: Arguments of the optimizer.
        remedied_options: Those of the remedied script, if others.
        loss_fn: The loss module that the optimizer is given.
    """

    words: str
    script: Script
    remedy: Script
    build: Callable[[], nn.Module] = net
    remedied: Callable[[], nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    remedied_options: dict[str, Any] | None = None
    loss_fn: nn.Module | None = CROSS_ENTROPY


def plain(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model(X), Y)
    loss.backward()
    return loss


def observing(loss: Callable[[Tensor], Tensor]) -> Script:
    """Observe a functional loss of the output."""

    def script(model: nn.Module, opt: KFAC) -> Tensor:
        value = opt.observe(loss(model(X)))
        value.backward()
        return value

    return script


def good(model: nn.Module, opt: KFAC) -> None:
    """A step that is not refused."""
    opt.zero_grad()
    if opt._preconditioner.estimator.loss_fn is None:
        opt.observe(CROSS_ENTROPY(model(X), Y)).backward()
    else:
        CROSS_ENTROPY(model(X), Y).backward()
    opt.step()
