"""Every rule in ``losses/rules/`` on its own examples, against the Hessian by autograd."""

from __future__ import annotations

import pytest
import torch
from ggn import loss_hessian
from loss_samples import DRAWS, sampled_moment
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses import (
    evaluate_loss,
    local_expansion,
    loss_rule,
    weighted_loss_rule,
)
from einconv_kfac.curvature.losses.loss_registry import built_in_rules
from einconv_kfac.curvature.losses.loss_rule import LossExample, TorchLossRule

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # KLDivLoss
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
RULES = built_in_rules()
EXAMPLES = {
    f"{type(rule).__name__}-{number}": (rule, example)
    for rule in {type(rule): rule for rule in RULES.values()}.values()
    for number, example in enumerate(rule.examples)
}


def by_scores(example: LossExample, scores: Tensor, moment: Tensor) -> Tensor:
    """``J^T M J`` for a second moment ``M`` at the output and the link's Jacobian ``J``."""
    jacobian = torch.autograd.functional.jacobian(example.link, scores)
    jacobian = jacobian.reshape(scores.numel(), scores.numel())
    return jacobian.T @ moment @ jacobian


def second_moment(example: LossExample, scores: Tensor, vectors: Tensor) -> Tensor:
    """``sum_v J^T s_v s_v^T J`` for vectors at the output and the link's Jacobian ``J``."""
    return by_scores(example, scores, vectors.flatten(1).T @ vectors.flatten(1))


def separated(roots: list[Tensor]) -> Tensor:
    """Root vectors with one vector per example, as vectors of single examples."""
    stacked = torch.stack(roots)  # v n *f
    masks = torch.eye(stacked.shape[1], dtype=stacked.dtype)
    return torch.einsum("vn...,nm->vmn...", stacked, masks).flatten(0, 1)


def curvature(loss: nn.Module, example: LossExample, scores: Tensor, target: object) -> Tensor:
    """The Hessian of the loss by the scores."""
    return loss_hessian(lambda f, y: evaluate_loss(loss, example.link(f), y), scores, target)


def test_every_type_has_an_example() -> None:
    for kind, rule in RULES.items():
        assert kind in rule.kinds
        built = [type(example.build(reduction="mean")) for example in rule.examples]
        assert kind in built
        assert type(loss_rule(kind())) is type(rule)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rule", "example"), EXAMPLES.values(), ids=EXAMPLES)
def test_roots_of_examples_reproduce_the_hessian(
    rule: TorchLossRule, example: LossExample, reduction: str
) -> None:
    loss = example.build(reduction=reduction)
    scores, target = example.batch(Generator().manual_seed(0))
    roots = separated(list(rule.roots(loss, example.link(scores), target)))
    got = second_moment(example, scores, roots)
    torch.testing.assert_close(got, curvature(loss, example, scores, target), **TOLERANCE)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rule", "example"), EXAMPLES.values(), ids=EXAMPLES)
def test_weights_replace_the_reduction(
    rule: TorchLossRule, example: LossExample, is_masked: bool
) -> None:
    loss = example.build(reduction="none")
    scores, target = example.batch(Generator().manual_seed(0))
    output, generator = example.link(scores), Generator().manual_seed(1)
    entries = evaluate_loss(loss, output, target)
    weights = torch.rand(entries.shape, generator=generator, dtype=torch.float64)
    if is_masked:
        weights[1:] = 0

    def total(f: Tensor, y: object) -> Tensor:
        return (weights * evaluate_loss(loss, example.link(f), y)).sum()

    expected = loss_hessian(total, scores, target)
    assert type(weighted_loss_rule(loss)) is type(rule)
    roots = separated(list(rule.roots(loss, output, target, weights=weights)))
    torch.testing.assert_close(second_moment(example, scores, roots), expected, **TOLERANCE)
    moment = sampled_moment(rule, loss, output, target, generator, weights=weights)
    got = by_scores(example, scores, moment)
    assert (got - expected).abs().max() < 8 * expected.abs().max() / DRAWS**0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rule", "example"), EXAMPLES.values(), ids=EXAMPLES)
def test_products_are_those_of_the_hessian(
    rule: TorchLossRule, example: LossExample, reduction: str
) -> None:
    loss = example.build(reduction=reduction)
    scores, target = example.batch(Generator().manual_seed(0))
    link, output = example.link, example.link(scores)
    v = torch.randn(scores.shape, generator=Generator().manual_seed(1), dtype=torch.float64)
    _, tangent = torch.autograd.functional.jvp(link, scores, v)
    gradient, (product,) = local_expansion(loss, output, target, [tangent])
    leaf = output.clone().requires_grad_()
    (slope,) = torch.autograd.grad(evaluate_loss(loss, leaf, target), leaf)
    torch.testing.assert_close(gradient, slope)
    _, got = torch.autograd.functional.vjp(link, scores, product)
    expected = curvature(loss, example, scores, target) @ v.flatten()
    torch.testing.assert_close(got.flatten(), expected, **TOLERANCE)


@pytest.mark.parametrize(("rule", "example"), EXAMPLES.values(), ids=EXAMPLES)
def test_samples_of_examples_reproduce_it(rule: TorchLossRule, example: LossExample) -> None:
    loss = example.build(reduction="mean")
    scores, target = example.batch(Generator().manual_seed(0))
    output, generator = example.link(scores), Generator().manual_seed(1)
    state = torch.get_rng_state()
    moment = sampled_moment(rule, loss, output, target, generator)
    assert torch.equal(torch.get_rng_state(), state)
    got = by_scores(example, scores, moment)
    expected = curvature(loss, example, scores, target)
    assert (got - expected).abs().max() < 8 * expected.abs().max() / DRAWS**0.5
