"""Losses through frozen networks of features, and activations in place after normalisations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.curvature.objective.frozen_shifts import frozen_shift

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 1, 6, 6, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.rand(3, 1, 6, 6, generator=GENERATOR, dtype=torch.float64)


class Positive(nn.Module):
    """The positive part, of which the graph keeps the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class Leaky(nn.Module):
    """A leaky positive part of operations whose inputs the graph keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + 0.2 * x.clamp(max=0)


class Residual(nn.Module):
    """A block with a sum before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.side(x), inplace=True)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5, 4), nn.ReLU(inplace=True),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Residual())


def dead() -> nn.Module:
    """Channels that are positive nowhere."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:2] -= 3
    return model


class Step(nn.Module):
    """A step of a decoder, with a dimension of one for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).unsqueeze(0).relu().squeeze(0)


class Critic(nn.Module):
    """A network of an image and a state, which no node of a graph keeps; no sign changes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(38, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.first.bias += torch.tensor([-4.0, -3, 3, 4])

    def forward(self, x: Tensor) -> Tensor:
        state = torch.arange(6.0, dtype=x.dtype).reshape(3, 2)
        return self.second(functional.relu(self.first(torch.cat([x.flatten(1), state], 1)))).relu()


def trained(features: nn.Module, *, n: int = 3) -> Tensor:
    """Return a generator's weights after steps on a loss of features."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 1)).double()
    opt = KFAC(net, fisher="exact")
    wanted = features(TARGET).detach()
    for _ in range(n):
        opt.zero_grad()
        out = net(X)
        loss = functional.mse_loss(features(out), wanted) + 0.1 * functional.mse_loss(out, TARGET)
        opt.observe(loss).backward()
        opt.step()
    return weights(net)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = build().double().eval()
    for name, own in (*model.named_buffers(), *model.named_parameters()):
        if own.is_floating_point() and own.ndim == 1 and "running" in name:
            own.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("build", [plain, residual, dead, Step, Critic])
def test_frozen_features(build: Callable[[], nn.Module]) -> None:
    frozen = built(build).requires_grad_(False)
    found, expected = trained(frozen), trained(built(build))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_weight_that_two_layers_share() -> None:
    """The shift of the other layer does not fit, which the positive part shows: zeros stay."""
    first, second = (nn.Linear(3, 4).double() for _ in range(2))
    second.weight = first.weight
    with torch.no_grad():
        first.bias.copy_(torch.tensor([8.0, 9, -8, -9]))
        second.bias.copy_(torch.tensor([-8.0, 8, 9, -7]))
    for own in (first, second):
        own.requires_grad_(False)

    def moved(layer: nn.Module, positive: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        net, x = nn.Linear(5, 3).double(), torch.randn(8, 5).double()
        opt = KFAC(net, fisher="exact")
        opt.observe(positive(layer(net(x))).square().mean()).backward()
        opt.step()
        return weights(net)

    for layer in (first, second):
        found, expected = moved(layer, functional.relu), moved(layer, Positive())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_shifts_that_are_not_found() -> None:
    assert frozen_shift(None) is None
    assert frozen_shift(torch.ones(3)) is None
    assert frozen_shift(nn.Linear(3, 2).weight) is None
    assert frozen_shift(nn.Linear(3, 2, bias=False).requires_grad_(False).weight) is None
    layer = nn.Linear(3, 2).requires_grad_(False)
    for weight in (layer.weight, layer.weight.t()):
        shift = frozen_shift(weight)
        assert shift is not None
        assert torch.equal(shift, layer.bias)


IN_PLACE = {
    "relu": (lambda: nn.ReLU(inplace=True), Positive),
    "leaky": (lambda: nn.LeakyReLU(0.2, inplace=True), Leaky),
    "six": (lambda: nn.ReLU6(inplace=True), nn.ReLU6),
    "not in place": (nn.ReLU, Positive),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_after_instance_normalisation(name: str, affine: bool) -> None:
    """As those of a discriminator; with a shift, its parameters require gradients."""

    def net(activation: Callable[[], nn.Module]) -> nn.Module:
        def layers() -> nn.Module:
            norm = nn.InstanceNorm2d(4, affine=affine)
            return nn.Sequential(nn.Conv2d(1, 4, 3), norm, activation(), nn.Conv2d(4, 2, 3))

        model = built(layers)
        return model if affine else model.requires_grad_(False)

    found, expected = (trained(net(own)) for own in IN_PLACE[name])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_another_function_of_a_part_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    opt, out = KFAC(net), net(torch.randn(8, 5)) * 2
    out[:, :2].exp_()
    opt.observe(out.square().mean()).backward()
    with pytest.raises(RuntimeError, match="got CopySlices"):
        opt.step()
