"""Training scripts as tutorials publish them: each trains, and those that were refused before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.distributions import Beta, MultivariateNormal, Normal
from torch.nn import functional

from einconv_kfac import KFAC

STEPS = 8
SCRIPTS: dict[str, Callable[[], list[float]]] = {}
Script = Callable[[], list[float]]


def script(run: Script) -> Script:
    """Register a script."""
    SCRIPTS[run.__name__] = run
    return run


def net(inputs: int = 6, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def data(size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def fit(opt: KFAC, loss: Callable[[], Tensor]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        opt.zero_grad()
        value = opt.observe(loss())
        value.backward()
        opt.step()
        losses.append(float(value.detach()))
    return losses


@script
def speech_by_ctc() -> list[float]:
    model = net(6, 5)
    x, loss_fn = torch.randn(8, 10, 6), nn.CTCLoss(zero_infinity=True)
    targets, lengths = torch.randint(1, 5, (8, 3)), (torch.full((8,), 10), torch.full((8,), 3))
    return fit(
        KFAC(model), lambda: loss_fn(model(x).log_softmax(2).transpose(0, 1), targets, *lengths)
    )


class Coupling(nn.Module):
    """A layer of a normalizing flow for two numbers."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.net, self.swapped = net(1, 2), swapped

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.flip(1).chunk(2, 1) if self.swapped else x.chunk(2, 1)
        scale, shift = self.net(kept).chunk(2, 1)
        moved = moved * scale.tanh().exp() + shift
        return torch.cat([kept, moved], 1), scale.tanh().sum(1)


class Flow(nn.Module):
    """A normalizing flow that returns its result and the logarithm of its determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(bool(i % 2)) for i in range(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, own = layer(x)
            total = total + own
        return x, total


@script
def normalizing_flow() -> list[float]:
    model, x = Flow(), torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    x = torch.stack([2 * x[:, 0], x[:, 1] + x[:, 0] ** 2], 1)
    base = Normal(torch.zeros(2), torch.ones(2))

    def loss() -> Tensor:
        z, determinant = model(x)
        return -(base.log_prob(z).sum(1) + determinant).mean()

    return fit(KFAC(model), loss)


@script
def correlated_gaussian() -> list[float]:
    model, x = net(6, 5), data()[0]
    y = torch.stack([x[:, 0] + x[:, 1], x[:, 1]], 1)

    def loss() -> Tensor:
        out = model(x)
        first, last = functional.softplus(out[:, 2]), functional.softplus(out[:, 4])
        factor = torch.stack([first, torch.zeros(48), out[:, 3], last], 1).view(48, 2, 2)
        return -MultivariateNormal(out[:, :2], scale_tril=factor).log_prob(y).mean()

    return fit(KFAC(model), loss)


@script
def beta_regression() -> list[float]:
    model, x = net(6, 2), data()[0]

    def loss() -> Tensor:
        a, b = functional.softplus(model(x)).chunk(2, 1)
        return -Beta(a + 0.1, b + 0.1).log_prob(x[:, :1].sigmoid()).mean()

    return fit(KFAC(model), loss)


@script
def two_dropout_passes() -> list[float]:
    """R-Drop: cross-entropy of two passes and the divergence between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x, y = data()

    def loss() -> Tensor:
        a, b = model(x), model(x)
        apart = functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
        return functional.cross_entropy(a, y) + functional.cross_entropy(b, y) + apart

    return fit(KFAC(model), loss)


@script
def spectral_loss() -> list[float]:
    model, (x, _), window = net(6, 64), data(), torch.hann_window(16)
    target = torch.sin(0.3 * torch.arange(64)) * x[:, :1]

    def magnitudes(wave: Tensor) -> Tensor:
        return torch.stft(wave, 16, 4, window=window, return_complex=True).abs()

    def loss() -> Tensor:
        a, b = magnitudes(model(x)), magnitudes(target)
        return functional.l1_loss(a, b) + functional.mse_loss(a, b)

    return fit(KFAC(model), loss)


