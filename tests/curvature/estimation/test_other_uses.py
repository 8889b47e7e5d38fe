"""Weights that a model uses past the calls of their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from einconv_kfac.curvature import kronecker_factors
from tests import ggn


class Wrapped(nn.Module):
    """Runs a function of a layer and the input.

    Args:
        layer: The layer.
        function: The function.
    """

    def __init__(self, layer: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def transposed(layer: nn.Linear, x: Tensor) -> Tensor:
    """An autoencoder with one weight."""
    return functional.linear(layer(x).tanh(), layer.weight.t())


def derivative(layer: nn.Module, x: Tensor) -> Tensor:
    """A network and its derivative by the input."""
    x = x.detach().requires_grad_()
    u = layer(x).tanh().flatten(1).sum(1, keepdim=True)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.cat([u, slope.flatten(1)], dim=1)


def penalised(layer: nn.Linear, x: Tensor) -> Tensor:
    """An output that grows with the norm of the weight."""
    return layer(x) + layer.weight.square().sum()


def shared_bias(layer: nn.Linear, x: Tensor) -> Tensor:
    """The bias once more."""
    return layer(x).tanh() + layer.bias


def functional_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The same convolution as a module and as a function."""
    return layer(functional.conv2d(x, layer.weight, padding=1).sin()).flatten(1)


def only_functional(layer: nn.Linear, x: Tensor) -> Tensor:
    """No call of the module at all."""
    return functional.linear(x, layer.weight, layer.bias)


def masked(layer: nn.Linear, x: Tensor) -> Tensor:
    """A call of the module with a part of its weight, scaled."""
    mask = torch.arange(layer.weight.numel()).view_as(layer.weight) % 3
    return functional_call(layer, {"weight": layer.weight * mask}, (x,))


def after_a_step(layer: nn.Linear, x: Tensor) -> Tensor:
    """A call of the module after a step of gradient descent on another loss."""
    names, own = zip(*layer.named_parameters())
    loss = functional_call(layer, dict(zip(names, own)), (x.cos(),)).square().sum()
    slopes = torch.autograd.grad(loss, own, create_graph=True)
    moved = {name: p - 0.1 * slope for name, p, slope in zip(names, own, slopes)}
    return functional_call(layer, moved, (x,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], tuple[int, ...]]]
MODELS = {
    "transposed": (lambda: nn.Linear(4, 3), transposed, (3, 4)),
    "derivative": (lambda: nn.Linear(4, 3), derivative, (3, 4)),
    "derivative of a convolution": (lambda: nn.Conv2d(2, 4, 2, groups=2), derivative, (2, 2, 3, 3)),
    "penalised": (lambda: nn.Linear(4, 3), penalised, (3, 4)),
    "shared bias": (lambda: nn.Linear(4, 3), shared_bias, (3, 4)),
    "convolution": (
        lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False),
        functional_convolution,
        (2, 1, 3, 3),
    ),
    "masked": (lambda: nn.Linear(4, 3), masked, (3, 4)),
    "after a step": (lambda: nn.Linear(4, 3), after_a_step, (3, 4)),
    "only functional": (lambda: nn.Linear(4, 3), only_functional, (3, 4)),
}


