"""What models return and where they send examples: the step is that of the plain script."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-8, "atol": 1e-10}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)
Loss = Callable[[nn.Module, Any], Tensor]


class Net(nn.Module):
    """A network whose scores are returned in some form.

    Args:
        returned: Makes what it returns.
    """

    def __init__(self, returned: Callable[[Tensor], Any] = lambda scores: scores) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.returned = (
            nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
            returned,
        )

    def forward(self, x: Tensor) -> Any:
        return self.returned(self.net(x))


def trained(model: nn.Module, loss: Loss, count: int = 6, **options: Any) -> Tensor:
    model.double()
    opt = KFAC(model, fisher="exact", **options)
    for _ in range(count):
        opt.zero_grad()
        opt.observe(loss(model, X)).backward()
        opt.step()
    return weights(model)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), Y)


def log_probabilities(scores: Tensor) -> Tensor:
    return scores - scores.logsumexp(-1, keepdim=True)


def likelihood(model: nn.Module, x: Tensor) -> Tensor:
    return -model(x).gather(1, Y[:, None]).mean()


RETURNED: dict[str, tuple[Callable[[Tensor], Any], Loss]] = {
    "attributes": (
        lambda o: SimpleNamespace(scores=o, hidden=None),
        lambda m, x: functional.cross_entropy(m(x).scores, Y),
    ),
    "a distribution": (
        lambda o: Categorical(logits=o),
        lambda m, x: -m(x).log_prob(Y).mean(),
    ),
    "distributions in a tuple": (
        lambda o: (Categorical(logits=o), "name"),
        lambda m, x: -m(x)[0].log_prob(Y).mean(),
    ),
}


@pytest.mark.parametrize("name", RETURNED)
def test_objects_with_tensors(name: str) -> None:
    returned, loss = RETURNED[name]
    same = (Net(), plain) if name == "attributes" else (Net(log_probabilities), likelihood)
    torch.testing.assert_close(trained(Net(returned), loss), trained(*same), **EXACT)


def test_a_distribution_with_two_parameters() -> None:
    class Gaussian(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.whole = nn.Linear(5, 6), whole

        def forward(self, x: Tensor) -> Any:
            mean, log = self.net(x).chunk(2, 1)
            return Normal(mean, log.exp()) if self.whole else (mean, log.exp())

    def by_parts(model: nn.Module, x: Tensor) -> Tensor:
        return -Normal(*model(x)).log_prob(x[:, :3]).mean()

    found = trained(Gaussian(True), lambda m, x: -m(x).log_prob(x[:, :3]).mean())
    torch.testing.assert_close(found, trained(Gaussian(False), by_parts), **EXACT)


def test_a_part_that_returns_one_number() -> None:
    """Part of the model is its loss: centres of classes, which are trained, and their distance."""

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(3, 3))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (z - self.centres[y]).square().sum(1).mean()

    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.centres = Centres()

    def by_part(model: Any, x: Tensor) -> Tensor:
        z = model.net(x)
        return functional.cross_entropy(z, Y) + 0.1 * model.centres(z, Y)

    def by_hand(model: Any, x: Tensor) -> Tensor:
        z = model.net(x)
        distance = (z - model.centres.centres[Y]).square().sum(1).mean()
        return functional.cross_entropy(z, Y) + 0.1 * distance

    model = Both().double()
    before = float(by_hand(model, X).detach())
    trained(model, by_part)
    assert float(by_hand(model, X).detach()) < 0.8 * before


class Experts(nn.Module):
    """Experts, each for the examples whose first entry is in a range.

    Args:
        limits: The upper ends of the ranges; an expert of an empty range has no examples.
    """

    def __init__(self, limits: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.limits = limits
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in limits)

    def forward(self, x: Tensor) -> Tensor:
        output, lower = x.new_zeros(len(x), 3), -torch.inf
        for expert, upper in zip(self.experts, self.limits):
            rows = ((x[:, 0] > lower) & (x[:, 0] <= upper)).nonzero()[:, 0]
            output = output.index_add(0, rows, expert(x[rows]))
            lower = upper
        return output


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_an_expert_without_examples(fisher: str) -> None:
    loss_fn, found = nn.CrossEntropyLoss(), []
    for limits in ((0.0, torch.inf), (0.0, torch.inf, torch.inf)):
        model = Experts(limits).double()
        opt = KFAC(model, loss_fn, fisher=fisher)
        for _ in range(3):
            opt.zero_grad()
            loss_fn(model(X), Y).backward()
            opt.step()
        found.append(weights(model)[: 2 * 18])
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_a_micro_batch_without_examples() -> None:
    loss_fn, found = nn.CrossEntropyLoss(reduction="sum"), []
    for parts in ((slice(24),), (slice(24), slice(0, 0))):
        model = Net().double()
        opt = KFAC(model, loss_fn, fisher="exact")
        for _ in range(3):
            opt.zero_grad()
            for part in parts:
                (loss_fn(model(X[part]), Y[part]) / 24).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("draw", [random.gauss, numpy.random.normal])
def test_random_numbers_of_other_libraries(draw: Callable[[float, float], float]) -> None:
    """A model that scales its input by such a number, and one that is given the same number."""
    scales = iter(())

    class Scaled(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x * draw(1.0, 0.2))

    random.seed(0)
    numpy.random.seed(0)
    scales = iter([draw(1.0, 0.2) for _ in range(6)])
    wanted = trained(Net(), lambda m, x: plain(m, x * next(scales)))
    random.seed(0)
    numpy.random.seed(0)
    torch.testing.assert_close(trained(Scaled(), plain), wanted, **EXACT)
