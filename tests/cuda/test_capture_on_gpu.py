"""Ordinary steps with fixed rates in CUDA graphs: those that are not captured, without waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, NEEDS_GPU, batches, network, optimizer
from torch import Tensor, nn

pytestmark = NEEDS_GPU
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"nesterov": True, "kl_clip": 1e-2, "max_step_norm": 0.1, "weight_decay": 1e-3},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 1e-2},
    "exact": {"inverse": "exact"},
    "ekfac": {"inverse": "ekfac"},
    "adam": {"exclude": ["0"], "fallback": "adam"},
}


def step(model: nn.Module, loss_fn: nn.Module, opt: Any, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad(set_to_none=True)
    loss: Tensor = loss_fn(model(x), y)
    loss.backward()
    opt.step()
    return loss


def trained(is_captured: bool, **options: Any) -> tuple[list[Tensor], nn.Module]:
    """Return the losses of steps, of which ordinary ones are replayed, and the model."""
    model = network(torch.float64).to(DEVICE)
    lr = torch.full((), 0.1, device=DEVICE, dtype=torch.float64)
    fixed = {"adaptive": False, "capturable": True, "fisher": "exact", "lr": lr}
    periods = {"factor_update_period": 4, "inverse_update_period": 8}
    loss_fn, opt = optimizer(model, **{**fixed, **periods, **options})
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000  # when most steps are ordinary ones
    opt.load_state_dict(state)
    (lr,) = (group["lr"] for group in opt.param_groups)
    data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(18, torch.float64)]
    x, y = (tensor.clone() for tensor in data[0])
    stream, graph, losses = torch.cuda.Stream(), None, []
    for index, (new_x, new_y) in enumerate(data):
        x.copy_(new_x)
        y.copy_(new_y)
        lr.fill_(0.1 if index < 9 else 0.03)
        if is_captured and graph is None and opt.can_replay():
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                static = step(model, loss_fn, opt, x, y)
        if graph is not None and opt.replay(graph):
            losses.append(static.detach().clone())
        else:
            losses.append(step(model, loss_fn, opt, x, y).detach().clone())
    return losses, model


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_are_those_that_are_not_captured(name: str) -> None:
    expected, own = trained(False, **OPTIONS[name])
    found, other = trained(True, **OPTIONS[name])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for p, q in zip(own.parameters(), other.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-10)


def test_an_ordinary_step_waits_for_nothing() -> None:
    model = network().to(DEVICE)
    lr = torch.full((), 0.1, device=DEVICE)
    loss_fn, opt = optimizer(model, adaptive=False, lr=lr, capturable=True)
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 10_000
    opt.load_state_dict(state)
    for x, y in batches(3):
        step(model, loss_fn, opt, x.to(DEVICE), y.to(DEVICE))
    x, y = (tensor.to(DEVICE) for tensor in batches(1)[0])
    assert opt.can_replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, loss_fn, opt, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
