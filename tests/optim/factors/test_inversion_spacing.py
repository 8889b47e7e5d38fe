"""Inversions early in training, where they take more operations than passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import train_step, weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac import KFAC
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, Task

SIZE = 256
"""Rows of a factor that counts."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 16, bias=False), nn.Tanh(), nn.Linear(16, 2))


def batch(seed: int = 0, size: int = 130) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, SIZE, generator=generator)
    return x, (x[:, 0] > 0).long()


def inversions(monkeypatch: pytest.MonkeyPatch, steps: int, **settings: Any) -> list[int]:
    """Return how often each step inverts."""
    counts, kept = [0] * steps, Kind.timed

    def counted(kind: Kind, tasks: Sequence[Task]) -> list[Inverted]:
        counts[step] += 1
        return kept(kind, tasks)

    monkeypatch.setattr(Kind, "timed", counted)
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **settings)
    for step in range(steps):
        train_step(model, loss_fn, opt, batch(step))
    return counts


@pytest.mark.parametrize(
    ("build", "shape", "sizes"),
    [
        (lambda: nn.Linear(SIZE, SIZE + 8, bias=False), (3, SIZE), [SIZE, SIZE + 8]),
        (lambda: nn.Linear(SIZE, 3, bias=False), (2, 5, SIZE), [SIZE]),
        (lambda: nn.Conv2d(32, 4, 3, 2, 1, bias=False), (2, 32, 6, 6), [288]),
        (lambda: nn.ConvTranspose2d(32, 4, 3, 2, bias=False), (2, 32, 3, 3), [288]),
    ],
)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_passes_take_as_many_operations_as_an_inversion(
    build: Callable[[], nn.Module], shape: tuple[int, ...], sizes: list[int], approximation: str
) -> None:
    """The operations of the passes are those that torch counts."""
    model, loss_fn = nn.Sequential(build(), nn.Flatten()), nn.MSELoss()
    x = torch.randn(shape, requires_grad=True)
    with FlopCounterMode(display=False) as passes:
        model(x).sum().backward()
    opt = KFAC(model, loss_fn, adaptive=False, lr=0.1, approximation=approximation)
    train_step(model, loss_fn, opt, (x, torch.zeros_like(model(x))))
    expected = sum(size**3 for size in sizes) // passes.get_total_flops()
    assert opt._preconditioner.inversions.spacing == expected > 1


def test_small_factors_do_not_count() -> None:
    model, loss_fn = nn.Sequential(nn.Linear(SIZE - 2, 2)), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, adaptive=False, lr=0.1)
    train_step(model, loss_fn, opt, (torch.randn(1, SIZE - 2), torch.zeros(1, dtype=torch.long)))
    assert opt._preconditioner.inversions.spacing == 1


@pytest.mark.parametrize("settings", [{}, {"adaptive": False, "lr": 0.1}])
def test_costly_inversions_wait(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Five steps take as many operations as an inversion; a search tries two dampings more."""
    found = inversions(monkeypatch, 20, **settings)
    assert [step for step, count in enumerate(found) if count] == [0, 1, 2, 3, 5, 9, 14, 19]
    searched = [] if settings else [0, 5, 9, 19]
    assert {step for step, count in enumerate(found) if count > 1} == set(searched)
    assert max(found) <= 3


def test_a_given_period_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"adaptive": False, "lr": 0.1, "inverse_update_period": 1}
    assert inversions(monkeypatch, 4, **settings) == [1, 1, 1, 1]


def test_a_resumed_run_inverts_at_the_same_steps() -> None:
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, factor_update_period=3)
    for step in range(31):  # factors and inverses are of step 30
        train_step(model, loss_fn, opt, batch(step))
    copied = deepcopy(model)
    other = KFAC(copied, loss_fn, factor_update_period=3)
    other.load_state_dict(opt.state_dict())
    for step in range(31, 33):
        train_step(model, loss_fn, opt, batch(step))
        train_step(copied, loss_fn, other, batch(step))
        assert torch.equal(weights(model), weights(copied))
