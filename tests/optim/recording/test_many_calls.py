"""Losses of many calls of the model, whose outputs are gone before the loss is observed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.optim.recording import kept_calls
from einconv_kfac.optim.recording.pending_call import PendingCall

CALLS = 20
MODES: list[dict[str, Any]] = [{}, {"adaptive": False, "lr": 0.1, "damping": 0.1}]
KEPT: list[Tensor] = []
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def at_once(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


def buffer(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Calls whose outputs are written into one tensor, as of windows of an image."""
    whole = torch.zeros(CALLS, 3, dtype=x.dtype)
    for index in range(CALLS):
        whole[index : index + 1] += 0.5 * model(x[index : index + 1])
    return functional.cross_entropy(2 * whole, y)


def kept(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    outputs = []
    total = torch.zeros(())
    for one, target in zip(x.split(2), y.split(2)):
        outputs.append(model(one))
        total = total + functional.cross_entropy(outputs[-1], target) / (CALLS // 2)
    KEPT[:] = outputs
    return total


def terms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A sum over calls."""
    total = torch.zeros(())
    for one, target in zip(x.split(2), y.split(2)):
        total = total + functional.cross_entropy(model(one), target) / (CALLS // 2)
    return total


def trained(loss: Loss, options: dict[str, Any], *last: nn.Module) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *last).double()
    opt, x = KFAC(model, fisher="exact", **options), torch.randn(CALLS, 4).double()
    y = torch.arange(CALLS) % 3
    for _ in range(2):
        opt.zero_grad()
        opt.observe(loss(model, x, y)).backward()
        opt.step()
    return weights(model)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is a small one."""
    monkeypatch.setattr(kept_calls, "ENTRIES_WITHOUT_LOSS", 1)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("loss", [buffer, terms])
def test_small_calls_count(loss: Loss, options: dict[str, Any]) -> None:
    torch.testing.assert_close(trained(loss, options), trained(at_once, options))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("loss", [buffer, terms])
@pytest.mark.usefixtures("few")
def test_all_calls_count(loss: Loss, options: dict[str, Any]) -> None:
    """The graph of an output is the last layer's own where nothing follows the layer."""
    last = nn.Softsign()
    torch.testing.assert_close(trained(loss, options, last), trained(at_once, options, last))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("loss", [buffer, terms])
@pytest.mark.usefixtures("few")
def test_calls_that_were_dropped_are_refused_and_the_remedy_works(
    loss: Loss, options: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match=r"more than 8 calls.*outputs.append\(model\(x\)\)"):
        trained(loss, options)
    torch.testing.assert_close(trained(kept, options), trained(at_once, options))


@pytest.mark.parametrize(("entries", "most"), [(kept_calls.ENTRIES_WITHOUT_LOSS, 70), (1, 12)])
def test_calls_without_a_graph_are_dropped(
    entries: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_calls, "ENTRIES_WITHOUT_LOSS", entries)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt, y = KFAC(model), torch.arange(6) % 3
    given = []
    for _ in range(100):
        x = torch.zeros(6, 4)
        given.append(weakref.ref(x))
        model(x)
    del x
    assert sum(reference() is not None for reference in given) < most
    opt.observe(functional.cross_entropy(model(torch.randn(6, 4)), y)).backward()
    opt.step()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("given", [False, True])
def test_parts_that_were_read_before_the_sum(given: bool, options: dict[str, Any]) -> None:
    """Losses of examples, each read when it was computed, and summed when the output is gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    of_examples = nn.CrossEntropyLoss(reduction="none")
    opt = KFAC(model, of_examples if given else None, fisher="exact", **options)
    x, y = torch.randn(CALLS, 4).double(), torch.arange(CALLS) % 3

    def part(one: Tensor, target: Tensor) -> Tensor:
        whole = of_examples(model(one), target).sum() / CALLS
        return whole if given else opt.observe(whole)

    for _ in range(2):
        opt.zero_grad()
        parts = [part(*batch) for batch in zip(x.split(8), y.split(8))]
        opt.observe(torch.stack(parts).sum()).backward()
        opt.step()
    torch.testing.assert_close(weights(model), trained(at_once, options))


def test_the_calls_of_an_episode_are_not_looked_at_for_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, is_alive = [0], PendingCall.is_alive.fget

    def counted(call: PendingCall) -> bool:
        looked[0] += 1
        assert is_alive is not None
        return is_alive(call)

    monkeypatch.setattr(PendingCall, "is_alive", property(counted))
    model, count = nn.Linear(4, 2), 400
    opt, x = KFAC(model), torch.randn(1, 4)
    outputs = [model(x) for _ in range(count)]
    opt.remove_hooks()
    assert len(outputs) == count
    assert looked[0] <= count**2 / 4  # rather than about count**2
