"""Losses of tensors inside of the model, and of parts called beside it, against returned ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(16, 5, generator=GENERATOR, dtype=torch.float64)
Z = torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (16,), generator=GENERATOR)
MODES: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fixed": {"lr": 0.1, "adaptive": False},
    "corrected": {"lr": 0.1, "adaptive": False, "inverse": "ekfac"},
    "empirical": {"lr": 0.1, "adaptive": False, "fisher": "empirical"},
}


class Returning(nn.Module):
    """Returns scores, features and the encoding of other inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Any:
        features = self.encoder(x).sin()
        scores = self.head(features)
        return scores, features, scores if z is None else self.encoder(z)


class Storing(Returning):
    """Returns scores only, and keeps the features."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Any:
        scores, self.features, _ = super().forward(x, z)
        return scores


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda features: 0.3 * functional.mse_loss(features, X[:, :4]),
    "magnitudes": lambda features: 0.3 * functional.l1_loss(features, X[:, :4]),
    "balance": lambda features: (features.softmax(1).mean(0) ** 2).sum(),
}


def trained(
    model: Returning, loss: Callable[[Any], Tensor], options: dict[str, Any], *, given: bool = False
) -> Tensor:
    """The parameters after some steps."""
    loss_fn = nn.CrossEntropyLoss() if given else None
    opt = KFAC(model, loss_fn, **{"fisher": "exact", **options})
    for _ in range(3):
        opt.zero_grad()
        opt.observe(loss(model)).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def with_returned(mode: str, name: str) -> Tensor:
    """The parameters where the model returns its features."""

    def loss(model: Returning) -> Tensor:
        scores, features, _ = model(X)
        return functional.cross_entropy(scores, Y) + LOSSES[name](features)

    return trained(Returning(), loss, MODES[mode])


HALF = [
    (mode, name, (i + j) % 2 == 0) for i, mode in enumerate(MODES) for j, name in enumerate(LOSSES)
]
"""Each loss in every mode; with the loss module and without it in turn."""


@pytest.mark.parametrize(("mode", "name", "given"), HALF)
def test_features_that_the_model_keeps_count_as_returned_ones(
    mode: str, name: str, given: bool
) -> None:
    def kept(model: Storing) -> Tensor:
        scores = model(X)
        return functional.cross_entropy(scores, Y) + LOSSES[name](model.features)

    found = trained(Storing(), kept, MODES[mode], given=given)
    torch.testing.assert_close(found, with_returned(mode, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("mode", ["automatic", "fixed"])
def test_a_part_called_after_the_whole_counts_as_inside_of_it(mode: str, given: bool) -> None:
    def inside(model: Returning) -> Tensor:
        scores, _, code = model(X, Z)
        return functional.cross_entropy(scores, Y) + functional.mse_loss(code, Z[:, :4])

    def beside(model: Returning) -> Tensor:
        loss = functional.cross_entropy(model(X)[0], Y)
        return loss + functional.mse_loss(model.encoder(Z), Z[:, :4])

    expected = trained(Returning(), inside, MODES[mode])
    found = trained(Returning(), beside, MODES[mode], given=given)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


class Pairs(nn.Module):
    """Returns the embeddings of pairs; as their loss, if that is given."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Embedding(5, 4).double(), nn.Embedding(5, 4).double()
        self.loss = loss

    def forward(self, pairs: Tensor) -> Any:
        found = self.first(pairs[:, 0]), self.second(pairs[:, 1])
        return found if self.loss is None else self.loss(*found)


def of_products(first: Tensor, second: Tensor) -> Tensor:
    """The loss of a skip-gram model."""
    return -functional.logsigmoid((first * second).sum(1)).mean()


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_inside_of_the_model_of_layers_of_other_kinds(mode: str) -> None:
    pairs, found = torch.randint(5, (16, 2), generator=GENERATOR), []
    for model in (Pairs(of_products), Pairs()):
        opt = KFAC(model, **{"fisher": "exact", **MODES[mode]})
        for _ in range(3):
            opt.zero_grad()
            result = model(pairs)
            loss = of_products(*result) if isinstance(result, tuple) else result
            opt.observe(loss).backward()
            opt.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