def dense(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, *, empirical: bool) -> Tensor:
    """The GGN or the empirical Fisher of the layer, ``[g, (co d), (co d)]``, for a mean loss."""
    layer: Any = model.get_submodule("layer")
    names = [name for name, _ in layer.named_parameters()]
    outputs, n = model(x).detach().requires_grad_(), len(x)

    def output(*values: Tensor) -> Tensor:
        own = {f"layer.{name}": value for name, value in zip(names, values)}
        result: Tensor = functional_call(model, own, (x,))
        return result

    found = torch.autograd.functional.jacobian(
        output, tuple(p.detach() for p in layer.parameters())
    )
    rows = ggn.matrix(layer, found[0].flatten(0, 1))
    if len(found) > 1:
        rows = torch.cat([rows, found[1].reshape(*rows.shape[:3], 1)], dim=-1)
    rows = rows.flatten(2)
    if not empirical:
        hessian = ggn.loss_hessian(loss_fn, outputs, y)
        return torch.einsum("fgp,fh,hgq->gpq", rows, hessian, rows)
    (slope,) = torch.autograd.grad(loss_fn(outputs, y), outputs)
    single = torch.einsum("nf,nfgp->ngp", slope, rows.unflatten(0, (n, -1)))
    return torch.einsum("ngp,ngq->gpq", single, single) * n


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input and a target."""
    build, function, shape = MODELS[name]
    torch.manual_seed(0)
    model = Wrapped(build(), function).double()
    x = torch.randn(shape, dtype=torch.float64)
    return model, x, torch.randn_like(model(x).detach())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_have_the_partial_traces_of_the_exact_block(name: str, fisher: Any) -> None:
    model, x, y = case(name)
    loss_fn = nn.MSELoss()
    want = dense(model, loss_fn, x, y, empirical=fisher == "empirical")
    block = kronecker_factors(model, loss_fn, [(x, y)], fisher=fisher)["layer"]
    a, b = block.A, block.B
    whole = want.unflatten(2, (b.shape[-1], -1)).unflatten(1, (b.shape[-1], -1))
    traces = a.diagonal(dim1=1, dim2=2).sum(1), b.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(b * traces[0][:, None, None], torch.einsum("gcded->gce", whole))
    torch.testing.assert_close(a * traces[1][:, None, None], torch.einsum("gcdce->gde", whole))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_diagonal_is_exact(name: str, fisher: Any) -> None:
    model, x, y = case(name)
    loss_fn = nn.MSELoss()
    want = dense(model, loss_fn, x, y, empirical=fisher == "empirical")
    block = kronecker_factors(model, loss_fn, [(x, y)], fisher=fisher, kind="diagonal")["layer"]
    torch.testing.assert_close(block.values.flatten(1), want.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("name", ["transposed", "derivative of a convolution"])
def test_ekfac_has_the_diagonal_in_its_basis(name: str) -> None:
    model, x, y = case(name)
    loss_fn = nn.MSELoss()
    want = dense(model, loss_fn, x, y, empirical=False)
    block = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact", kind="ekfac")["layer"]
    for group, (a, b) in enumerate(zip(block.basis_a, block.basis_b)):
        basis = torch.kron(b, a)
        values = (basis.T @ want[group] @ basis).diagonal()
        torch.testing.assert_close(block.values[group].flatten(), values)


def test_sampled_factors_average_to_the_exact_ones() -> None:
    model, x, y = case("transposed")
    copies = [(own.repeat(100, *[1] * (own.ndim - 1))) for own in (x, y)]
    exact = kronecker_factors(model, nn.MSELoss(), [(x, y)], fisher="exact")["layer"]
    sampled = kronecker_factors(model, nn.MSELoss(), [tuple(copies)], mc_samples=20)["layer"]
    for want, got in ((exact.A, sampled.A), (exact.B, sampled.B)):
        assert (got - want).norm() < 0.1 * want.norm()


def test_sum_loss_counts_examples() -> None:
    model, x, y = case("derivative")
    blocks = [
        kronecker_factors(model, nn.MSELoss(reduction=reduction), [(x, y)], fisher="exact")["layer"]
        for reduction in ("mean", "sum")
    ]
    torch.testing.assert_close(blocks[0].trace() * y.numel(), blocks[1].trace())


class Calls(nn.Module):
    """Calls of many kinds, all of which factors describe."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4, bias=False)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embedding(x))
        x = x + self.attention(x, x.sin(), x)[0]
        x = functional.relu(self.linear(self.linear(x)), inplace=True)
        return self.head(self.convolution(x.mT).mT.sum(1)).tanh_()


def test_calls_of_layers_are_no_other_uses() -> None:
    torch.manual_seed(0)
    model, x = Calls().double(), torch.randint(7, (3, 5))
    y = torch.randn(3, 2, dtype=torch.float64)
    passes = []
    model.head.register_forward_hook(lambda module, _, output: _count_backward(passes, output))
    found = kronecker_factors(model, nn.MSELoss(), [(x, y)], fisher="exact")
    assert len(found) == 7
    assert len(passes) == 2 + 2 + 2, "probes, checks, one for each output, none by example"


def _count_backward(passes: list[None], output: Tensor) -> None:
    """Count the backward passes through a tensor."""
    output.grad_fn.register_prehook(lambda _: passes.append(None))  # type: ignore[union-attr]


def test_uses_in_some_batches_only_are_refused() -> None:
    torch.manual_seed(0)
    model = Wrapped(nn.Linear(3, 3), lambda layer, x: layer(x)).double()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 3).double()) for _ in range(2)]

    def forward(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        output, layer = module(batch[0]), module.get_submodule("layer")
        twice = functional.linear(output, layer.weight) if batch is data[1] else output
        return twice, batch[1]

    with pytest.raises(ValueError, match="'layer' must be used in the same way"):
        kronecker_factors(model, nn.MSELoss(), data, forward=forward)


def test_forward_only_is_refused() -> None:
    model, x, y = case("transposed")
    with pytest.raises(ValueError, match=r"forward-only.*exclude=\['layer'\]"):
        kronecker_factors(model, nn.MSELoss(), [(x, y)], fisher="forward-only")
