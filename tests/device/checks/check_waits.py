"""Waits of the host in steps that are not ordinary: at most one, with the processor's values.

These are steps that try dampings, steps that are shortened or undone, others that are fitted and
compared, and the first step, which also checks the model. Eigendecompositions are one more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.comparison import reduction
from einconv_kfac.optim.step.damping.search import DampingSearch

MOST = 1
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}
seen: set[str] = set()
"""Names of the statistics of the last training."""


def curved() -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A regression whose loss is far from quadratic, with four batches that differ."""
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(4, 16, 6, generator=generator, dtype=torch.float64)
    y = 30 * torch.randn(4, 16, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    hidden = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(16, 3)).double(), nn.MSELoss(), [*zip(x, y)]


@contextmanager
def trials_noted() -> Iterator[list[int]]:
    """Note in how many trials of each search the rank was asked for."""
    counts: list[int] = []
    kept = DampingSearch.best_

    def noted(self: DampingSearch, step: int, trials: Any) -> Any:
        tried, counted = trials.trial_, len(counts)
        counts.append(0)

        def trial_(scale: float) -> Any:
            counts[counted] += 1
            return tried(scale)

        trials.trial_ = trial_
        return kept(self, step, trials)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DampingSearch, "best_", noted)
        yield counts


def train(
    case: tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]],
    steps: int,
    factors: dict[int, float],
    is_there: bool,
    **options: Any,
) -> tuple[list[float], list[int], KFAC]:
    """Return losses, waits and the optimizer after steps on one device."""
    model, loss_fn, data = copy.deepcopy(case)
    losses, waits = [], []
    seen.clear()
    with simulated() if is_there else nullcontext() as record:
        if is_there:
            model = to_device(model)
            data = [(to_device(x), to_device(y)) for x, y in data]
        opt = KFAC(model, loss_fn, fisher="exact", **options)
        for step in range(steps):
            x, y = data[step % len(data)]
            opt.zero_grad()
            if record is not None:
                record.reset()
            loss = factors.get(step, 1.0) * loss_fn(model(x), y)
            loss.backward()
            opt.step()
            losses.append(float(held(loss.detach())))
            if record is not None:
                assert not record.mixtures
                waits.append(record.waited)
            seen.update(opt.statistics())
    return losses, waits, opt


