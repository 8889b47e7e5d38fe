"""Losses that compare entries of distributions, against Hessians by scores and by probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
N, CLASSES = 6, 4
X = torch.randn(N, CLASSES, generator=GENERATOR, dtype=torch.float64)
WIDE = torch.randn(N, 70, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % CLASSES
T = torch.rand(N, CLASSES, generator=GENERATOR, dtype=torch.float64)


def divergence(parts: tuple[Tensor, ...]) -> Tensor:
    """The divergence of Jensen and Shannon between distributions, as in timm."""
    mean = torch.stack(parts).mean(0).clamp(1e-7, 1).log()
    return sum(functional.kl_div(mean, p, reduction="batchmean") for p in parts) / len(parts)


def focal(o: Tensor) -> Tensor:
    cross = functional.cross_entropy(o, Y, reduction="none")
    return ((1 - torch.exp(-cross)) ** 2 * cross).mean()


HESSIANS: dict[str, tuple[Tensor, Loss]] = {
    "a constant": (WIDE, lambda o: -(o.softmax(-1) + 1e-8).log()[:, 3].mean()),
    "confidence": (
        WIDE,
        lambda o: (
            functional.cross_entropy(o, Y)
            + 0.1 * (o.softmax(-1) * o.log_softmax(-1)).sum(-1).mean()
        ),
    ),
    "first dimension": (WIDE, lambda o: -(o.softmax(0) + 1e-8).log()[2].mean()),
    "one vector": (WIDE[0], lambda o: -(o.softmax(0) + 1e-8).log()[2]),
    "positions": (
        WIDE.unflatten(1, (35, 2)),
        lambda o: -(o.softmax(1) + 1e-8).log()[:, 3].mean() / 2,
    ),
    "balance": (
        X,
        lambda o: functional.cross_entropy(o, Y) + (o.softmax(-1).mean(0) * T[0]).sum() / 50,
    ),
    "focal": (3 * functional.one_hot(Y, CLASSES).double() + X / 9, focal),
    "another head": (
        WIDE,
        lambda o: -(o[:, :66].softmax(-1) + 1e-8).log()[:, 3].mean() + o[:, 66:].square().mean(),
    ),
}
"""Losses whose Hessian by the scores is positive semi-definite."""


def reading_of(loss: Loss, x: Tensor, then: Loss = lambda o: o * 1.0) -> Reading:
    output = then(x.clone().requires_grad_())
    mark_(output, "test", output.detach())
    value = loss(output)
    given = edge_of(value), value.detach(), torch.ones_like(value)
    return Reading(*given, lambda edge: mark_of(edge, "test"), {})


def scores_hessian(loss: Loss, x: Tensor) -> Tensor:
    return hessian(loss)(x).reshape(x.numel(), x.numel())


@pytest.mark.parametrize("name", HESSIANS)
def test_hessians_by_scores(name: str) -> None:
    x, loss = HESSIANS[name]
    reading = reading_of(loss, x)
    tail = reading.tail(reading.graph.sources)
    u = torch.randn(3, *x.shape, generator=GENERATOR, dtype=torch.float64)
    curvature = tail.expansion([[each] for each in u]).curvature
    expected = u.flatten(1) @ scores_hessian(loss, x) @ u.flatten(1).T
    torch.testing.assert_close(curvature, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("then", [torch.softmax, torch.log_softmax])
def test_models_that_end_with_a_softmax(then: Callable[[Tensor, int], Tensor]) -> None:
    def of_p(p: Tensor) -> Tensor:
        return -(p + 1e-8).log()[:, 3].mean()

    def loss(out: Tensor) -> Tensor:
        return of_p(out if then is torch.softmax else out.exp())

    reading = reading_of(loss, WIDE, lambda o: then(o, -1))
    tail = reading.tail(reading.graph.sources)
    u = torch.randn(WIDE.shape, generator=GENERATOR, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda o: then(o, -1), (WIDE,), (u,))
    found = tail.expansion([[tangent]]).curvature
    expected = u.flatten() @ scores_hessian(lambda o: of_p(o.softmax(-1)), WIDE) @ u.flatten()
    torch.testing.assert_close(found, expected.reshape(1, 1), rtol=1e-6, atol=1e-9)


def by_probabilities(loss: Loss, x: Tensor) -> Tensor:
    """``J^T H J`` of a loss of probabilities, for their Jacobian ``J`` by the scores."""
    p = x.softmax(-1)
    jacobian = jacrev(lambda o: o.softmax(-1))(x).reshape(x.numel(), x.numel())
    return jacobian.T @ hessian(loss)(p).reshape(x.numel(), x.numel()) @ jacobian


def smoothed(o: Tensor) -> Tensor:
    return functional.cross_entropy(o[:2], Y[:2], label_smoothing=0.1)


def views(p: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.split(2))


GAUSS_NEWTON: dict[str, tuple[Loss, Loss, Loss]] = {
    "Jensen and Shannon": (
        lambda o: smoothed(o) + 12 * divergence(tuple(each.softmax(-1) for each in views(o))),
        lambda p: 12 * divergence(views(p)),
        smoothed,
    ),
    "reverse": (
        lambda o: (o.softmax(-1) * (o.log_softmax(-1) - 9 * T)).sum(),
        lambda p: (p * (p.log() - 9 * T)).sum(),
        lambda o: 0 * o.sum(),
    ),
}
"""A loss, its part as a function of probabilities, and the other part, a cross entropy."""


@pytest.mark.parametrize("name", GAUSS_NEWTON)
def test_gauss_newton_matrices_by_probabilities(name: str) -> None:
    """Where the Hessian by the scores is indefinite."""
    loss, of_p, rest = GAUSS_NEWTON[name]
    assert torch.linalg.eigvalsh(scores_hessian(loss, X)).min() < -0.01
    expected = by_probabilities(of_p, X) + scores_hessian(rest, X)
    reading = reading_of(loss, X)
    tail = reading.tail(reading.graph.sources)
    units = torch.eye(X.numel(), dtype=X.dtype).reshape(-1, *X.shape)
    found = tail.expansion([[unit] for unit in units]).curvature
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    draws = [next(iter(reading.sample(GENERATOR).values())).flatten() for _ in range(3000)]
    second = torch.stack(draws).T @ torch.stack(draws) / len(draws)
    assert (second - expected).norm() < 0.1 * expected.norm()
    roots = [(next(iter(own.values())), alone) for own, alone in reading.roots()]
    if all(alone for _, alone in roots):  # each unit depends on several examples
        flat = torch.stack([root.flatten() for root, _ in roots])
    else:
        flat = torch.stack([torch.eye(N)[n, :, None] * r for r, _ in roots for n in range(N)])
    torch.testing.assert_close(flat.flatten(1).T @ flat.flatten(1), expected)


def test_a_small_probability_keeps_what_is_convex() -> None:
    """``-log(p + c)`` with ``p`` below the root of ``c``: ``p / (p + c)`` times a cross entropy.

    The part of the other classes of it, as the Hessian has curvature of the wrong sign for the own.
    """
    x, constant = torch.tensor([[-4.0, 1, 0, 2], [-3, 3, 1, 1]]).double(), 1e-3
    reading = reading_of(lambda o: -(o.softmax(-1) + constant).log()[:, 0].sum(), x)
    tail, p = reading.tail(reading.graph.sources), x.softmax(-1)
    assert (p[:, 0] < constant**0.5).all()
    share = p[:, :1] / (p[:, :1] + constant)
    u = torch.randn(*x.shape, generator=GENERATOR, dtype=torch.float64)
    centred = u - (p * u).sum(-1, keepdim=True)
    expected = (share * p * centred.square())[:, 1:].sum()
    torch.testing.assert_close(tail.expansion([[u]]).curvature, expected.reshape(1, 1))
