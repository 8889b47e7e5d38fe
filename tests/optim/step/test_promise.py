"""Steps that promise to reduce the objective by more than there is of it."""

from __future__ import annotations

import pytest
import torch
from optim_cases import train_step
from torch import Tensor, nn
from torch.func import functional_call, jvp

from einconv_kfac import KFAC
from einconv_kfac.optim.step.agreement import LARGEST_NOISE
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER
from einconv_kfac.optim.step.promise import FIRST_STEP

Pair = tuple[Tensor, Tensor]


def pair(seed: int, label: int | None = None) -> Pair:
    """Return two points ``[2, 3]``, and their classes by the first entry or as given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    x[:, 0] += x[:, 0].sign()
    y = x[:, 0].gt(0).long()
    return x, y if label is None else torch.full_like(y, label)


class Shifted(nn.CrossEntropyLoss):
    """A cross entropy plus a constant."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        return super().forward(scores, target) + self.constant


def saturated(constant: float = 0.0) -> tuple[nn.Linear, nn.Module, KFAC]:
    """Return a model that is certain of every class, by pairs of examples of both."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    loss_fn = Shifted(constant) if constant else nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact")
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = FIRST_STEP
    opt.load_state_dict(state)
    for seed in range(3):
        train_step(model, loss_fn, opt, pair(seed))
    with torch.no_grad():
        model.weight.zero_()
        model.weight[1, 0] = 9.0
        model.bias.fill_(1e3)  # the step changes little of the outputs
    opt._step._rollback.accept_(1e6)  # no loss counts as an explosion
    opt._step._agreement.noise = 1.0
    return model, loss_fn, opt


def promised(model: nn.Module, loss_fn: nn.Module, opt: KFAC, batch: Pair) -> tuple[float, float]:
    """Take a step, and return the objective before it, and what it promised by definition."""
    x, y = batch
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    slow = {name: opt.state[p][BUFFER].clone() for name, p in model.named_parameters()}
    opt._step._fit.subspace.drop_()  # a fit is due
    opt._step._agreement.drop_()
    output = model(x)
    loss = loss_fn(output, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    found = opt.statistics()
    update = {
        name: p.detach() - before[name] - found["momentum"] * slow[name]
        for name, p in model.named_parameters()
    }
    _, tangent = jvp(lambda p: functional_call(model, p, x), (before,), (update,))
    p = output.detach().softmax(1)
    centred = tangent - (p * tangent).sum(1, keepdim=True)
    bend = (p * centred.square()).sum() / len(x)
    bend += found["damping"] * sum(own.square().sum() for own in update.values())
    slope = sum((p.grad * update[name]).sum() for name, p in model.named_parameters())
    return loss.item(), -float(slope + bend / 2)


def test_a_step_promises_the_objective_at_most() -> None:
    """Where both classes are wrong, and the softmax has hardly any curvature."""
    model, loss_fn, opt = saturated()
    objective, promise = promised(model, loss_fn, opt, wrong())
    assert promise == pytest.approx(objective, rel=1e-6)


def wrong() -> Pair:
    """Return two points of the second class with the label of the first."""
    x, _ = pair(0)
    x[:, 0] = x[:, 0].abs()
    return x, torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(("noise", "constant"), [(LARGEST_NOISE / 2, 0.0), (1.0, -30.0)])
def test_there_is_no_bound_where_batches_agree_nor_on_negative_objectives(
    noise: float, constant: float
) -> None:
    model, loss_fn, opt = saturated(constant)
    opt._step._agreement.noise = noise
    objective, promise = promised(model, loss_fn, opt, wrong())
    assert promise > 1.5 * (objective - constant)