def go_on_late_(opt: KFAC) -> None:
    """Let an optimizer go on as after a thousand steps, when periods are no longer short."""
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000
    opt.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "steps", "factors"),
    [
        ({"lr": 8.0}, 6, {}),  # searches that go on beyond the first three trials
        ({"lr": 8.0}, 10, {}),
        ({"inverse_update_period": 4, "factor_update_period": 2}, 5, {}),
        ({"momentum": 0.5, "curvature_fraction": 0.5}, 5, {}),
        ({}, 26, {22: 1e6, 24: 1e-3}),  # a step is undone; coefficients do not hold
        ({"damping": 1e-2, "lr": 2.0}, 7, {3: 1e6, 5: 1e-3}),  # first beyond the outputs' bound
        ({"safeguard": True}, 5, {}),  # compared again with its momentum
        ({"safeguard": True, "lr": 8.0}, 8, {}),  # the momentum is dropped
        ({"safeguard": True, "weight_decay": 1e-3}, 6, {4: 1e6}),
    ],
)
def test_steps_wait_at_most_once(
    options: dict[str, Any], steps: int, factors: dict[int, float]
) -> None:
    case = curved()
    with trials_noted() as here:
        expected, _, own = train(case, steps, factors, False, **options)
    with trials_noted() as there:
        found, waits, other = train(case, steps, factors, True, **options)
    assert max(waits) <= MOST, waits
    assert there == here  # the same trials are compared, though others were made as well
    if options == {"lr": 8.0}:
        assert max(there) > 3
    assert ("rejected" in seen) == (1e6 in factors.values())
    if steps == 10:  # a difference grows tenfold a step, and that of rounding beyond the bounds
        torch.testing.assert_close(torch.tensor(found[:6]), torch.tensor(expected[:6]), **TOLERANCE)
        return
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **TOLERANCE)
    numbers = other.statistics()
    for name, value in own.statistics().items():
        assert numbers[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


EIGEN: list[dict[str, Any]] = [
    {"adaptive": False, "lr": 0.1},
    {},
    {"damping": 1e-2, "lr": 2.0},
    {"safeguard": True, "lr": 8.0},
    {"inverse_update_period": 3, "factor_update_period": 3},  # of fits that are not compared
]
IN_TURN = [
    (("exact", "ekfac")[(index + in_background) % 2], options, in_background)
    for index, options in enumerate(EIGEN)
    for in_background in (False, True)
]
"""Each option with both inverses and both ways, and each inverse in both ways."""


@pytest.mark.parametrize(("inverse", "options", "in_background"), IN_TURN)
def test_eigendecompositions_are_one_wait(
    inverse: str, options: dict[str, Any], in_background: bool
) -> None:
    """However many there are; and none where a thread beside the training loop waits for them.

    All steps are due to invert; the first and those that try dampings invert in the loop itself.
    """
    with simulated() as record, trials_noted() as counts:
        model, loss_fn = to_device(network(torch.float32)), nn.CrossEntropyLoss()
        options = {**options, "inverse_in_background": in_background}
        opt = KFAC(model, loss_fn, inverse=inverse, **options)
        steps = 3
        if "inverse_update_period" in options:
            go_on_late_(opt)
            steps = 7
        for step, batch in enumerate(batches(steps, torch.float32)):
            x, y = map(to_device, batch)
            searches = len(counts)
            opt.zero_grad()
            record.reset()
            loss_fn(model(x), y).backward()
            opt.step()
            assert not record.races
            inverts = not (step and in_background) or len(counts) > searches
            assert record.waited <= MOST + inverts, record.waits


def test_a_late_search_waits_at_most_once() -> None:
    """As every hundredth step does, on the network of the budgets."""
    with simulated() as record, trials_noted() as counts:
        model, loss_fn = to_device(network(torch.float32)), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn)
        waits = []
        for step, batch in enumerate(batches(4, torch.float32)):
            if step == 2:
                go_on_late_(opt)  # the last search is long ago
                opt._step._agreement.noise = 0.0  # as where batches agree
            x, y = map(to_device, batch)
            opt.zero_grad()
            record.reset()
            loss_fn(model(x), y).backward()
            opt.step()
            waits.append(record.waited)
    assert len(counts) == 3
    assert max(waits) <= MOST, waits


@pytest.mark.parametrize("accepted", range(1, 10))
def test_attempts_to_shorten_a_step_do_not_wait(accepted: int) -> None:
    """For each number of attempts, after the last of which the step is taken back."""
    sizes = [(3,), (2, 2)]
    start = {str(i): torch.randn(size, dtype=torch.float64) for i, size in enumerate(sizes)}
    step = {name: torch.randn_like(tensor) for name, tensor in start.items()}
    (left, here), (other, there) = (
        attempted(start, step, accepted, is_there) for is_there in (False, True)
    )
    assert left == other == (0.0 if accepted > 8 else 0.25**accepted)
    assert all(torch.equal(a, b) for a, b in zip(here, there))


def attempted(
    start: dict[str, Tensor], step: dict[str, Tensor], accepted: int, is_there: bool
) -> tuple[float, list[Tensor]]:
    """Return the fraction that is left of a step, and parameters and step, on one device."""
    calls: list[int] = []
    with simulated() if is_there else nullcontext() as record:

        def moved(tensor: Tensor) -> Tensor:
            return to_device(tensor) if is_there else tensor.clone()

        own = {n: moved(t + step[n]) for n, t in start.items()}
        update = {n: moved(t) for n, t in step.items()}
        allowed = moved(torch.zeros((), dtype=torch.float64))

        def value() -> Tensor:
            calls.append(0)
            return allowed + (accepted - len(calls))  # falls to what is allowed

        if record is not None:
            record.reset()
        left = reduction.backtrack_(own, update, value, allowed)
        assert record is None or record.waited == 0
        assert len(calls) == min(accepted + is_there, 8)  # a GPU is one ahead
        return left, held([*own.values(), *update.values()])
