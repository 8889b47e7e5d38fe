"""The preconditioner and the weights that a gradient scaler gives to losses."""

from __future__ import annotations

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import nn

from einconv_kfac import KFACPreconditioner

CROSS_ENTROPY = nn.CrossEntropyLoss()


@pytest.mark.parametrize("init_scale", [2.0**7, 2.0**16])
def test_unscaled_gradients_are_preconditioned_as_without_a_scaler(init_scale: float) -> None:
    found = []
    for scale in (None, init_scale):
        model, (x, y) = conv_net(), image_batch()
        preconditioner = KFACPreconditioner(model, CROSS_ENTROPY, fisher="exact")
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            sgd.zero_grad()
            scaler.scale(0.6 * CROSS_ENTROPY(model(x), y)).backward()
            scaler.unscale_(sgd)
            preconditioner.step()
            scaler.step(sgd)
            scaler.update()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_clipping_does_not_change_the_curvature() -> None:
    found = []
    for factor in (1.0, 0.3):
        model, (x, y) = conv_net(), image_batch()
        preconditioner = KFACPreconditioner(model, CROSS_ENTROPY, fisher="exact")
        CROSS_ENTROPY(model(x), y).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        preconditioner.step()
        layers = preconditioner.state_dict()["layers"].values()
        found.append([list(layer["factors"]) for layer in layers])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_scaled_weights_are_refused() -> None:
    model, (x, y) = conv_net(), image_batch()
    preconditioner = KFACPreconditioner(model, CROSS_ENTROPY)
    (2.0**16 * CROSS_ENTROPY(model(x), y)).backward()
    gradient = model[-1].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"less than 1024, got 65536.*unscale_\(optimizer\)"):
        preconditioner.step()
    assert torch.equal(gradient, model[-1].weight.grad)
    model.zero_grad()
    preconditioner.observe(2.0**16 * CROSS_ENTROPY(model(x), y)).backward()
    preconditioner.step()
    assert not torch.equal(gradient, model[-1].weight.grad)
