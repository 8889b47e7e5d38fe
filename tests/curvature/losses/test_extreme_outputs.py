"""Masked and huge scores, ignored targets, and data types that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses import (
    has_targets,
    local_expansion,
    loss_rule,
    register_loss,
    weighted_loss_rule,
)

INFINITY = float("inf")
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABELS = torch.tensor([0, 1, 2, 1, 0])


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(0), dtype=torch.float64)


def matrices(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    """The matrix of the root vectors of each example, ``[n, f, f]`` in float64."""
    roots = [*loss_rule(loss).roots(loss, output, target)]
    assert {root.dtype for root in roots} == {output.dtype}
    stacked = torch.stack(roots).flatten(2).double()
    assert stacked.isfinite().all()
    return torch.einsum("vnf,vng->nfg", stacked, stacked)


def samples(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    sample = loss_rule(loss).sample(loss, output, target, Generator().manual_seed(0))
    assert sample.dtype == output.dtype
    return sample


SCORE_LOSSES = [
    (nn.CrossEntropyLoss(), LABELS),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double()), LABELS),
    (nn.CrossEntropyLoss(), scores(5, 3).softmax(1)),
]


@pytest.mark.parametrize(("loss", "target"), SCORE_LOSSES)
def test_masked_scores_are_as_absent(loss: nn.CrossEntropyLoss, target: Tensor) -> None:
    masked = torch.cat([scores(5, 3), torch.full((5, 1), -INFINITY).double()], 1)
    full, fewer = target, nn.CrossEntropyLoss()
    if target.is_floating_point():
        full = torch.cat([target, torch.zeros(5, 1).double()], 1)
    elif loss.weight is not None:
        fewer = nn.CrossEntropyLoss(weight=loss.weight[:3])
    got = matrices(loss, masked, full)
    torch.testing.assert_close(got[:, :3, :3], matrices(fewer, scores(5, 3), target))
    assert not got[:, 3].any()
    assert samples(loss, masked, full).isfinite().all()
    (product,) = local_expansion(loss, masked, full, [torch.ones_like(masked)]).products
    torch.testing.assert_close(product, got.sum(2))


@pytest.mark.parametrize("is_logarithm", [False, True])
def test_example_with_every_score_masked_is_ignored(is_logarithm: bool) -> None:
    output, target = scores(5, 3), LABELS.clone()
    output[1], target[1] = -INFINITY, -100
    loss: nn.Module = nn.NLLLoss() if is_logarithm else nn.CrossEntropyLoss()
    output = output.log_softmax(1) if is_logarithm else output
    kept = torch.tensor([0, 2, 3, 4])
    got = matrices(loss, output, target)
    torch.testing.assert_close(got[kept], matrices(loss, output[kept], target[kept]))
    assert not got[1].any()
    assert not samples(loss, output, target)[1].any()


def test_divergence_from_masked_log_probabilities() -> None:
    p = torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    loss = nn.KLDivLoss(reduction="batchmean", log_target=True)
    got = matrices(loss, p.log(), p.log())
    torch.testing.assert_close(got, torch.diag_embed(p) / 2)


@pytest.mark.parametrize("scale", [1e4, 1e30, 1e38])
def test_huge_scores(scale: float) -> None:
    output = scores(5, 3).float() * scale
    target = output.sign()
    for loss, y in [
        (nn.CrossEntropyLoss(), LABELS),
        (nn.SoftMarginLoss(), target),
        (nn.BCEWithLogitsLoss(), target.clamp_min(0)),
        (nn.MultiLabelSoftMarginLoss(), target.clamp_min(0)),
        (nn.HuberLoss(), target),
    ]:
        assert not matrices(loss, output, y).any()


@pytest.mark.parametrize("dtype", TYPES)
def test_certain_probabilities_are_finite(dtype: torch.dtype) -> None:
    score = torch.tensor([[-INFINITY, -1e4, -3.0, 0.0, 2.0, 1e4, INFINITY]]).to(dtype)
    p = score.sigmoid().requires_grad_()
    loss = nn.BCELoss(reduction="sum")
    (root,) = (sum(loss_rule(loss).roots(loss, p.detach(), torch.zeros_like(p))),)
    assert root.isfinite().all()
    by_score = (root * p * (1 - p)).detach().double()
    expected = (score.double().sigmoid() * (-score.double()).sigmoid()).sqrt()
    torch.testing.assert_close(by_score, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


ALL_IGNORED = [
    (nn.CrossEntropyLoss(), torch.full((5,), -100)),
    (nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), torch.ones(5, dtype=torch.long)),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0]).double()), torch.ones(5).long()),
    (nn.NLLLoss(), torch.full((5,), -100)),
    (nn.NLLLoss(weight=torch.tensor([0.0, 0.0, 0.0]).double()), LABELS),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("loss", "target"), ALL_IGNORED)
def test_nothing_to_learn_from(loss: Any, target: Tensor, reduction: str) -> None:
    kind = type(loss)
    loss = kind(weight=loss.weight, ignore_index=loss.ignore_index, reduction=reduction)
    output = scores(5, 3).log_softmax(1)
    assert not matrices(loss, output, target).any()
    assert not samples(loss, output, target).any()
    assert not has_targets(loss, output, target)
    assert has_targets(kind(), output, LABELS)


def test_what_counts_as_a_target() -> None:
    class Shifted(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Any) -> Tensor:
            return super().forward(output, target["labels"] - 7)

    assert has_targets(Shifted(), scores(5, 3), {"labels": LABELS + 7})
    assert has_targets(nn.BCEWithLogitsLoss(weight=torch.zeros(3)), scores(5, 3), scores(5, 3))
    assert has_targets(nn.L1Loss(), scores(5, 3), scores(5, 3))
    assert not has_targets(nn.L1Loss(), scores(0, 3), scores(0, 3))
    soft = torch.zeros(5, 3, dtype=torch.float64)  # torch's mean is over examples
    assert has_targets(nn.CrossEntropyLoss(), scores(5, 3), soft)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MSELoss(), nn.BCELoss(), nn.KLDivLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_batch_without_examples(loss: nn.Module) -> None:
    output, labels = scores(0, 3), isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    target = LABELS[:0] if labels else output
    assert {root.shape for root in loss_rule(loss).roots(loss, output, target)} == {output.shape}
    assert samples(loss, output, target).shape == output.shape


@pytest.mark.parametrize("own", TYPES)
@pytest.mark.parametrize("other", TYPES)
@pytest.mark.parametrize(
    "kind",
    [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss],
)
def test_types_that_torch_takes(
    kind: type[nn.Module], other: torch.dtype, own: torch.dtype
) -> None:
    output, target, loss = scores(5, 3).to(own), scores(5, 3).softmax(1).to(other), kind()
    leaf = output.clone().requires_grad_()
    try:
        loss(leaf, target).backward()
    except RuntimeError:
        pytest.skip("torch refuses these types")
    expected = matrices(loss, output.double(), target.double())
    tolerance = max(torch.finfo(own).eps, torch.finfo(other).eps) * 4
    torch.testing.assert_close(
        matrices(loss, output, target), expected, rtol=tolerance, atol=tolerance
    )
    (product,) = local_expansion(loss, output, target, [torch.ones_like(output)]).products
    assert product.dtype == torch.promote_types(own, torch.float32)
    torch.testing.assert_close(product.double(), expected.sum(2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_class_weights_of_the_type_of_the_scores(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    output = scores(5, 3).log_softmax(1).to(dtype)
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        loss, exact = kind(weight=weight), kind(weight=weight.double())
        expected = matrices(exact, output.double(), LABELS)
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(matrices(loss, output, LABELS), expected, rtol=eps, atol=eps)
        (product,) = local_expansion(loss, output, LABELS, [torch.ones_like(output)]).products
        (other,) = local_expansion(exact, output.double(), LABELS, [output.new_ones(5, 3)]).products
        torch.testing.assert_close(product.double(), other.double(), rtol=eps, atol=eps)


def test_mean_over_more_terms_than_float16_counts() -> None:
    output = scores(8, 2, 96, 96).half()
    target = torch.zeros(8, 96, 96, dtype=torch.long)
    sample = samples(nn.CrossEntropyLoss(), output, target).double().square().sum()
    p = output.double().softmax(1)
    torch.testing.assert_close(  # the trace of the Hessian, on average
        sample, (1 - p.square().sum(1)).mean(), rtol=0.1, atol=0
    )


def test_labels_of_eight_bits() -> None:
    output = scores(5, 200)
    target = torch.tensor([156, 0, 3, 156, 2], dtype=torch.uint8)  # 156 is -100 modulo 256
    for loss, own in ((nn.CrossEntropyLoss(), output), (nn.NLLLoss(), output.log_softmax(1))):
        expected = matrices(loss, own, target.long())
        torch.testing.assert_close(matrices(loss, own, target), expected)


def test_targets_with_a_derivative() -> None:
    head, x = nn.Linear(3, 2).double(), scores(5, 3)
    loss, output = nn.GaussianNLLLoss(), scores(5, 2)
    variance = head(x).exp()
    for own in (variance, nn.Parameter(variance.detach())):
        with pytest.raises(ValueError, match=r"targets.*must not depend on parameters.*empirical"):
            loss_rule(loss).sample(loss, output, (output, own), Generator())
    got = matrices(loss, output, (output, variance.detach()))
    torch.testing.assert_close(got, torch.diag_embed(1 / variance.detach() / 10))
    coordinates = x[:, :2].clone().requires_grad_()  # as for a residual of derivatives
    mse = nn.MSELoss()
    assert matrices(mse, output, coordinates.sin()).isfinite().all()


def test_negative_weights_are_refused() -> None:
    output, weight = scores(5, 3), torch.tensor([-1.0, 1.0, 1.0]).double()
    message = r"must not be negative.*fisher='empirical' takes any"
    for loss, target in (
        (nn.CrossEntropyLoss(weight=weight), LABELS),
        (nn.CrossEntropyLoss(), scores(5, 3)),
        (nn.NLLLoss(weight=weight), LABELS),
        (nn.BCELoss(weight=weight), output.sigmoid()),
    ):
        own = output.sigmoid() if isinstance(loss, nn.BCELoss) else output.log_softmax(1)
        with pytest.raises(ValueError, match=message):
            next(loss_rule(loss).roots(loss, own, target))
    logistic = nn.BCEWithLogitsLoss(weight=weight)
    with pytest.raises(ValueError, match=r"must be convex in each output entry"):
        next(loss_rule(logistic).roots(logistic, output, output.sigmoid()))


def test_weights_of_entries_that_are_refused() -> None:
    class Own(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().mean()

    class OwnRule:
        def roots(self, loss: Any, output: Tensor, target: Any) -> Any:
            yield output

        def sample(self, loss: Any, output: Tensor, target: Any, generator: Generator) -> Tensor:
            return output

    register_loss(Own, OwnRule())
    with pytest.raises(ValueError, match=r"rule for Own must take `weights`.*got OwnRule"):
        weighted_loss_rule(Own())
    with pytest.raises(ValueError, match=r"must be one of .*got L1Loss"):
        weighted_loss_rule(nn.L1Loss(reduction="none"))
    loss, output = nn.MSELoss(reduction="none"), scores(5, 3)
    rule = weighted_loss_rule(loss)
    with pytest.raises(ValueError, match=r"shape of the unreduced loss, \(5, 3\), got \(5,\)"):
        next(rule.roots(loss, output, output, weights=output[:, 0]))
    with pytest.raises(ValueError, match=r"`weights` must not be negative"):
        next(rule.roots(loss, output, output, weights=-torch.ones(5, 3)))
    with pytest.raises(ValueError, match=r"must have a `reduction`.*got Own without"):
        rule.sample(Own(), output, output, Generator(), weights=torch.ones(5, 3))
