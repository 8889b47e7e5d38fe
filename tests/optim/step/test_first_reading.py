"""Ordinary automatic steps, which begin before it is known whether they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import image_batch, late_training, train_step
from torch import Tensor, nn

from einconv_kfac import KFAC


def tensors(state: Any) -> list[Tensor]:
    """Return copies of all tensors and numbers in nested containers."""
    if isinstance(state, dict):
        return [tensor for key in sorted(state, key=str) for tensor in tensors(state[key])]
    if isinstance(state, (list, tuple)):
        return [tensor for each in state for tensor in tensors(each)]
    if isinstance(state, Tensor):
        return [state.detach().clone()]
    return [torch.tensor(state)] if isinstance(state, (int, float)) else []


def late(**options: Any) -> tuple[nn.Module, nn.Module, KFAC]:
    """Return an optimizer whose coming step needs no fit, late in training."""
    model, loss_fn, opt = late_training(**options)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(32, seed=seed))
    return model, loss_fn, opt


def backward(model: nn.Module, loss_fn: nn.Module, opt: KFAC, factor: float = 1.0) -> None:
    x, y = image_batch(32, seed=7)
    opt.zero_grad()
    (factor * loss_fn(model(x), y)).backward()


OPTIONS = [{}, {"factor_update_period": 1}, {"inverse": "exact"}, {"damping": 0.1}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    options: dict[str, Any], value: float
) -> None:
    model, loss_fn, opt = late(**options)
    backward(model, loss_fn, opt)
    model[-1].weight.grad[0, 0] = value  # type: ignore[index, union-attr]
    before = tensors([model.state_dict(), opt.state_dict()])
    with pytest.warns(RuntimeWarning, match="not finite"):
        opt.step()
    for own, old in zip(tensors([model.state_dict(), opt.state_dict()]), before):
        assert torch.equal(own, old)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_undone_step_leaves_factors_and_inverses(options: dict[str, Any]) -> None:
    model, loss_fn, opt = late(**options)
    old = {
        name: p.detach() - opt.state[p]["momentum_buffer"] for name, p in model.named_parameters()
    }
    before = tensors(opt.state_dict()["kfac"]["preconditioner"]["layers"])
    damping = opt.statistics()["damping"]
    backward(model, loss_fn, opt, factor=1e6)
    opt.step()
    assert opt.statistics()["rejected"] == 1.0
    assert opt.statistics()["damping"] > 3 * damping
    for own, kept in zip(tensors(opt.state_dict()["kfac"]["preconditioner"]["layers"]), before):
        assert torch.equal(own, kept)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), old[name], rtol=1e-12, atol=1e-14)


def test_a_negative_weight_is_refused_and_changes_nothing() -> None:
    model, loss_fn, opt = late()
    before = tensors([model.state_dict(), opt.state_dict()])
    backward(model, loss_fn, opt, factor=-1.0)
    with pytest.raises(RuntimeError, match="negative weight"):
        opt.step()
    for own, old in zip(tensors([model.state_dict(), opt.state_dict()]), before):
        assert torch.equal(own, old)
