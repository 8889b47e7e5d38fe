"""Losses, and derivatives in them, that are refused, and what the message proposes."""

from __future__ import annotations

import torch
from refused_scripts import (
    CROSS_ENTROPY,
    Refused,
    X,
    Y,
    net,
    observing,
    plain,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()


def linear_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def smooth_net() -> nn.Sequential:
    """A network with an activation whose derivative is made of other operations."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3)).double()


def checkpointed_loss(model: nn.Module, opt: KFAC) -> Tensor:
    """Compute the loss in pieces, whose activations are computed again in the backward pass."""

    def piece(scores: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(scores, targets, reduction="sum")

    pairs = zip(model(X).chunk(3), Y.chunk(3))
    loss = sum((checkpoint(piece, *own, use_reentrant=False) for own in pairs), torch.zeros(()))
    opt.observe(loss / len(X)).backward()
    return loss / len(X)


def penalty(model: nn.Module, opt: KFAC) -> Tensor:
    x = X.clone().requires_grad_()
    y = model(x)  # the derivatives of all outputs are taken at once
    rows = torch.eye(3, dtype=y.dtype)[:, None].expand(3, *y.shape)
    (slopes,) = torch.autograd.grad(y, x, rows, create_graph=True, is_grads_batched=True)
    loss = opt.observe(functional.cross_entropy(model(X), Y) + slopes.square().mean())
    loss.backward()
    return loss


def functional_penalty(model: nn.Module, opt: KFAC) -> Tensor:
    slopes = torch.func.vmap(torch.func.jacrev(model))(X)
    loss = opt.observe(functional.cross_entropy(model(X), Y) + slopes.square().mean())
    loss.backward()
    return loss


def penalty_by_rows(model: nn.Module, opt: KFAC) -> Tensor:
    x = X.clone().requires_grad_()
    y = model(x)
    slopes = [torch.autograd.grad(own.sum(), x, create_graph=True)[0] for own in y.unbind(1)]
    loss = opt.observe(functional.cross_entropy(y, Y) + torch.stack(slopes).square().mean())
    loss.backward()
    return loss


class Penalized(nn.Module):
    """A network that returns its output and its derivative by the input."""

    def __init__(self, own: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net() if own is None else own

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = self.net(x)
        return y, torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]


def inner_penalty(model: nn.Module, opt: KFAC) -> Tensor:
    y, slope = model(X)
    loss = opt.observe(functional.cross_entropy(y, Y) + slope.square().mean())
    loss.backward()
    return loss


def negative(model: nn.Module, _: KFAC) -> Tensor:
    loss: Tensor = -CROSS_ENTROPY(model(X), Y)
    loss.backward()
    return loss


def unobserved(model: nn.Module, _: KFAC) -> Tensor:
    loss = functional.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def functional_gradients(model: nn.Module, _: KFAC) -> Tensor:
    parameters = dict(model.named_parameters())

    def loss(own: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, own, (X,)), Y)

    gradients, value = torch.func.grad_and_value(loss)(parameters)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].detach()
    return value


LOSSES: dict[str, Refused] = {
    "relu before the loss": Refused(
        r"got Relu. Write `x.clamp\(min=0\)`",
        observing(lambda o: o.relu_().square().mean()),
        observing(lambda o: o.clamp(min=0).square().mean()),
    ),
    "a derivative in the loop": Refused(
        "got TanhBackward. Compute derivatives of the model in the `forward`.*without `is_grads_b",
        penalty,
        penalty_by_rows,
        loss_fn=None,
    ),
    "a derivative in the loop with fixed rates": Refused(
        r"Derivatives of the model must be .*weights of \['0', '2'\].*Pass that module",
        penalty,
        inner_penalty,
        remedied=Penalized,
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a derivative of a linear network in the loop with fixed rates": Refused(
        r"got derivatives of linear layers .*weights of \['0', '1'\].*Pass that module",
        penalty,
        inner_penalty,
        build=linear_net,
        remedied=lambda: Penalized(linear_net()),
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a derivative of one linear layer in the loop with fixed rates": Refused(
        r"got derivatives of linear layers .*weights of \[''\].*Pass that module",
        penalty,
        inner_penalty,
        build=linear_layer,
        remedied=lambda: Penalized(linear_layer()),
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "several derivatives at once": Refused(
        r"got derivatives of linear layers .*weights of \['0', '2'\].*Pass that module",
        penalty,
        penalty_by_rows,
        build=smooth_net,
        loss_fn=None,
    ),
    "derivatives by torch.func": Refused(
        r"got calls inside of torch.func .*weights of \['0', '2'\].*Pass that module",
        functional_penalty,
        penalty_by_rows,
        build=smooth_net,
        loss_fn=None,
        options={"lr": 0.1, "adaptive": False},
    ),
    "a negated loss": Refused(
        "negative weight. Write `loss = optimizer.observe",
        negative,
        observing(lambda o: -functional.cross_entropy(o, Y)),
    ),
    "a loss that is not observed": Refused(
        "saw none whose gradient.*`loss = optimizer.observe",
        unobserved,
        observing(lambda o: functional.cross_entropy(o, Y)),
    ),
    "gradients of torch.func": Refused(
        r"before `loss.backward\(\)`; gradients by torch.func.*no recorded loss",
        functional_gradients,
        plain,
    ),
    "a loss inside of a checkpoint": Refused(
        "must be computed outside of `torch.utils.checkpoint`.*of the output of the model",
        checkpointed_loss,
        plain,
    ),
    "a loss module inside of a checkpoint": Refused(
        "must be computed outside of `torch.utils.checkpoint`",
        checkpointed_loss,
        plain,
        options={"lr": 0.1, "adaptive": False},
    ),
}
