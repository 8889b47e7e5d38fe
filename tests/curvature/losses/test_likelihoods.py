"""The Fisher information of likelihoods, from its definition: a sum over all labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ggn import loss_hessian
from torch import Generator, Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.losses import check_reduction, evaluate_loss, loss_rule

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
WEIGHTS = torch.tensor([0.3, 1.0, 2.5, 0.7], dtype=torch.float64)
REDUCTIONS = ["mean", "sum", "batchmean"]


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int) -> Tensor:
    return torch.randint(4, shape, generator=Generator().manual_seed(1))


def at_output(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    """The matrix of the root vectors, ``[f, f]``."""
    roots = torch.stack([*loss_rule(loss).roots(loss, output, target)]).flatten(2)  # v n f
    return torch.block_diag(*torch.einsum("vnf,vng->nfg", roots, roots))


def by_scores(loss: nn.Module, link: Any, f: Tensor, target: Any) -> Tensor:
    """The Gauss-Newton matrix of the link and of the matrix at the output."""
    rows = torch.autograd.functional.jacobian(link, f).reshape(f.numel(), f.numel())
    return rows.T @ at_output(loss, link(f), target) @ rows


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_log_likelihood_of_images(weight: Tensor | None, ignored: int, reduction: str) -> None:
    f, target = scores(3, 4, 2, 2), classes(3, 2, 2)
    options: Any = {"weight": weight, "ignore_index": ignored, "reduction": reduction}

    def link(entries: Tensor) -> Tensor:
        return entries.log_softmax(1)

    cross_entropy = nn.CrossEntropyLoss(**options)
    expected = loss_hessian(cross_entropy, f, target)
    got = by_scores(nn.NLLLoss(**options), link, f, target)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bernoulli_is_the_average_over_both_labels(reduction: str) -> None:
    p = scores(3, 4).sigmoid().requires_grad_()
    expected = torch.zeros(12, dtype=torch.float64)
    for label in (0.0, 1.0):
        own = functional.binary_cross_entropy(p, torch.full_like(p, label), reduction="none")
        (slope,) = torch.autograd.grad(own.sum(), p)
        chance = p if label else 1 - p
        expected += (WEIGHTS * chance * slope.square()).detach().flatten()
    expected = expected / 12 if reduction == "mean" else expected
    loss = nn.BCELoss(weight=WEIGHTS, reduction=reduction)
    got = at_output(loss, p.detach(), scores(3, 4).sigmoid())
    torch.testing.assert_close(got, expected.diag(), **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bernoulli_gives_the_curvature_of_scores(reduction: str) -> None:
    f, target = scores(3, 4), scores(3, 4, seed=1).sigmoid()
    options: Any = {"weight": WEIGHTS, "reduction": reduction}
    expected = loss_hessian(nn.BCEWithLogitsLoss(**options), f, target)
    got = by_scores(nn.BCELoss(**options), torch.sigmoid, f, target)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((5, 4), 1), ((3, 4, 2), 1), ((3, 2, 4), 2)])
def test_divergence_gives_the_curvature_of_soft_targets(
    shape: tuple[int, ...], dim: int, log_target: bool, reduction: str
) -> None:
    f, q = scores(*shape), scores(*shape, seed=1).softmax(dim)
    loss = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    target = q.log() if log_target else q

    def link(entries: Tensor) -> Tensor:
        return entries.log_softmax(dim)

    def soft(entries: Tensor, _: Tensor) -> Tensor:
        total = functional.cross_entropy(
            entries.movedim(dim, 1), q.movedim(dim, 1), reduction="sum"
        )
        return total / {"mean": f.numel(), "sum": 1, "batchmean": len(f)}[reduction]

    expected = loss_hessian(soft, f, q)  # type: ignore[arg-type]
    torch.testing.assert_close(by_scores(loss, link, f, target), expected, **TOLERANCE)
    by_loss = loss_hessian(lambda g, y: evaluate_loss(loss, link(g), y), f, target)  # type: ignore[arg-type]
    torch.testing.assert_close(by_loss, expected, **TOLERANCE)


def test_targets_decide_between_two_dimensions_of_classes() -> None:
    f = torch.zeros(2, 3, 3, dtype=torch.float64)  # uniform along both
    q = scores(2, 3, 3).softmax(1)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64).expand(2, 3, 3)
    loss = nn.KLDivLoss(reduction="none")
    roots = loss_rule(nn.KLDivLoss(reduction="sum")).roots(
        loss, f.log_softmax(1), q, weights=weights
    )  # type: ignore[call-arg]
    got = torch.stack([*roots]).square().sum(0)
    torch.testing.assert_close(got, weights / 3, **TOLERANCE)


@pytest.mark.parametrize("output", [scores(5, 4), scores(5, 4).softmax(1)])
def test_what_is_not_normalised_is_refused(output: Tensor) -> None:
    message = r"must be log-probabilities, as from `log_softmax`.*do not sum to 1"
    for loss, target in (
        (nn.NLLLoss(), classes(5)),
        (nn.KLDivLoss(reduction="batchmean"), scores(5, 4).softmax(1)),
    ):
        with pytest.raises(ValueError, match=message):
            next(loss_rule(loss).roots(loss, output, target))
        fixed = output.log_softmax(1)
        assert next(loss_rule(loss).roots(loss, fixed, target)).isfinite().all()
    divergence = nn.KLDivLoss(reduction="sum")
    with pytest.raises(ValueError, match=r"non-empty batch \[n, c, \*d\], got \(5,\)"):
        next(loss_rule(divergence).roots(divergence, output[:, 0], output[:, 0]))


X1, X2 = scores(6, 4), scores(6, 4, seed=1)
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
WITHOUT_RULE: list[tuple[nn.Module, Any]] = [
    (nn.L1Loss(), X2),
    (nn.SmoothL1Loss(beta=0.0), X2),
    (nn.MultiMarginLoss(), classes(6)),
    (nn.MultiLabelMarginLoss(), classes(6, 4)),
    (nn.HingeEmbeddingLoss(), X2.sign()),
    (nn.CosineEmbeddingLoss(), (X2, SIGNS)),
    (nn.MarginRankingLoss(reduction="sum"), (X2, SIGNS[:, None])),
    (nn.TripletMarginLoss(), (X2, scores(6, 4, seed=2))),
]


@pytest.mark.parametrize("case", WITHOUT_RULE, ids=lambda case: type(case[0]).__name__)
def test_empirical_fisher_of_losses_without_rule(case: tuple[nn.Module, Any]) -> None:
    loss, target = case
    linear = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match=r"`loss_fn.*got .*Loss.*fisher='empirical' takes any"):
        kronecker_factors(linear, loss, [(X1, target)])
    got = kronecker_factors(linear, loss, [(X1, target)], fisher="empirical", kind="diagonal")
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for n in range(6):
        own = [t[n : n + 1] for t in (target if isinstance(target, tuple) else (target,))]
        total = loss(linear(X1[n : n + 1]), *own)
        weight, bias = torch.autograd.grad(total, [linear.weight, linear.bias])
        expected += torch.cat([weight, bias[:, None]], 1).square()
    expected = expected / 6 if check_reduction(loss) == "mean" else expected
    diagonal = got[""].to_dense()[0].diagonal().reshape(4, 5)
    torch.testing.assert_close(diagonal, expected, **TOLERANCE)
