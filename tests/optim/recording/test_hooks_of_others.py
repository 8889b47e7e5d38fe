"""Hooks of users, before and after those of the optimizer, on the model and on its layers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac import KFAC

Attach = Callable[[nn.Sequential], object]


def triple(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 3 * output


def double(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


def ignore(*_: object) -> None:
    """Return nothing."""


PAIRS: dict[str, tuple[Attach, Attach]] = {
    "output of a layer": (
        lambda m: m[1].register_forward_hook(triple),
        lambda m: m[0].register_forward_hook(triple),
    ),
    "input of a layer": (
        lambda m: m[2].register_forward_hook(lambda _, __, y: 2 * y),
        lambda m: m[3].register_forward_pre_hook(double),
    ),
    "output of the model": (
        lambda m: m[4].register_forward_hook(triple),
        lambda m: m.register_forward_hook(triple),
    ),
    "input of the model": (
        lambda m: m[0].register_forward_pre_hook(double),
        lambda m: m.register_forward_pre_hook(double),
    ),
    "gradients of a layer": (ignore, lambda m: m[3].register_full_backward_hook(ignore)),
    "gradients of the model": (ignore, lambda m: m.register_full_backward_hook(ignore)),
}


def trained(attach: Attach, *, late: bool, **options: Any) -> Tensor:
    """The parameters after some steps."""
    torch.manual_seed(0)
    parts = nn.Linear(4, 6), nn.Identity(), nn.Tanh(), nn.Linear(6, 1), nn.Identity()
    model = nn.Sequential(*parts).double()
    x, y = torch.randn(32, 4).double().requires_grad_(), torch.randn(32, 1).double()
    if not late:
        attach(model)
    loss_fn = nn.MSELoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    if late:
        attach(model)
    for _ in range(3):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


MODES: list[dict[str, Any]] = [{}, {"adaptive": False, "lr": 0.01}]
IN_TURN = [
    (name, late, MODES[(index + late) % 2])
    for index, name in enumerate(PAIRS)
    for late in (False, True)
]
"""Each hook before and after the optimizer; modes in turn, each with all hooks and both orders."""


@pytest.mark.parametrize(("name", "late", "options"), IN_TURN)
def test_same_function_trains_alike(name: str, late: bool, options: dict[str, Any]) -> None:
    plain, hooked = PAIRS[name]
    torch.testing.assert_close(
        trained(hooked, late=late, **options), trained(plain, late=late, **options)
    )


def test_an_earlier_optimizer_may_be_collected_in_a_forward_pass() -> None:
    model, loss_fn = nn.Sequential(nn.Linear(4, 1)), nn.MSELoss()
    opts = [KFAC(model, loss_fn)]

    def collect(*_: object) -> None:
        if len(opts) > 1:  # in the first of the passes
            del opts[:-1]
            gc.collect()

    model[0].register_forward_hook(collect, prepend=True)
    opts.append(KFAC(model, loss_fn))
    before = model[0].weight.detach().clone()
    loss_fn(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    opts[-1].step()
    assert len(opts) == 1
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("options", MODES)
def test_operations_may_be_counted(options: dict[str, Any]) -> None:
    with FlopCounterMode(display=False) as counted:
        found = trained(ignore, late=False, **options)
    torch.testing.assert_close(found, trained(ignore, late=False, **options))
    assert counted.get_total_flops() > 0


def test_hooks_for_all_modules_may_change_outputs() -> None:
    handle = register_module_forward_hook(triple)
    try:
        with pytest.raises(ValueError, match="not for all modules"):
            trained(ignore, late=False)
    finally:
        handle.remove()
