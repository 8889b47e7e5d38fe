"""Decoupled weight decay of automatic steps, beside the same steps without it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import nn

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"safeguard": True}, {"damping": 0.1}, {"exclude": ["0"]}],
    ids=str,
)
def test_a_step_shrinks_what_was_there_before_it(options: dict[str, Any]) -> None:
    """Fits, steps between them and the slow momentum are those of the same point without decay."""
    model, loss_fn, rate, decay = conv_net(), nn.CrossEntropyLoss(), 0.7, 0.03
    head = [*model[-1].parameters()]
    groups = [
        {"params": [p for p in model.parameters() if all(p is not own for own in head)]},
        {"params": head, "weight_decay": 0.0},
    ]
    own = {"lr": rate, "params": groups, "decoupled_weight_decay": True, **options}
    opt = KFAC(model, loss_fn, weight_decay=decay, **own)
    kept = sum(p.numel() for p in head)
    shrunk = torch.full_like(weights(model), rate * decay)
    shrunk[-kept:] = 0.0
    for step in range(8):
        batch = image_batch(seed=step)
        twin, state, start = deepcopy(model), opt.state_dict(), weights(model)
        if step == 3:
            state["kfac"]["preconditioner"]["steps"] = 20  # from then on, some steps are not fitted
            opt.load_state_dict(state)
        groups = [{"params": [*twin[:-1].parameters()]}, {"params": [*twin[-1].parameters()]}]
        other = KFAC(twin, loss_fn, lr=rate, params=groups, **options)
        for group in state["param_groups"]:
            group.update(weight_decay=0.0)
        other.load_state_dict(state)
        train_step(twin, loss_fn, other, batch)
        train_step(model, loss_fn, opt, batch)
        torch.testing.assert_close(weights(model), weights(twin) - shrunk * start, **EXACT)


def test_it_is_no_part_of_the_objective() -> None:
    """With weight decay in the objective, gradient and curvature change, and so does the step."""
    found = []
    for decoupled in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, weight_decay=0.2, decoupled_weight_decay=decoupled)
        start = weights(model)
        train_step(model, loss_fn, opt, image_batch())
        found.append((weights(model) - start, opt.statistics()["predicted"]))
    (within, predicted), (beside, alone) = found
    assert not torch.allclose(within, beside, rtol=1e-2)
    assert predicted < alone < 0  # the penalty's own reduction is predicted, too
