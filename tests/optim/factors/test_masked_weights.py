"""Steps of models whose weights are a parameter times a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from constant_products import MaskedConv, MaskedLinear, PixelConv, ScaledLinear, mask_like
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature import find_layers
from einconv_kfac.optim.factors.visible_factors import visible_factors

BATCH = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
TARGETS = torch.arange(12) % 3


def pruned() -> nn.Sequential:
    layers = nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    for index in (0, 3):
        prune.random_unstructured(layers[index], "weight", 0.4)
    return nn.Sequential(*layers).double()


def masked(convolution: Callable[..., nn.Module] = MaskedConv) -> nn.Sequential:
    layers = convolution(2, 3, 3), nn.Tanh(), nn.Flatten(), MaskedLinear(12, 3)
    return nn.Sequential(*layers).double()


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "pruned": pruned,
    "masked": masked,
    "in place": lambda: masked(PixelConv),
}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of weights, by the name of the parameter."""
    names = {"mask": "weight", "weight_mask": "weight_orig"}
    found = {}
    for name, buffer in model.named_buffers():
        prefix, _, own = name.rpartition(".")
        found[f"{prefix}.{names[own]}"] = buffer.clone()
    return found


def backward(opt: Any, model: nn.Module, x: Tensor = BATCH) -> float:
    """Compute the gradients of a batch."""
    opt.zero_grad()
    loss = opt.observe(nn.functional.cross_entropy(model(x), TARGETS))
    loss.backward()
    return float(loss.detach())


OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "fixed": {"adaptive": False, "lr": 0.1, "weight_decay": 0.01, "momentum": 0.9},
    "ekfac": {"inverse": "ekfac"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_entries_stay(name: str, options: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    opt, losses = KFAC(model, **OPTIONS[options]), []
    generator = torch.Generator().manual_seed(2)
    model(BATCH)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(8):
        noise = torch.randn(BATCH.shape, generator=generator, dtype=torch.float64)
        losses.append(backward(opt, model, BATCH + 0.3 * noise))
        opt.step()
    assert set(opt.coverage().values()) == {"kfac"}
    assert min(losses) < losses[0]
    parameters = dict(model.named_parameters())
    for own, mask in masks(model).items():
        moved = parameters[own].detach() != before[own]
        assert torch.equal(moved, mask.bool())


@pytest.mark.parametrize("is_pruned", [True, False])
def test_masks_may_change_between_steps(is_pruned: bool) -> None:
    torch.manual_seed(0)
    model = pruned() if is_pruned else masked()
    options: Any = {"adaptive": False, "lr": 0.1, "momentum": 0.0, "factor_update_period": 100}
    opt = KFAC(model, **options)
    for step in range(3):
        if is_pruned:
            layers = [(model[index], "weight") for index in (0, 3)]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=0.2)
        else:
            for index in (0, 3):
                model[index].mask = mask_like(model[index].weight, step + 1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        backward(opt, model)
        opt.step()
        parameters = dict(model.named_parameters())
        for own, mask in masks(model).items():
            assert torch.equal(parameters[own].detach() != before[own], mask.bool())


@pytest.mark.parametrize("inverse", ["factored", "exact", "ekfac"])
def test_a_constant_scale_leads_along_the_course_of_plain_layers(inverse: Any) -> None:
    """The damping is that of the parameters, ``scale**2`` times that of the weights."""
    torch.manual_seed(0)
    scale = 0.4
    plain = nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    scaled = nn.Sequential(
        nn.Flatten(),
        ScaledLinear(32, 5, scale, scale),
        nn.Tanh(),
        ScaledLinear(5, 3, scale, scale),
    ).double()
    with torch.no_grad():
        for own, other in zip(plain.parameters(), scaled.parameters()):
            other.copy_(own / scale)
    options: Any = {"adaptive": False, "lr": 0.3, "fisher": "exact", "inverse": inverse}
    opts = [
        KFAC(model, damping=damping, **options)
        for model, damping in ((plain, 0.01), (scaled, 0.01 * scale**2))
    ]
    for _ in range(5):
        losses = [backward(opt, model) for opt, model in zip(opts, (plain, scaled))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
        for opt in opts:
            opt.step()
    for own, other in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(other * scale, own, rtol=1e-9, atol=1e-10)


def test_directions_of_scaled_layers_are_those_of_the_dense_matrix() -> None:
    """For one example, a layer's Kronecker product is its block of the Gauss-Newton matrix."""
    torch.manual_seed(0)
    model, loss_fn = ScaledLinear(4, 3, 0.3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    options: Any = {"fisher": "exact", "adaptive": False, "momentum": 0.0, "inverse": "exact"}
    model.bias.requires_grad_(False)
    opt = KFAC(model, loss_fn, lr=1e-6, damping=0.01, **options)
    before = model.weight.detach().clone()
    loss_fn(model(x), y).backward()
    opt.step()

    def output(weight: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {"weight": weight}, (x,))
        return found

    j = jacrev(output)(before).reshape(3, 12)
    h = hessian(lambda z: loss_fn(z, y))(output(before)).reshape(3, 3)
    matrix = j.T @ h @ j + 0.01 * torch.eye(12, dtype=torch.float64)
    assert model.weight.grad is not None
    expected = -torch.linalg.solve(matrix, model.weight.grad.flatten())
    torch.testing.assert_close((model.weight.detach() - before).flatten() / 1e-6, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_state_continues(name: str) -> None:
    torch.manual_seed(0)
    first = MODELS[name]()
    opt = KFAC(first)
    for _ in range(4):
        backward(opt, first)
        opt.step()
    torch.manual_seed(1)
    second = MODELS[name]()
    other = KFAC(second)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for model, optimizer in ((first, opt), (second, other)):
        backward(optimizer, model)
        optimizer.step()
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_inside_of_checkpoints_the_layers_are_seen_as_outside() -> None:
    class Saved(nn.Module):
        def __init__(self, saves: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own, self.saves = masked(), saves

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.own, x, use_reentrant=False) if self.saves else self.own(x)

    models = [Saved(saves).double() for saves in (True, False)]
    opts = [KFAC(model) for model in models]
    for _ in range(4):
        for opt, model in zip(opts, models):
            backward(opt, model)
            opt.step()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b)


def test_weights_that_are_used_past_their_calls() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = MaskedLinear(32, 3)

        def forward(self, x: Tensor) -> Any:
            rows = x.flatten(1)
            return self.own(rows) + rows.square() @ (self.own.weight * self.own.mask).T

    torch.manual_seed(0)
    model, losses = Tied().double(), []
    opt = KFAC(model)
    for _ in range(6):
        losses.append(backward(opt, model))
        opt.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_preconditioner_of_other_optimizers_leaves_them_alone() -> None:
    preconditioner = KFACPreconditioner(
        nn.Sequential(MaskedLinear(3, 3), nn.Linear(3, 3)), nn.CrossEntropyLoss()
    )
    assert preconditioner.covered() == {"1.weight", "1.bias"}


def test_factors_of_masked_weights_are_of_visible_pairs() -> None:
    """Each entry is multiplied by the share of visible pairs, computed one by one."""
    layer = find_layers(MaskedLinear(4, 3).double(), computed=True)[0]
    a, b = (torch.randn(1, size, size, dtype=torch.float64) for size in (5, 3))
    found = visible_factors(layer, (a, b))
    assert found is not None
    mask = torch.cat([layer.module.mask, torch.ones(3, 1)], 1).double()  # type: ignore[list-item]
    for own, factor, rows in ((found[0], a, mask.T), (found[1], b, mask)):
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                share = (one @ other) / (one.sum() * other.sum()).sqrt() if i != j else 1.0
                torch.testing.assert_close(own[0, i, j], factor[0, i, j] * share)
