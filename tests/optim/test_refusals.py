"""Scripts that are refused by name, whose remedy trains."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from optim_cases import assert_same, weights
from refused_batches import BATCHES
from refused_losses import LOSSES
from refused_models import MODELS
from refused_scripts import good
from torch import Tensor

from einconv_kfac import KFAC
from einconv_kfac.curvature.losses import snapshot

CASES = {**LOSSES, **MODELS, **BATCHES}
assert len(CASES) == len(LOSSES) + len(MODELS) + len(BATCHES)


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all tensors be larger than those of which copies are kept."""
    monkeypatch.setattr(snapshot, "LARGEST_COPY", 0)


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_changes_nothing(name: str) -> None:
    """Neither parameters, state, gradients, nor the next step, where there can be one."""
    case = CASES[name]
    model = case.build()
    opt = KFAC(model, case.loss_fn, **case.options)
    state, before = deepcopy(opt.state_dict()), weights(model)
    gradients: list[Tensor | None] = []

    def refused() -> None:
        case.script(model, opt)
        gradients.extend(None if p.grad is None else p.grad.clone() for p in model.parameters())
        opt.step()

    with pytest.raises((RuntimeError, ValueError), match=case.words):
        refused()
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())
    if gradients:
        assert_same(gradients, [p.grad for p in model.parameters()])
    else:  # by the backward pass, before it
        assert all(p.grad is None for p in model.parameters())
    if not (case.remedied or case.remedied_options) and "curvature_fraction" not in case.options:
        other = case.build()
        twin = KFAC(other, case.loss_fn, **case.options)
        for _ in range(3):
            good(model, opt)
            good(other, twin)
        assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_trains(name: str) -> None:
    case = CASES[name]
    model = (case.remedied or case.build)()
    options = case.options if case.remedied_options is None else case.remedied_options
    opt, losses = KFAC(model, case.loss_fn, **options), []
    for _ in range(5):
        opt.zero_grad()
        loss = case.remedy(model, opt)
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
