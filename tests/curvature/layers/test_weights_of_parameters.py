"""Weights that layers compute from parameters, against their Jacobians by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from einconv_kfac.curvature import coverage, find_layers, kronecker_factors
from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.layers.computed_weight import NamedWeight


class Standardized(nn.Conv2d):
    """As in timm, without gains."""

    __module__, __qualname__ = "timm.layers.std_conv", "StdConv2d"
    eps, scale = 1e-12, 1.0

    def computed(self) -> Tensor:
        rows = self.weight.flatten(1)
        variance = rows.var(1, correction=0, keepdim=True)
        found = (rows - rows.mean(1, keepdim=True)) / (variance + self.eps).sqrt()
        gain: Tensor | float = getattr(self, "gain", 1.0)
        return found.view_as(self.weight) * gain * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.computed(), self.bias)


class Scaled(Standardized):
    """As in timm, with gains."""

    __module__, __qualname__ = "timm.layers.std_conv", "ScaledStdConv2d"
    scale = 0.3

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))


Build = Callable[[], nn.Module]
CASES: dict[str, Build] = {
    "linear": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "one norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4), dim=None),
    "norms of columns": lambda: parametrizations.weight_norm(nn.Linear(3, 4), dim=1),
    "groups": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, (1, 2), groups=2)),
    "inner dimension": lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=2),
    "transposed": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 2, 3)),
    "transposed, outputs": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 2, 3), dim=1),
    "hook": lambda: nn.utils.weight_norm(nn.Conv1d(2, 3, 2)),
    "hook, one norm": lambda: nn.utils.weight_norm(nn.Linear(3, 4), dim=None),
    "standardized": lambda: Standardized(4, 3, 2),
    "standardized, scaled": lambda: Scaled(4, 6, 2, groups=2),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*_norm. is deprecated")


def example(name: str) -> tuple[nn.Module, NamedWeight]:
    """Return a module in evaluation mode with other parameters than at first, and its weight."""
    torch.manual_seed(0)
    model = CASES[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7).add_(torch.randn_like(parameter), alpha=0.1)
    (layer,) = find_layers(model, computed=True)
    assert layer.computed is not None
    return model, layer.computed


class _Weight(nn.Module):
    """Returns the weight of a module."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self) -> Tensor:
        for hook in self.own._forward_pre_hooks.values():
            hook(self.own, ())
        own: Any = self.own
        weight: Tensor = own.computed() if isinstance(own, Standardized) else own.weight
        return weight


def jacobian(model: nn.Module, weight: NamedWeight) -> Tensor:
    """Return ``J``, ``[weight, parameters]``, by automatic differentiation."""
    point = tuple(p.detach() for p in weight.tensors().values())

    def computed(*values: Tensor) -> Tensor:
        named = {f"own.{name}": value for name, value in zip(weight.parameters, values)}
        found: Tensor = functional_call(_Weight(model), named, ())
        return found.flatten()

    rows = torch.autograd.functional.jacobian(computed, point)
    return torch.cat([own.reshape(len(own), -1) for own in rows], dim=1)


def joined(weight: NamedWeight, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in weight.parameters])


@pytest.mark.parametrize("name", CASES)
def test_steps_and_gradients_are_those_of_the_pseudo_inverse(name: str) -> None:
    model, weight = example(name)
    j = jacobian(model, weight)
    inverse = torch.linalg.pinv(j, rtol=1e-6)
    point = {n: p.detach() for n, p in weight.tensors().items()}
    shape = next(iter(point.values())).shape
    update = {n: torch.randn_like(p) for n, p in point.items()}
    step = torch.randn(shape, dtype=torch.float64)
    change = weight.change(point, update).flatten()
    torch.testing.assert_close(change, j @ joined(weight, update))
    torch.testing.assert_close(
        weight.gradient(update).flatten(), inverse.T @ joined(weight, update)
    )
    torch.testing.assert_close(joined(weight, weight.steps(step)), inverse @ step.flatten())
    alone = {
        n: update[n] if n == weight.parameters[0] else torch.zeros_like(p) for n, p in point.items()
    }
    known = {weight.parameters[0]: update[weight.parameters[0]]}
    torch.testing.assert_close(weight.gradient(known), weight.gradient(alone))
    torch.testing.assert_close(weight.change(point, known), weight.change(point, alone))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_module_and_depend_on_no_norm(name: str) -> None:
    model, weight = example(name)
    point = {n: p.detach() for n, p in weight.tensors().items()}
    expected = functional_call(_Weight(model), {}, ())
    torch.testing.assert_close(weight.value(point), expected.detach())
    first = weight.parameters[0]
    size = weight.computed.size(point[first])
    scaled = point[first] * (1 + torch.rand_like(size))
    torch.testing.assert_close(weight.value({**point, first: scaled}), expected.detach())
    torch.testing.assert_close(
        weight.computed.size(scaled / weight.computed.size(scaled)), torch.ones_like(size)
    )


