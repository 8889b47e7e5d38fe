"""Whether batches agree on the objective: the floor of the damping on batches that repeat."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from optim_cases import train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.agreement import DISAGREEMENT_PERIOD, Agreement

STEPS = 25
WEIGHT_DECAY = 0.01


def model() -> nn.Sequential:
    """Return a network with curved activations, whose slopes change along a step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return a wave at points ``[40, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    return x, (3 * x).sin().sum(1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"weight_decay": WEIGHT_DECAY}, {"safeguard": True}])
def test_there_is_no_floor_where_the_batch_repeats(options: dict[str, float]) -> None:
    """Though the slopes on it are not confirmed: the objective is not quadratic."""
    net, loss_fn = model(), nn.MSELoss()
    opt = KFAC(net, loss_fn, fisher="exact", **options)
    noise, dampings = [], []
    for _ in range(STEPS):
        train_step(net, loss_fn, opt, batch(0))
        noise.append(1 - opt._step._trust.fraction)
        dampings.append(opt._step._rule.damping(0))
    assert opt._step._agreement.noise == 0
    assert max(noise[2:]) > 0.01
    assert min(dampings) < 0.1 * opt._step._rule.floor


def test_the_floor_holds_where_batches_differ() -> None:
    net, loss_fn = model(), nn.MSELoss()
    opt = KFAC(net, loss_fn, fisher="exact")
    for seed in range(STEPS):
        x, y = batch(seed)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(100 + seed))
        train_step(net, loss_fn, opt, (x, y + noise))
        if seed:
            assert opt._step._agreement.noise > 0
            assert opt._step._rule.damping(0) >= opt._step._rule.floor * (1 - 1e-12)


def test_the_floor_holds_where_slopes_are_confirmed() -> None:
    """Batches differ little in the direction of descent, and more than a step reduces."""
    torch.manual_seed(0)
    net, loss_fn = nn.Linear(2, 1, bias=False).double(), nn.MSELoss()
    opt = KFAC(net, loss_fn, fisher="exact", lr=0.05, momentum=0.0)
    for seed in range(STEPS):
        x, _ = batch(seed)
        x[:, 0] = 1.0  # the slope along the first weight is that of all batches
        train_step(net, loss_fn, opt, (x, 10 + x[:, 1:]))
    assert opt._step._trust.fraction > 0.9
    assert opt._step._rule.damping(0) >= opt._step._rule.floor * (1 - 1e-12)


@pytest.mark.parametrize("options", [{}, {"weight_decay": WEIGHT_DECAY}, {"momentum": 0.5}])
def test_the_noise_is_its_definition(options: dict[str, float]) -> None:
    """From the objectives of two batches before and after a step."""
    net, loss_fn = model(), nn.MSELoss()
    opt = KFAC(net, loss_fn, fisher="exact", **options)

    def objective(seed: int) -> float:
        x, y = batch(seed)
        square = sum(float(p.detach().square().sum()) for p in net.parameters())
        return float(loss_fn(net(x), y).detach()) + options.get("weight_decay", 0.0) / 2 * square

    for seed in range(3):
        before = objective(seed)
        train_step(net, loss_fn, opt, batch(seed))
        after, following = objective(seed), objective(seed + 1)
        own = Agreement()
        own.load_state_dict(opt._step._agreement.state_dict())
        if own.state_dict()["expected"] is None:  # not compared in this step
            continue
        own.sample_(following)
        expected = min(abs(following - after) / abs(before - after), 1.0)
        assert own.noise == pytest.approx(expected, rel=1e-9)
    assert opt._step._agreement.state_dict()["compared"] is not None


def sampled(before: float, after: float, value: float, rounding: float = 0.0) -> float:
    agreement = Agreement()
    agreement.expect_(before, after, rounding, 0)
    agreement.sample_(value)
    return agreement.noise


def test_the_noise_is_at_most_one_and_none_within_rounding() -> None:
    assert sampled(3.0, 1.0, 1.5) == 0.25
    assert sampled(3.0, 1.0, 0.5) == 0.25
    assert sampled(3.0, 1.0, 9.0) == 1
    assert sampled(1.0, 1.0, 1.1) == 1
    assert sampled(1.0, 1.0, 1.1, rounding=0.1) == 0
    for wrong in (math.nan, math.inf):
        assert sampled(3.0, wrong, 1.0) == sampled(3.0, 1.0, wrong) == 1


def test_batches_that_disagree_are_compared_less_and_less_often() -> None:
    agreement, compared = Agreement(), []
    for step in range(500):
        if agreement.is_due(step):
            compared.append(step)
            agreement.expect_(1.0, 0.9, 0.0, step)
            agreement.sample_(2.0)
    gaps = [after - before for before, after in pairwise(compared)]
    assert len(compared) < 20
    assert max(gaps) == gaps[-1] == DISAGREEMENT_PERIOD
    agreement.expect_(1.0, 0.9, 0.0, 500)
    agreement.sample_(0.9)
    assert agreement.is_due(501)


def test_a_state_goes_on_where_it_was() -> None:
    agreement, again = Agreement(), Agreement()
    agreement.expect_(3.0, 1.0, 0.0, 7)
    again.load_state_dict(agreement.state_dict())
    again.sample_(1.5)
    assert (again.noise, again.is_due(8)) == (0.25, False)
    assert agreement.noise == 1
