"""Rows of docs/scripts.md about models, and how they are called."""

from __future__ import annotations

import math

import torch
from documented_scripts import data, net, script, steps
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from einconv_kfac import KFAC


@script("a compiled model")
def compiled() -> list[float]:
    model = torch.compile(net(), backend="eager")
    loss_fn, (x, y) = nn.CrossEntropyLoss(), data()
    return steps(KFAC(model, loss_fn), lambda: loss_fn(model(x), y))


@script(
    "parts of the model called one after the other (`model.encoder(x)`, `model.decoder(z)`), or "
    "beside the whole"
)
def parts_of_a_model() -> list[float]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6)})
    loss_fn, (x, _) = nn.MSELoss(), data()
    opt = KFAC(model, loss_fn)
    return steps(opt, lambda: loss_fn(model["decoder"](model["encoder"](x).tanh()), x))


@script("a loop that passes a state from call to call")
def passed_state() -> list[float]:
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.cell(x, state)
            return self.head(state), state

    model, loss_fn, (x, y) = Reader(), nn.CrossEntropyLoss(), data()

    def loss() -> Tensor:
        state = torch.zeros(len(x), 8)
        for part in x.split(2, dim=1):
            scores, state = model(part, state)
        return torch.as_tensor(loss_fn(scores, y))

    return steps(KFAC(model, loss_fn), loss)


@script("derivatives of the network (PINN)")
def physics_informed() -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x = torch.linspace(0, 1, 20).double()[:, None].requires_grad_()
    opt = KFAC(model)

    def loss() -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = curvature + math.pi**2 * (math.pi * x.detach()).sin()
        return opt.observe(residual.square().mean() + 100 * u[[0, -1]].square().mean())

    return steps(opt, loss)


class Masked(nn.Module):
    """A network of which some weights are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        first: Tensor = self.net[0].weight
        return functional_call(self.net, {"0.weight": first * kept}, (x,))


@script("other tensors in place of parameters (`functional_call`: MAML, noise, masks)")
def other_tensors() -> list[float]:
    model, loss_fn, (x, y) = Masked(), nn.CrossEntropyLoss(), data()
    kept = (torch.arange(96) % 5 != 0).view(16, 6)
    return steps(KFAC(model, loss_fn), lambda: torch.as_tensor(loss_fn(model(x, kept), y)))


@script("a variational autoencoder")
def variational() -> list[float]:
    torch.manual_seed(0)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            return self.decoder(z), mean, log_variance

    model, x = Autoencoder(), data()[0]
    opt = KFAC(model)

    def loss() -> Tensor:
        found, mean, log_variance = model(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return opt.observe(functional.mse_loss(found, x) + 0.1 * divergence)

    return steps(opt, loss)