@pytest.mark.parametrize("name", [name for name in CASES if "standard" in name])
def test_changes_of_standardized_weights_with_a_large_constant(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weight = example(name)
    monkeypatch.setattr(Standardized, "eps", 0.1)
    point = {n: p.detach() for n, p in weight.tensors().items()}
    update = {n: torch.randn_like(p) for n, p in point.items()}
    change = weight.change(point, update).flatten()
    torch.testing.assert_close(change, jacobian(model, weight) @ joined(weight, update))
    expected = functional_call(_Weight(model), {}, ())
    torch.testing.assert_close(weight.value(point), expected.detach())


WITH_SCALE = [name for name in CASES if name != "standardized"]


@pytest.mark.parametrize("name", WITH_SCALE)
def test_rows_without_scale_have_bounded_steps(name: str) -> None:
    _, weight = example(name)
    first, scale = weight.tensors().values()
    with torch.no_grad():
        scale.view(-1)[0] = 0
    step = torch.randn_like(first)
    for values in (scale.detach().clone(), torch.zeros_like(scale)):
        for smallest in (0.0, 1e-12, -1e-12):
            with torch.no_grad():
                scale.copy_(values).view(-1)[0] = smallest
            moved, changed = weight.steps(step).values()
            assert float(moved.norm()) <= 1e3 * float(step.norm())
            assert bool(changed.isfinite().all())
            ones = {name: torch.ones_like(p) for name, p in weight.tensors().items()}
            assert bool((weight.gradient(ones).abs() <= 1e4).all())


def test_what_is_covered() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    own, shared, frozen = (nn.Linear(2, 2) for _ in range(3))
    model = nn.ModuleDict(
        {
            "norm": parametrizations.weight_norm(nn.Linear(2, 2)),
            "own": own,
            "frozen": parametrizations.weight_norm(frozen),
            "first": parametrizations.weight_norm(shared),
            "both": parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(2, 2))),
            "spectral": parametrizations.spectral_norm(nn.Linear(2, 2)),
            "embedding": parametrizations.weight_norm(nn.Embedding(3, 2)),
        }
    )
    parametrize.register_parametrization(own, "weight", Doubled())
    frozen.parametrizations.weight.original0.requires_grad_(False)
    (layer,) = find_layers(nn.Sequential(model["norm"]), computed=True)
    assert layer.parameters == (
        "0.parametrizations.weight.original1",
        "0.parametrizations.weight.original0",
        "0.bias",
    )
    assert (layer.weight, layer.layout.weight) == (layer.parameters[0], "0.weight")
    assert [layer.name for layer in find_layers(model, computed=True)] == ["norm", "first"]
    assert not find_layers(model)
    assert all("parametrized" in row.reason for row in coverage(model) if "norm" in row.parameter)
    model["second"] = parametrizations.weight_norm(nn.Linear(2, 2))
    second = model["second"].parametrizations.weight
    second.original1 = shared.parametrizations.weight.original1
    assert [layer.name for layer in find_layers(model, computed=True)] == ["norm"]


@pytest.mark.parametrize("name", CASES)
def test_the_stretch_is_the_mean_square_of_singular_values(name: str) -> None:
    """Of standardized weights, those of the first parameter."""
    model, weight = example(name)
    j = jacobian(model, weight)
    if "standard" in name:
        j = j[:, : next(iter(weight.tensors().values())).numel()]
    values = torch.linalg.svdvals(j)
    squares = values[values > 1e-6].square()
    tolerance = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(weight.stretch(), squares.mean(), **tolerance)


@pytest.mark.parametrize("name", ["linear", "hook"])
def test_calls_with_other_tensors_are_told_apart(name: str) -> None:
    model, weight = example(name)
    x = torch.ones(2, *{"linear": (3,), "hook": (2, 4)}[name], dtype=torch.float64)
    others = {n: 2 * p for n, p in weight.tensors().items()}
    with LayerCapture(find_layers(model, computed=True)) as capture:
        functional_call(model, others, (x,))
        model(x)
        assert [call.has_parameters for call in capture.calls] == [False, True]


def test_blocks_of_parameters_are_refused() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    data = [(torch.randn(4, 3), torch.arange(4) % 2)]
    with pytest.raises(ValueError, match="must have a layer that a rule covers"):
        kronecker_factors(model, nn.CrossEntropyLoss(), data)
