"""Updates that are not finite, which are never applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.optim.inverses.cholesky import FactoredInverse

FIXED = {"adaptive": False, "lr": 0.1}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make one entry of the third layer's preconditioned gradient NaN."""
    apply = FactoredInverse.apply

    def failing(self: FactoredInverse, rows: Tensor) -> Tensor:
        result = apply(self, rows)
        if rows.shape[-1] == 37:
            result[0, 0, 0] = torch.nan
        return result

    monkeypatch.setattr(FactoredInverse, "apply", failing)
    return monkeypatch


@pytest.mark.parametrize(
    "options",
    [
        {**FIXED},
        {**FIXED, "kl_clip": None, "momentum": 0.0},
        {**FIXED, "nesterov": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"damping": 0.1},
        {},
    ],
)
def test_a_step_that_is_not_finite_is_skipped(
    options: dict[str, Any], broken: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt, before = KFAC(model, loss_fn, **options), weights(model)
    with pytest.warns(RuntimeWarning, match="was not finite.*; the step was skipped"):
        train_step(model, loss_fn, opt, image_batch())
    assert torch.equal(weights(model), before)
    assert not any("momentum_buffer" in state for state in opt.state.values())
    broken.undo()
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_gradients_are_left_where_their_product_is_not_finite(
    broken: pytest.MonkeyPatch,
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    preconditioner, (x, y) = KFACPreconditioner(model, loss_fn), image_batch()
    loss_fn(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match=r"of '5\.weight' was .* left as they were"):
        preconditioner.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before))
