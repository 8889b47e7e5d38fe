"""Modules without a `forward`, of which Lightning's strategies call a step of the script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC


class Lit(nn.Module):
    """A module with a step of the script, and no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss_fn(self.net(x), y)
        return loss


class _ForwardRedirection:
    """Calls a module, of which `forward` is a method of another name for that call."""

    def __call__(self, module: nn.Module, method: Callable[..., Any], *given: Any) -> Any:
        def wrapped_forward(*args: Any) -> Any:
            del module.forward
            return method(*args)

        module.forward = wrapped_forward
        return module(*given)


def trained(is_redirected: bool, options: dict[str, Any]) -> Tensor:
    module = Lit()
    opt = KFAC(module, module.loss_fn, fisher="exact", factor_update_period=1, **options)
    for number in range(3):
        torch.manual_seed(number)
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        opt.zero_grad()
        step = module.training_step
        loss = _ForwardRedirection()(module, step, x, y) if is_redirected else step(x, y)
        loss.backward()
        opt.step()
    return weights(module)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_a_step_of_the_script_calls_parts(options: dict[str, Any]) -> None:
    assert torch.equal(trained(True, options), trained(False, options))
