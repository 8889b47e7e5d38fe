"""Inputs without a dimension of examples: the steps of batches of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ggn import jacobian
from optim_cases import weights
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(3, 2, 4, 4, generator=GENERATOR, dtype=torch.float64)
SEQUENCES = torch.randn(3, 3, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (3,), generator=GENERATOR)
R = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)

Add = Callable[[Tensor], Tensor]
"""Adds a dimension of examples, or returns the tensor as it is."""


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return self.actor(x).softmax(-1), self.critic(x)


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.mean = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.log_deviation = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Normal:
        return Normal(self.mean(self.norm(self.body(x)).tanh()), self.log_deviation.exp())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.conv(x).tanh().mean((-1, -2)))
        return scores


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.lstm(x)[1][0][-1])
        return scores


class Squeezed(nn.Module):
    """A model that adds the dimension itself, and takes it away again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x.reshape(-1, 4))
        return scores.squeeze(0) if x.ndim == 1 else scores


class Weights(nn.Module):
    """A model whose weight for a batch is computed from a latent vector."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 12)

    def forward(self, x: Tensor, add: Add) -> Tensor:
        weight: Tensor = self.layer(add(self.latent))
        return x @ weight.reshape(4, 3)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def total(loss: Callable[[Any, int], Tensor], inputs: Tensor = X) -> Callable[..., Tensor]:
    """The sum of a loss of outputs and of the number of an input, over calls with single ones."""

    def of(model: nn.Module, add: Add) -> Tensor:
        return torch.stack([loss(model(add(x)), i).sum() for i, x in enumerate(inputs)]).sum()

    return of


def scores(o: Tensor, i: int) -> Tensor:
    return functional.cross_entropy(o.reshape(1, 3), Y[i : i + 1])


def actor_critic(o: Any, i: int) -> Tensor:
    probabilities, value = o
    chosen = Categorical(probabilities).log_prob(Y[i].reshape(probabilities.shape[:-1]))
    return -chosen * (R[i, 0] - value.item()) + functional.smooth_l1_loss(
        value, R[i, 0].expand(value.shape)
    )


def beside_a_batch(model: nn.Module, add: Add) -> Tensor:
    single = functional.cross_entropy(model(add(X[0])).reshape(1, 3), Y[:1])
    return 0.3 * single + functional.cross_entropy(model(X), Y)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "actor and critic": (ActorCritic, total(actor_critic)),
    "normal distribution": (Gaussian, total(lambda o, i: -o.log_prob(R[i]) * R[i, 0])),
    "squared error": (plain, total(lambda o, i: (o - R[i]).square().mean())),
    "by hand": (plain, total(lambda o, i: o.exp().sum().log() - o.flatten()[Y[i]])),
    "absolute error": (plain, total(lambda o, i: (o - R[i]).abs().mean())),
    "image": (Images, total(scores, IMAGES)),
    "sequence": (Recurrent, total(scores, SEQUENCES)),
    "cell": (lambda: nn.GRUCell(4, 3), total(scores)),
    "within the model": (Squeezed, total(scores)),
    "tokens": (lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)), total(scores, Y)),
    "weights": (Weights, lambda model, add: functional.cross_entropy(model(X, add), Y)),
    "beside a batch": (plain, beside_a_batch),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "empirical": {"adaptive": False, "lr": 0.1, "fisher": "empirical"},
    "ekfac": {"adaptive": False, "lr": 0.1, "inverse": "ekfac"},
    "reduce": {"adaptive": False, "lr": 0.1, "approximation": "reduce"},
    "forward only": {"fisher": "forward-only"},
}


def trained(
    build: Callable[[], nn.Module], loss: Callable[..., Tensor], add: Add, **own: Any
) -> Any:
    torch.manual_seed(0)
    model = build().double()
    opt = KFAC(model, **{"fisher": "exact", **own})
    for _ in range(2):
        opt.zero_grad()
        opt.observe(loss(model, add)).backward()
        opt.step()
    return weights(model)


RUNS = [
    *((case, kind) for case in CASES for kind in ("automatic", "empirical")),
    *((case, kind) for case in ("actor and critic", "image") for kind in [*OPTIONS][2:]),
]


@pytest.mark.parametrize(("case", "kind"), RUNS)
def test_steps_are_those_of_batches_of_one(case: str, kind: str) -> None:
    options = OPTIONS[kind]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss has no curvature", UserWarning)
        got = trained(*CASES[case], lambda x: x, **options)
        expected = trained(*CASES[case], lambda x: x.unsqueeze(0), **options)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")], ids=str
)
def test_loss_modules_take_unbatched_outputs(loss_fn: nn.Module) -> None:
    targets: Any = Y if isinstance(loss_fn, nn.CrossEntropyLoss) else R.sigmoid()
    results = []
    for add in (lambda x: x, lambda x: x.unsqueeze(0)):
        torch.manual_seed(0)
        model = plain().double()
        opt = KFAC(model, loss_fn, fisher="exact")
        for i in range(3):
            opt.zero_grad()
            loss_fn(model(add(X[i])), add(targets[i])).backward()
            opt.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_last_layer_has_the_gauss_newton_matrix() -> None:
    model = plain().double()
    found = kronecker_factors(
        model, None, [X[0]], fisher="exact", forward=lambda net, x: scores(net(x), 0)
    )
    p = model(X[:1]).softmax(1).detach()[0]
    rows = jacobian(model, "2", X[:1])
    expected = torch.einsum("fgp,fh,hgq->gpq", rows, p.diag() - p.outer(p), rows)
    torch.testing.assert_close(found["2"].to_dense(), expected, check_dtype=False)


class Products(Weights):
    """A model with products of a batch and an output of an unbatched call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, add: Add) -> Tensor:
        return x @ self.layer(add(self.latent)).flatten()


def test_outputs_that_may_be_batches_are_refused() -> None:
    def loss(model: nn.Module, add: Add) -> Tensor:
        return functional.mse_loss(model(X, add), R[:, 0])

    with pytest.raises(ValueError, match=r"unbatched inputs of \['layer'\].*`x.unsqueeze\(0\)`"):
        trained(Products, loss, lambda x: x)
    trained(Products, loss, lambda x: x.unsqueeze(0))
