"""Estimating curvature restores the model and the random state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from einconv_kfac.curvature import kronecker_factors


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)
    )
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model[1].eval()
    model[4].weight.grad = torch.ones(2, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state, (x, y) = torch.get_rng_state(), (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    state = torch.get_rng_state()
    model[1].train()
    factors = kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y)])
    model[1].eval()
    assert factors.parameters == ("1.weight", "1.bias", "4.weight")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[4].weight.grad, torch.ones(2, 4))
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad
    with pytest.raises(ValueError, match="pairs"):
        kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y), x])
    assert not any(module._forward_hooks for module in model.modules())
