"""Inverses of a thread: when they are used, and what becomes of errors."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from inverse_cases import KINDS, at_step, inverse_steps, layer_states
from optim_cases import conv_net, image_batch, train_step, weights
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.inverses import background

OPTIONS: dict[str, Any] = {
    "fisher": "exact",
    "inverse_update_period": 20,
    "inverse_in_background": True,
}
FIXED: dict[str, Any] = {"lr": 0.1, "adaptive": False}
LOSS = nn.CrossEntropyLoss


class WaitingExecutor(ThreadPoolExecutor):
    """Threads that are waited for at once."""

    def submit(self, *args: Any, **kwargs: Any) -> Future:
        future = super().submit(*args, **kwargs)
        wait([future])
        return future


def trained(steps: range, **options: Any) -> tuple[nn.Module, nn.Module, KFAC]:
    """Return a model, its loss and its optimizer after a range of steps."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **OPTIONS, **options)
    at_step(opt, steps.start)
    for seed in steps:
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    return model, loss_fn, opt


@pytest.mark.parametrize("inverse", KINDS)
def test_used_from_a_step_that_does_not_depend_on_time(
    inverse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, opt = trained(range(1000, 1025), inverse=inverse, **FIXED)
    assert inverse_steps(opt) == {1020}
    monkeypatch.setattr(background, "ThreadPoolExecutor", WaitingExecutor)
    again, *_ = trained(range(1000, 1025), inverse=inverse, **FIXED)
    assert torch.equal(weights(model), weights(again))


def test_used_a_tenth_of_a_period_late() -> None:
    """Period 20: the factors of step 1020 are inverted, and the inverse is used at 1022."""
    model, loss_fn, opt = trained(range(1000, 1022), **FIXED)
    pending = [own["pending"] for own in layer_states(opt).values()]
    assert {(own["begun"], own["due"]) for own in pending} == {(1020, 1022)}
    assert inverse_steps(opt) == {1000}
    train_step(model, loss_fn, opt, image_batch())
    assert {own["pending"] for own in layer_states(opt).values()} == {None}
    assert inverse_steps(opt) == {1020}


def test_errors_surface_when_the_inverse_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, opt = trained(range(1000, 1020), **FIXED)
    with monkeypatch.context() as patched:
        patched.setattr(
            "einconv_kfac.curvature.blocks.cholesky.damped_inverses",
            lambda factors, *_: [None] * len(factors),
        )
        train_step(model, loss_fn, opt, image_batch())
        opt.state_dict()  # waits, and leaves the failure out
        train_step(model, loss_fn, opt, image_batch())
        before = weights(model)
        with pytest.raises(RuntimeError, match="must be positive definite"):
            train_step(model, loss_fn, opt, image_batch())
        assert torch.equal(before, weights(model))
    for _ in range(4):
        train_step(model, loss_fn, opt, image_batch())
    assert inverse_steps(opt) == {1022}


def test_leaves_no_threads() -> None:
    *_, opt = trained(range(1000, 1021))
    opt.state_dict()
    for thread in threading.enumerate():
        if thread.name.startswith("kfac"):
            thread.join(timeout=60)
    assert not any(thread.name.startswith("kfac") for thread in threading.enumerate())
