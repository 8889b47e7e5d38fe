"""Steps and backward passes inside of a block of autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner


def trained(inside: str, make: Any, options: dict[str, Any]) -> Tensor:
    """Return the weights after two steps; ``inside`` names what runs in the block."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10)]
    model, loss_fn = nn.Sequential(*layers), nn.CrossEntropyLoss()
    opt = make(model, loss_fn, **options)
    sgd = torch.optim.SGD(model.parameters(), 0.05) if make is KFACPreconditioner else None
    for _ in range(2):
        x, y = torch.randn(32, 1, 6, 6), torch.randint(10, (32,))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(x), y)
            if inside in ("backward", "step"):
                loss.backward()
            if inside == "step":
                opt.step()
                assert torch.is_autocast_enabled("cpu")
        if inside == "forward":
            loss.backward()
        if inside != "step":
            opt.step()
        if sgd is not None:
            sgd.step()
    return weights(model)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (KFACPreconditioner, {}),
        (KFACPreconditioner, {"inverse": "ekfac"}),
        (KFAC, {}),
        (KFAC, {"inverse": "exact", "safeguard": True}),
        (KFAC, {"inverse": "ekfac", "factor_fraction": 0.5}),
        (KFAC, {"adaptive": False, "lr": 0.05}),
        (KFAC, {"adaptive": False, "lr": 0.05, "fisher": "empirical"}),
        (KFAC, {"adaptive": False, "lr": 0.05, "fallback": "adam", "nesterov": True}),
    ],
)
def test_a_step_inside_the_block_is_that_outside(make: Any, options: dict[str, Any]) -> None:
    outside = trained("forward", make, options)
    for inside in ("backward", "step"):
        assert torch.equal(trained(inside, make, options), outside)


def test_empirical_fisher_is_of_the_gradients_that_were_backpropagated() -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(16, 4), nn.CrossEntropyLoss()
    opt, found = KFACPreconditioner(model, loss_fn, fisher="empirical"), list[Tensor]()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(64, 16))
        loss = loss_fn(output, torch.randint(4, (64,)))
    output.register_hook(found.append)
    loss.backward()
    opt.step()
    rows = 64 * found[0].double()
    _, b = opt.state_dict()["layers"][""]["factors"]
    torch.testing.assert_close(b[0].double(), rows.mT @ rows / 64, rtol=1e-5, atol=1e-7)
