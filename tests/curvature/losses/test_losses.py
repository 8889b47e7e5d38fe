"""Root vectors of losses against the loss' Hessian by autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ggn import loss_hessian
from loss_samples import DRAWS, sampled_moment
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses import (
    EntrywiseRule,
    evaluate_loss,
    loss_rule,
    register_loss,
)

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
WEIGHTS = torch.tensor([0.3, 1.0, 2.5, 0.7], dtype=torch.float64)


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(0), dtype=torch.float64)


def classes(*shape: int) -> Tensor:
    return torch.randint(4, shape, generator=Generator().manual_seed(1))


def positive(*shape: int) -> Tensor:
    return scores(*shape).abs() + 0.5


def soft(*shape: int) -> Tensor:
    return scores(*shape).softmax(1)


CASES: list[tuple[Any, Tensor, Any]] = [
    (nn.CrossEntropyLoss, scores(5, 4), classes(5)),
    (lambda **k: nn.CrossEntropyLoss(weight=WEIGHTS, **k), scores(5, 4), classes(5)),
    (lambda **k: nn.CrossEntropyLoss(ignore_index=2, **k), scores(8, 4), classes(8)),
    (lambda **k: nn.CrossEntropyLoss(label_smoothing=0.2, **k), scores(5, 4), classes(5)),
    (
        lambda **k: nn.CrossEntropyLoss(WEIGHTS, ignore_index=1, label_smoothing=0.3, **k),
        scores(8, 4),
        classes(8),
    ),
    (nn.CrossEntropyLoss, scores(5, 4), soft(5, 4)),
    (
        lambda **k: nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, **k),
        scores(3, 4, 2),
        soft(3, 4, 2),
    ),
    (
        lambda **k: nn.CrossEntropyLoss(WEIGHTS, ignore_index=0, label_smoothing=0.1, **k),
        scores(3, 4, 2, 3),
        classes(3, 2, 3),
    ),
    (nn.CrossEntropyLoss, scores(3, 4, 1), classes(3, 1)),
    (nn.MSELoss, scores(4, 3), scores(4, 3)),
    (nn.MSELoss, scores(2, 3, 2, 2), scores(2, 3, 2, 2)),
    (nn.MSELoss, scores(4), scores(4)),
    (nn.BCEWithLogitsLoss, scores(5), (scores(5) > 0).double()),
    (nn.BCEWithLogitsLoss, scores(4, 3), soft(4, 3)),
    (
        lambda **k: nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=2 * WEIGHTS, **k),
        scores(3, 4),
        (scores(3, 4) > 0).double(),
    ),
    (nn.PoissonNLLLoss, scores(4, 3), classes(4, 3).double()),
    (lambda **k: nn.PoissonNLLLoss(log_input=False, **k), positive(4, 3), positive(4, 3)),
    (nn.GaussianNLLLoss, scores(4, 3), (scores(4, 3), positive(4, 3))),
    (lambda **k: nn.GaussianNLLLoss(full=True, **k), scores(4, 3), (scores(4, 3), positive(4, 1))),
    (nn.GaussianNLLLoss, scores(4, 3), (scores(4, 3), positive(4))),
    (nn.HuberLoss, scores(4, 3), -scores(4, 3)),
    (lambda **k: nn.HuberLoss(delta=0.4, **k), scores(2, 3, 2), -scores(2, 3, 2)),
    (lambda **k: nn.SmoothL1Loss(beta=0.7, **k), scores(4, 3), -scores(4, 3)),
    (nn.SoftMarginLoss, scores(4, 3), scores(3, 4).reshape(4, 3).sign()),
    (nn.MultiLabelSoftMarginLoss, scores(3, 4), classes(3, 4) % 2),
    (
        lambda **k: nn.MultiLabelSoftMarginLoss(weight=WEIGHTS, **k),
        scores(2, 3, 4),
        soft(2, 3, 4),
    ),
]


class Linear(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()


class Concave(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.cos() * target).sum()


def hessian(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    return loss_hessian(lambda f, y: evaluate_loss(loss, f, y), output, target)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]()).__name__)
def test_roots_reproduce_the_hessian(case: tuple[Any, Tensor, Any], reduction: str) -> None:
    build, output, target = case
    loss = build(reduction=reduction)
    roots = list(loss_rule(loss).roots(loss, output, target))
    # a root holds one vector per example, and examples do not mix
    blocks = torch.stack([root.reshape(len(output), -1) for root in roots])
    got = torch.block_diag(*torch.einsum("vnf,vng->nfg", blocks, blocks))
    torch.testing.assert_close(got, hessian(loss, output, target), **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]()).__name__)
def test_samples_reproduce_the_hessian_on_average(
    case: tuple[Any, Tensor, Any], reduction: str
) -> None:
    build, output, target = case
    loss, generator = build(reduction=reduction), Generator().manual_seed(0)
    state = torch.get_rng_state()
    got = sampled_moment(loss_rule(loss), loss, output, target, generator)
    assert torch.equal(torch.get_rng_state(), state)
    expected = hessian(loss, output, target)
    assert (got - expected).abs().max() < 8 * expected.abs().max() / DRAWS**0.5


@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_log_likelihood_gives_the_curvature_of_cross_entropy(weight: Tensor | None) -> None:
    output, target = scores(6, 4), classes(6)
    expected = hessian(nn.CrossEntropyLoss(weight, ignore_index=3), output, target)
    loss = nn.NLLLoss(weight, ignore_index=3)
    rows = torch.autograd.functional.jacobian(lambda f: f.log_softmax(1), output).reshape(24, 24)
    roots = list(loss_rule(loss).roots(loss, output.log_softmax(1), target))
    blocks = torch.stack([root.reshape(len(output), -1) for root in roots])
    inner = torch.block_diag(*torch.einsum("vnf,vng->nfg", blocks, blocks))
    torch.testing.assert_close(rows.T @ inner @ rows, expected, **TOLERANCE)
    generator = Generator().manual_seed(0)
    inner = sampled_moment(loss_rule(loss), loss, output.log_softmax(1), target, generator)
    got = rows.T @ inner @ rows
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_loss_of_ones_own() -> None:
    class LogCosh(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).cosh().log().mean()

    register_loss(LogCosh, EntrywiseRule())
    loss, output, target = LogCosh(), scores(3, 2), torch.zeros(3, 2, dtype=torch.float64)
    roots = torch.stack(list(loss_rule(loss).roots(loss, output, target)))
    got = roots.square().sum(0).flatten().diag()
    torch.testing.assert_close(got, hessian(loss, output, target), **TOLERANCE)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`loss_fn` must be one of .*L1Loss.*empirical"):
        loss_rule(nn.L1Loss())
    with pytest.raises(ValueError, match=r"reduction` must be 'mean' or 'sum', got 'none'"):
        loss_rule(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"non-empty batch \[n, c, \*d\], got \(4,\)"):
        next(loss_rule(nn.CrossEntropyLoss()).roots(nn.CrossEntropyLoss(), scores(4), classes(1)))
    with pytest.raises(ValueError, match=r"non-empty batch \[n, \*f\], got \(\)"):
        next(loss_rule(nn.MSELoss()).roots(nn.MSELoss(), scores(), scores()))
    with pytest.raises(ValueError, match=r"target must have the output's shape \(4, 1\), got"):
        next(loss_rule(nn.MSELoss()).roots(nn.MSELoss(), scores(4, 1), scores(4)))
    with pytest.raises(ValueError, match=r"beta` must be positive.*got SmoothL1Loss with beta=0"):
        loss_rule(nn.SmoothL1Loss(beta=0.0))
    with pytest.raises(ValueError, match=r"must be convex in each output entry, got .* Concave"):
        next(EntrywiseRule().roots(Concave(), scores(4, 1), scores(4, 1)))
    with pytest.raises(ValueError, match=r"must be curved in the output, got Linear"):
        next(EntrywiseRule().roots(Linear(), scores(4, 1), scores(4, 1)))