class Features(nn.Module):
    """The squared difference of the features of a frozen network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
        self.features = features.requires_grad_(False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(self.features(output), self.features(target))


@script
def perceptual_loss() -> list[float]:
    """The loss is a module, which is called again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))
    x, loss_fn = torch.randn(16, 1, 8, 8), Features()
    return fit(KFAC(model, loss_fn), lambda: loss_fn(model(x), -x))


@script
def hardest_examples() -> list[float]:
    class Hardest(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            losses = functional.cross_entropy(output, target, reduction="none")
            return losses.topk(24).values.mean()

    model, (x, y), loss_fn = net(), data(), Hardest()
    return fit(KFAC(model, loss_fn), lambda: loss_fn(model(x), y))


@script
def labelled_and_unlabelled() -> list[float]:
    model, (x, y), u = net(), data(), data(70)[0]

    def loss() -> Tensor:
        out = model(u)
        likely, label = out.detach().softmax(1).max(1)
        own = functional.cross_entropy(out, label, reduction="none")
        return functional.cross_entropy(model(x), y) + 0.1 * (own * (likely > 0.6)).mean()

    return fit(KFAC(model), loss)


@script
def temperature_in_place() -> list[float]:
    model, (x, y) = net(), data()

    def loss() -> Tensor:
        out = model(x)
        out /= 0.8
        return functional.cross_entropy(out, y)

    return fit(KFAC(model), loss)


@script
def gradient_penalty() -> list[float]:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(6, 1)

        def forward(self, real: Tensor, fake: Tensor, between: Tensor) -> tuple[Tensor, ...]:
            between = between.detach().requires_grad_()
            scores = self.net(between)
            (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
            return self.net(real), self.net(fake), slope

    critic = Critic()
    real, fake = torch.randn(32, 6) + 2, torch.randn(32, 6)

    def loss() -> Tensor:
        share = torch.rand(32, 1)
        high, low, slope = critic(real, fake, share * real + (1 - share) * fake)
        return low.mean() - high.mean() + 10 * (slope.norm(2, dim=1) - 1).square().mean()

    return fit(KFAC(critic), loss)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore:Kronecker factors cover:UserWarning")
def test_script_trains(name: str) -> None:
    losses = SCRIPTS[name]()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])


class Translator(nn.Module):
    """A decoder that is given the right word at some places.

    Attributes:
        is_given: Returns whether it is, at a place.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.cell, self.out = nn.Embedding(9, 12), nn.GRUCell(12, 12), nn.Linear(12, 9)
        self.is_given: Callable[[int], bool] = coin
        self.double()

    def forward(self, y: Tensor) -> Tensor:
        state, word, scores = torch.zeros(len(y), 12, dtype=torch.float64), y[:, 0], []
        for place in range(1, y.shape[1]):
            state = self.cell(self.words(word), state)
            scores.append(self.out(state))
            word = y[:, place] if self.is_given(place) else scores[-1].argmax(1)
        return torch.stack(scores, 1)


def coin(_: int) -> bool:
    return random.random() < 0.5


def test_teacher_forcing_by_random_is_replayed() -> None:
    """As with choices that are known beforehand; Python's random state goes on as without."""
    y = torch.randint(1, 9, (24, 5), generator=torch.Generator().manual_seed(0))
    found, states = [], []
    for is_known in (False, True):
        random.seed(3)
        model, loss_fn = Translator(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn)
        for _ in range(7):
            if is_known:
                model.is_given = [False, *map(coin, range(4))].__getitem__
            opt.zero_grad()
            loss_fn(model(y).reshape(-1, 9), y[:, 1:].reshape(-1)).backward()
            opt.step()
        found.append(weights(model))
        states.append(random.getstate())
    assert states[0] == states[1]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
