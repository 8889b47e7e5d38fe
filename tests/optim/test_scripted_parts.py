"""Models of which TorchScript compiled a part, or the whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors

Compile = Callable[[nn.Module, Tensor], nn.Module]
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"lr": 0.05, "adaptive": False})
CROSS_ENTROPY = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings(
    "ignore:Kronecker factors cover", "ignore:`torch.jit", "ignore::DeprecationWarning"
)


def script(module: nn.Module, _: Tensor) -> nn.Module:
    found: nn.Module = torch.jit.script(module)
    return found


def trace(module: nn.Module, x: Tensor) -> nn.Module:
    found: nn.Module = torch.jit.trace(module, x)  # type: ignore[no-untyped-call]
    return found


def loaded(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a module that was traced, saved and loaded; it has tensors in place of parameters."""
    file = io.BytesIO()
    torch.jit.save(trace(module, x), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    found: nn.Module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator).double()
    return x, (x[:, :3]).argmax(1)


def trained(model: nn.Module, options: dict[str, Any]) -> list[Tensor]:
    """Return the parameters after four steps."""
    (x, y), opt = data(), KFAC(model, CROSS_ENTROPY, **options)
    for _ in range(4):
        opt.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        opt.step()
    opt.remove_hooks()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("compiled", [script, trace])
def test_a_compiled_part_trains_as_a_layer_that_is_left_out(
    compiled: Compile, options: dict[str, Any]
) -> None:
    model = net()
    model[2] = compiled(model[2], torch.ones(2, 6).double())
    expected = trained(net(), {**options, "exclude": "2"})
    torch.testing.assert_close(trained(model, options), expected)


@pytest.mark.parametrize("compiled", [script, trace, loaded])
def test_a_frozen_compiled_part_is_as_any(compiled: Compile) -> None:
    expected, model = net(), net()
    for each in (expected, model):
        each[2].requires_grad_(False)
    model[2] = compiled(model[2], torch.ones(2, 6).double())
    torch.testing.assert_close(trained(model, {}), trained(expected, {}))


@pytest.mark.parametrize("compiled", [script, trace])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: KFAC(model, CROSS_ENTROPY),
        lambda model: KFACPreconditioner(model, CROSS_ENTROPY),
        lambda model: kronecker_factors(model, CROSS_ENTROPY, [data()]),
    ],
)
def test_a_compiled_model_is_refused_by_name(
    compiled: Compile, use: Callable[[nn.Module], object]
) -> None:
    model = compiled(net(), data()[0])
    with pytest.raises(TypeError, match=r"must be a module in Python, got one that TorchScript.*"):
        use(model)
    use(net())


def test_a_model_that_is_trained_is_traced_and_trains_on() -> None:
    """With checks, for which torch traces twice; hooks of layers and parts are there as well."""
    ends, (x, y) = [], data()
    for is_traced in (False, True):
        model = net()
        opt = KFAC(model, CROSS_ENTROPY)
        for _ in range(3):
            opt.zero_grad()
            loss = CROSS_ENTROPY(model(x), y)
            if is_traced:
                torch.testing.assert_close(trace(model, x)(x), model(x), rtol=0, atol=0)
            loss.backward()
            opt.step()
        opt.remove_hooks()
        ends.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_scripting_a_model_that_is_trained_names_both_remedies() -> None:
    (x, _), model, other = data(), net(), net()
    opt = KFAC(model, CROSS_ENTROPY)
    for hooked in (model, model[0], deepcopy(model)):
        with pytest.raises(AttributeError, match=r"optimizer.remove_hooks\(\).*load_state_dict"):
            script(hooked, x)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(script(other, x)(x), model(x))
    opt.remove_hooks()
    torch.testing.assert_close(script(model, x)(x), model(x))
