"""Batches that are refused, and what the message proposes."""

from __future__ import annotations

from typing import Any

import torch
from refused_scripts import (
    CROSS_ENTROPY,
    Refused,
    Script,
    X,
    Y,
    net,
    plain,
)
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC


def reused_input(model: nn.Module, _: KFAC, *, cloned: bool = False) -> Tensor:
    x = X.clone()
    loss: Tensor = CROSS_ENTROPY(model(x.clone() if cloned else x), Y)
    loss.backward()
    x.zero_()
    return loss


def reused_target(model: nn.Module, _: KFAC, *, cloned: bool = False) -> Tensor:
    y = Y.clone()
    loss: Tensor = CROSS_ENTROPY(model(X), y.clone() if cloned else y)
    loss.backward()
    y.zero_()
    return loss


def reused_observed_target(model: nn.Module, opt: KFAC, *, cloned: bool = False) -> Tensor:
    target = X[:, :3].clone()
    loss = opt.observe(functional.mse_loss(model(X), target.clone() if cloned else target))
    loss.backward()
    target.zero_()
    return loss


def weighted_losses(model: nn.Module, opt: KFAC, *, cloned: bool = False) -> Tensor:
    """Two losses, whose weights change before the step."""
    shares, output = torch.ones(2, dtype=X.dtype), model(X)
    losses = torch.stack([functional.cross_entropy(output, Y), output.square().mean()])
    loss = opt.observe(((shares.clone() if cloned else shares) * losses).sum())
    loss.backward()
    shares.mul_(0.9)
    return loss


class Named(nn.Module):
    """A network whose input is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])


def named(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(model({"x": X}), Y)
    loss.backward()
    return loss


def two_sizes(model: nn.Module, opt: KFAC) -> Tensor:
    loss = opt.observe(CROSS_ENTROPY(model(X), Y) + model(X[:7]).square().mean())
    loss.backward()
    return loss


def of(script: Any, **given: Any) -> Script:
    return lambda model, opt: script(model, opt, **given)


HALF = {"curvature_fraction": 0.5}
BATCHES: dict[str, Refused] = {
    "an input that is used again": Refused(
        r"got argument 0 of the model, which was overwritten.*\.clone\(\)",
        reused_input,
        of(reused_input, cloned=True),
    ),
    "a target that is used again": Refused(
        r"got a target of the loss, which was overwritten.*\.clone\(\)",
        reused_target,
        of(reused_target, cloned=True),
    ),
    "a target of an observed loss that is used again": Refused(
        r"which was overwritten.*\.clone\(\)",
        reused_observed_target,
        of(reused_observed_target, cloned=True),
        loss_fn=None,
    ),
    "weights of losses that change": Refused(
        r"one that was overwritten in place.*\.clone\(\)",
        weighted_losses,
        of(weighted_losses, cloned=True),
        loss_fn=None,
    ),
    "half of a batch with batch statistics": Refused(
        r"got '3' \(BatchNorm1d\).*Pass curvature_fraction=1",
        plain,
        plain,
        build=lambda: net(nn.BatchNorm1d(3)),
        options=HALF,
        remedied_options={},
    ),
    "half of a batch in a mapping": Refused(
        "got dict for argument 0 of the model. Pass curvature_fraction=1",
        named,
        named,
        build=Named,
        options=HALF,
        remedied_options={},
    ),
    "two sizes of batches": Refused(
        "calls of '0' must.*Use approximation='expand'",
        two_sizes,
        two_sizes,
        options={"approximation": "reduce"},
        remedied_options={},
    ),
}
