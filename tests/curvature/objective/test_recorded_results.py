"""A loss through another network, as a discriminator or features, at other outputs of the model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.curvature.objective.tail import Tail

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Residual(nn.Module):
    """A residual block with positive parts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.first(x)))
        return self.relu(self.norm(self.second(h)) + h).mean((2, 3))


def convolutions(*between: nn.Module, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), *between, nn.Conv2d(4, 1, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: convolutions(nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True)),
    "batch norm, positive part": lambda: convolutions(nn.BatchNorm2d(4), nn.ReLU()),
    "instance norm": lambda: convolutions(nn.InstanceNorm2d(4), nn.ReLU()),
    "group norm": lambda: convolutions(nn.GroupNorm(2, 4), nn.ReLU()),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 1)
    ),
    "layer norm without scale": lambda: nn.Sequential(
        nn.LayerNorm([8, 8], eps=0.3, elementwise_affine=False), nn.ReLU(), nn.Conv2d(3, 1, 3)
    ),
    "features": lambda: convolutions(nn.ReLU(), nn.MaxPool2d(2)),
    "without bias": lambda: convolutions(nn.ReLU(), bias=False),
    "linear layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.PReLU(), nn.Linear(5, 3), nn.CELU()
    ),
    "residual": Residual,
    "bicubic": lambda: nn.Upsample(scale_factor=0.5, mode="bicubic"),
    "shuffled": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Softshrink(0.1)),
}


def network(name: str, *, training: bool = True) -> nn.Module:
    torch.manual_seed(1)
    found = NETWORKS[name]().double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    for _ in range(3):
        found(X)  # statistics for evaluation
    return found.train(training)


def loss_of(result: Tensor) -> Tensor:
    return functional.softplus(-result).mean()


def tail_of(other: Callable[[Tensor], Tensor], x: Tensor = X) -> Tail:
    output = x.clone().requires_grad_() * 1.0
    mark_(output, "test", output.detach())
    loss = loss_of(other(output))
    given = edge_of(loss), loss.detach(), torch.ones_like(loss)
    reading = Reading(*given, lambda edge: mark_of(edge, "test"), {})
    tail = reading.tail(reading.graph.sources)
    loss.backward()
    return tail


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_at_other_outputs(name: str, training: bool) -> None:
    other, moved = network(name, training=training), X + 0.3 * X.flip(0)
    tail = tail_of(other)
    assert not tail.unknown()
    torch.testing.assert_close(tail.value([moved]), loss_of(other(moved)), rtol=1e-9, atol=1e-12)


LARGEST: dict[str, Callable[[Tensor], Tensor]] = {
    "entries": lambda o: o.max(1).values,
    "smallest, kept": lambda o: o.min(1, keepdim=True).values,
    "distances": lambda o: torch.cdist(o, o + 1).max(1).values,
    "squares": lambda o: (o - 1).square().max(1).values,
    "sums of squares": lambda o: (o[:, None] - o).pow(2).sum(-1).max(1).values,
    "roots of means": lambda o: (o[:, None] - o).pow(2).mean(-1).add(1e-3).sqrt().max(1).values,
    "products": lambda o: (o @ o.T).min(1).values,
}


@pytest.mark.parametrize("name", LARGEST)
def test_largest_entries_along_a_dimension(name: str) -> None:
    x, moved, largest = X.flatten(1), (X + 0.3 * X.flip(0)).flatten(1), LARGEST[name]
    found = tail_of(largest, x).value([moved])
    torch.testing.assert_close(found, loss_of(largest(moved)), rtol=1e-9, atol=1e-12)


def test_zeros_stay_where_a_shift_is_that_of_no_layer() -> None:
    """Tensors that are the parameters of no module; the second channel is positive nowhere."""
    weight, shift = torch.full((2, 3, 3, 3), 0.1).double(), torch.tensor([9.0, -9.0]).double()

    def other(x: Tensor) -> Tensor:
        return functional.relu(functional.conv2d(x, weight, shift))

    found, moved, beyond = tail_of(other), X + 0.3 * X.flip(0), X + 50
    torch.testing.assert_close(found.value([moved]), loss_of(other(moved)), rtol=1e-9, atol=1e-12)
    zeros = torch.zeros_like(other(beyond)[:, 1])
    kept = torch.stack([other(beyond)[:, 0], zeros], 1)
    torch.testing.assert_close(found.value([beyond]), loss_of(kept), rtol=1e-9, atol=1e-12)


FROZEN = [
    "batch norm", "instance norm", "without bias", "bicubic", "features",
    "batch norm, positive part", "linear layers",
]  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_networks(name: str) -> None:
    other, moved = network(name).requires_grad_(False), X + 0.3 * X.flip(0)
    found = tail_of(other).value([moved])
    torch.testing.assert_close(found, loss_of(other(moved)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_a_gpu(training: bool) -> None:
    norm = nn.BatchNorm2d(3, eps=0.1).double().train(training)
    norm.running_mean, norm.running_var = torch.rand(3).double(), torch.rand(3).double()
    names = {"weight": norm.weight, "running_mean": norm.running_mean}
    names |= {"running_var": norm.running_var, "training": training, "epsilon": 0.1}
    node = SimpleNamespace(**{f"_saved_{name}": value for name, value in names.items()})
    function = NODE_RULES["CudnnBatchNorm"].function(node)
    assert function is not None
    torch.testing.assert_close(function(X), norm(X))
