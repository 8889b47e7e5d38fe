"""Losses read off the autograd graph, against autograd's Hessians of the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading

GRAD = torch.autograd.grad
EXAMPLES, POSITIONS, CLASSES = 4, 5, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(EXAMPLES, POSITIONS, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(CLASSES, (EXAMPLES, POSITIONS), generator=GENERATOR)
T = torch.rand(EXAMPLES, POSITIONS, CLASSES, generator=GENERATOR, dtype=torch.float64)
SYMMETRIC = torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 3]], dtype=torch.float64)
WEIGHTS = torch.arange(EXAMPLES * POSITIONS, dtype=torch.float64)

CONVEX: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda o: functional.cross_entropy(
        o[:, :-1].reshape(-1, CLASSES), Y[:, 1:].reshape(-1), label_smoothing=0.1
    ),
    "transpose": lambda o: functional.cross_entropy(o.transpose(1, 2), Y),
    "mask": lambda o: functional.cross_entropy(o[Y > 0], Y[Y > 0]),
    "last": lambda o: functional.cross_entropy(o[:, -1], Y[:, -1]),
    "scaled": lambda o: 3 * functional.cross_entropy(o.transpose(1, 2) / 0.7, Y),
    "weights": lambda o: (
        (functional.cross_entropy(o.reshape(-1, CLASSES), Y.reshape(-1), reduction="none"))
        @ WEIGHTS
    ),
    "soft targets": lambda o: functional.cross_entropy(o.transpose(1, 2), T.transpose(1, 2)),
    "likelihood": lambda o: functional.nll_loss(o.log_softmax(-1).view(-1, CLASSES), Y.view(-1)),
    "divergence": lambda o: functional.kl_div(
        o.log_softmax(-1), T.softmax(-1), reduction="batchmean"
    ),
    "log density": lambda o: -torch.distributions.Categorical(logits=o).log_prob(Y).mean(),
    "power": lambda o: ((o - T) ** 2).mean(),
    "product with itself": lambda o: ((o - T) * (o - T)).mean(),
    "dot product with itself": lambda o: torch.dot((o - T).flatten(), (o - T).flatten()),
    "squared norms": lambda o: (o - T).norm(dim=1).pow(2).mean(),
    "squared norms, kept": lambda o: torch.linalg.norm(o - T, dim=-1, keepdim=True).square().sum(),
    "squared norm": lambda o: 0.5 * torch.norm(o - T) ** 2,
    "norm times norm": lambda o: torch.norm(o - T) * torch.norm(o - T),
    "norms in another shape": lambda o: (o - T).norm(dim=1).unsqueeze(0).flatten().square().sum(),
    "tensor as an exponent": lambda o: (o - T).pow(torch.tensor(2.0)).mean(),
    "powers of numbers": lambda o: (2.0**o).mean() + torch.exp2(-o).mean(),
    "contraction with itself": lambda o: torch.einsum("nsc,nsc->", o - T, o - T),
    "batch of products": lambda o: ((o - T).unsqueeze(2) @ (o - T).unsqueeze(3)).mean(),
    "added products": lambda o: torch.addcmul(T, o - T, o - T, value=0.5).mean(),
    "trace of a product": lambda o: torch.addmm(
        torch.ones(12, 12).double(),
        (o[:, 1:] - T[:, 1:]).reshape(12, -1),
        o[:, 1:].reshape(12, -1).T,
    ).trace(),
    "inner product": lambda o: torch.vdot((o - T).flatten(), (o - T).flatten()),
    "quadratic form": lambda o: (((o - T) @ SYMMETRIC) * (o - T)).sum(),
    "bilinear form": lambda o: functional.bilinear(o, o, SYMMETRIC[None]).mean(),
    "weighted product": lambda o: ((o - T) * (T * (o - T))).sum(),
    "distance": lambda o: torch.dist(o, T) ** 2,
    "distance to a row": lambda o: torch.dist(o, T[0, 0]).square(),
    "roots of squares": lambda o: (o - T).pow(2).sum(1).sqrt().pow(2).mean(),
    "spectrum": lambda o: torch.fft.fft(o - T).abs().pow(2).mean(),
    "complex conjugate": lambda o: (torch.complex(o, T) * torch.complex(o, T).conj()).real.sum(),
    "logarithm of probabilities": lambda o: functional.nll_loss(
        o.softmax(-1).log().flatten(0, 1), Y.flatten()
    ),
    "logarithm of a quotient": lambda o: (
        -((o.exp() / o.exp().sum(-1, keepdim=True)).gather(-1, Y[..., None]).log().mean())
    ),
    "density of probabilities": lambda o: (
        -torch.distributions.Categorical(probs=o.softmax(-1)).log_prob(Y).mean()
    ),
    "logarithm of a sum": lambda o: (
        o.exp().sum(-1).log() - o.gather(-1, Y[..., None])[..., 0]
    ).sum(),
    "events": lambda o: functional.binary_cross_entropy(o.sigmoid(), T),
    "logarithms of events": lambda o: (
        -(T * o.sigmoid().log() + (1 - T) * (1 - o.sigmoid()).log()).mean()
    ),
    "hyperbolic cosine": lambda o: (o - T).cosh().log().mean(),
    "smooth absolute value": lambda o: (1 + (o - T) ** 2).sqrt().sum(),
    "squares": lambda o: functional.mse_loss(o, T, reduction="sum") / EXAMPLES,
    "logistic": lambda o: functional.binary_cross_entropy_with_logits(
        o, T, pos_weight=torch.tensor([1.0, 2, 3]).double()
    ),
    "Huber": lambda o: functional.huber_loss(o, T, delta=10.0),
    "counts": lambda o: functional.poisson_nll_loss(o, T),
    "soft margin": lambda o: functional.soft_margin_loss(o, 2 * (T > 0.5).double() - 1),
    "variational": lambda o: (
        functional.mse_loss(o[..., 0], T[..., 0])
        - 0.5 * (1 + o[..., 1] - o[..., 2] ** 2 - o[..., 1].exp()).sum()
    ),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": lambda o: functional.l1_loss(o, T),
    "root": lambda o: ((o - T) ** 2).mean().sqrt(),
    "overlap": lambda o: 1 - 2 * (o.sigmoid() * T).sum() / (o.sigmoid().sum() + T.sum()),
    "correlation": lambda o: 1 - (o * T).sum() / (1 + o.square().sum()),
    "positive part": lambda o: (o.relu() - T).pow(2).mean(),
    "margin": lambda o: functional.multi_margin_loss(o[:, 0], Y[:, 0]),
    "cosine": lambda o: 1 - functional.cosine_similarity(o, T, dim=-1).mean(),
    "gate": lambda o: (o.tanh() * o[..., :1].sigmoid() - T).pow(2).mean(),
}
NAME = "test"


def read(loss: Callable[[Tensor], Tensor]) -> tuple[Reading, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(4, CLASSES).double()
    output = layer(X)
    mark_(output, NAME, output.detach())
    value = loss(output)
    names: dict[Tensor, str] = {p: n for n, p in layer.named_parameters()}
    weight = torch.ones_like(value)
    reading = Reading(edge_of(value), value.detach(), weight, lambda e: mark_of(e, NAME), names)
    return reading, output, value


def hessian(loss: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    found = torch.autograd.functional.hessian(loss, output.detach())
    return found.reshape(output.numel(), output.numel())


@pytest.mark.parametrize("name", CONVEX)
def test_curvature_is_the_hessian(name: str) -> None:
    reading, output, value = read(CONVEX[name])
    expected = hessian(CONVEX[name], output)
    tail = reading.tail(reading.graph.sources)
    value.backward()  # frees the graph
    u = torch.randn(2, *output.shape, generator=GENERATOR, dtype=torch.float64)
    found = tail.expansion([[each] for each in u])
    flat = u.flatten(1)
    torch.testing.assert_close(found.curvature, flat @ expected @ flat.T, rtol=1e-9, atol=1e-12)
    slope = torch.autograd.functional.jacobian(CONVEX[name], output.detach()).flatten()
    torch.testing.assert_close(found.slope, flat @ slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["contraction with itself", "batch of products"])
def test_a_hessian_is_taken_when_it_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that needs no curvature pays for none; the graph may be freed before."""
    taken = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("create_graph"):  # as for a Hessian
            taken.append(args)
        return GRAD(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    reading, output, value = read(CONVEX[name])
    tail = reading.tail(reading.graph.sources)
    assert not taken
    value.sum().backward()  # type: ignore[no-untyped-call]
    u = torch.randn_like(output)
    found = tail.expansion([[u]]).curvature[0, 0]
    assert taken
    torch.testing.assert_close(found, u.flatten() @ hessian(CONVEX[name], output) @ u.flatten())


@pytest.mark.parametrize("name", CONVEX)
def test_roots_give_the_hessian_of_every_example(name: str) -> None:
    reading, output, _ = read(CONVEX[name])
    expected = hessian(CONVEX[name], output).reshape(EXAMPLES, -1, EXAMPLES, output[0].numel())
    roots = torch.stack([next(iter(found.values())) for found, _ in reading.roots()]).flatten(2)
    for n in range(EXAMPLES):
        own = roots[:, n]
        torch.testing.assert_close(own.T @ own, expected[n, :, n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["shift", "logistic", "variational"])
def test_samples_have_the_second_moment(name: str) -> None:
    reading, output, _ = read(CONVEX[name])
    expected = hessian(CONVEX[name], output)
    generator, total = torch.Generator().manual_seed(1), torch.zeros_like(expected)
    for _ in range(4000):
        (root,) = reading.sample(generator).values()
        total += torch.outer(root.flatten(), root.flatten())
    assert (total / 4000 - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("name", [*CONVEX, *OTHERS])
def test_values_at_other_outputs(name: str) -> None:
    loss = {**CONVEX, **OTHERS}[name]
    reading, output, value = read(loss)
    tail = reading.tail(reading.graph.sources)
    value.backward()
    assert not tail.unknown()
    other = output.detach() + 0.3 * torch.randn(output.shape, generator=GENERATOR).double()
    torch.testing.assert_close(tail.value([other]), loss(other), rtol=1e-9, atol=1e-12)


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "correlation": lambda o: torch.ones(()),  # the weight of the quotient
    "margin": OTHERS["margin"],
}
"""Numbers that losses are linear in: the loss itself, or the weights of its operations."""


@pytest.mark.parametrize("factor", [1.0, 1e3])
@pytest.mark.parametrize("name", UNITS)
def test_losses_without_curvature_have_the_empirical_fisher(name: str, factor: float) -> None:
    reading, output, _ = read(lambda o: factor * OTHERS[name](o))
    tail = reading.tail(reading.graph.sources)
    gradient = torch.autograd.functional.jacobian(OTHERS[name], output.detach())
    u = torch.randn(output.shape, generator=GENERATOR, dtype=torch.float64)
    along = (gradient * u).flatten(1).sum(1)
    found = tail.expansion([[u]]).curvature[0, 0]
    expected = factor * EXAMPLES * (along @ along) / UNITS[name](output).detach()
    torch.testing.assert_close(found, expected.double(), rtol=1e-9, atol=1e-12)


def test_an_unknown_operation_is_named() -> None:
    reading, _, _ = read(lambda o: torch.linalg.pinv(o - T).mean())
    assert reading.tail(reading.graph.sources).unknown() == ["LinalgPinv"]


@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
@pytest.mark.parametrize("is_first", [True, False])
def test_squared_distances_of_all_rows(mode: str, is_first: bool) -> None:
    weights = torch.rand(EXAMPLES, POSITIONS, POSITIONS, generator=GENERATOR).double()

    def by_rows(o: Tensor) -> Tensor:
        pair = (o, T) if is_first else (T, o)
        return (weights * torch.cdist(*pair, compute_mode=mode).square()).sum()

    def by_hand(o: Tensor) -> Tensor:
        difference = (o[:, :, None] - T[:, None]).square().sum(-1)
        return (weights * (difference if is_first else difference.mT)).sum()

    reading, output, _ = read(by_rows)
    expected = hessian(by_hand, output)
    u = torch.randn(output.shape, generator=GENERATOR, dtype=torch.float64)
    found = reading.tail(reading.graph.sources).expansion([[u]]).curvature[0, 0]
    torch.testing.assert_close(found, u.flatten() @ expected @ u.flatten())


def cubic_distances_are_differentiable_twice() -> bool:
    """Return whether this version of torch has their second derivative."""
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    distances = torch.cdist(x, x.detach() + 1, p=3)
    w = torch.ones_like(distances).requires_grad_()
    (slope,) = torch.autograd.grad(distances, x, w, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), w)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(cubic_distances_are_differentiable_twice(), reason="torch has the derivative")
def test_distances_without_a_second_derivative_are_refused() -> None:
    reading, output, _ = read(
        lambda o: torch.cdist(o, T, p=3).diagonal(dim1=1, dim2=2).pow(2).sum()
    )
    tail = reading.tail(reading.graph.sources)
    with pytest.raises(RuntimeError, match=r"differentiable twice.*in place of torch.cdist"):
        tail.expansion([[torch.ones_like(output)]])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_hessians_in_single_precision(scale: float) -> None:
    def loss(o: Tensor) -> Tensor:
        return scale * functional.nll_loss(o.softmax(-1).log().flatten(0, 1), Y.flatten())

    torch.manual_seed(0)
    output = nn.Linear(4, CLASSES)(X.float())
    mark_(output, NAME, output.detach())
    value = loss(output)
    own = (edge_of(value), value.detach(), torch.ones_like(value), lambda e: mark_of(e, NAME), {})
    reading = Reading(*own)
    u = torch.randn(2, *output.shape, generator=GENERATOR)
    found = reading.tail(reading.graph.sources).expansion([[each] for each in u]).curvature
    flat = u.flatten(1).double()
    expected = flat @ hessian(loss, output.double()) @ flat.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def likelihood_by_hand(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy with the maximum taken off."""
    shifted = scores - scores.max(-1, keepdim=True)[0]
    return -shifted.gather(-1, classes).mean() + shifted.exp().sum(-1).log().mean()


def test_a_selection_of_the_recorded_pass_has_its_hessian() -> None:
    reading, output, _ = read(lambda o: likelihood_by_hand(o, Y[..., None]))
    expected = hessian(lambda o: functional.cross_entropy(o.transpose(1, 2), Y), output)
    u = torch.randn(output.shape, generator=GENERATOR, dtype=torch.float64)
    tail = reading.tail(reading.graph.sources)
    found = tail.expansion([[u]]).curvature[0, 0]
    torch.testing.assert_close(found, u.flatten() @ expected @ u.flatten(), rtol=1e-9, atol=0)
    assert not tail.unknown()


def contracted(residual: Tensor) -> Tensor:
    return torch.einsum("nsc,nsc->", residual, residual)


def contrast(exponentials: Tensor) -> Tensor:
    return -(exponentials.diagonal() / exponentials.sum(1)).log().mean()


SPLIT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "similarities": (
        lambda o: functional.cross_entropy(o[:, 0] @ o[:, 1].T, torch.arange(EXAMPLES)),
        lambda o: -(o[:, 0] @ o[:, 1].T).softmax(1).diagonal().log().mean(),
    ),
    "quotient of similarities": (
        lambda o: functional.cross_entropy(o[:, 0] @ o[:, 1].T, torch.arange(EXAMPLES)),
        lambda o: contrast((o[:, 0] @ o[:, 1].T).exp()),
    ),
    "activations": (
        lambda o: (o.tanh() - T).square().sum(),
        lambda o: contracted(o.tanh() - T),
    ),
    "probabilities": (
        lambda o: (o.sigmoid() - T).square().sum(),
        lambda o: contracted(o.sigmoid() - T),
    ),
    "low precision": (
        lambda o: functional.cross_entropy(o.bfloat16().float().transpose(1, 2), Y),
        lambda o: -o.bfloat16().float().softmax(-1).log().gather(-1, Y[..., None]).mean(),
    ),
}
"""Pairs of losses that are the same functions, curved behind a nonlinear map of the output."""


@pytest.mark.parametrize("name", SPLIT)
def test_losses_by_hand_are_split_as_those_of_torch(name: str) -> None:
    u = torch.randn(2, EXAMPLES, POSITIONS, CLASSES, generator=GENERATOR, dtype=torch.float64)
    found = []
    for loss in SPLIT[name]:
        reading, _, _ = read(loss)
        found.append(
            reading.tail(reading.graph.sources).expansion([[each] for each in u]).curvature
        )
    tolerance = 1e-5 if name == "low precision" else 1e-9
    torch.testing.assert_close(*found, rtol=tolerance, atol=0)


@pytest.mark.parametrize("has_scores", [True, False])
def test_targets_that_depend_on_the_model_are_evaluated(has_scores: bool) -> None:
    def loss(o: Tensor) -> Tensor:
        if has_scores:
            return functional.binary_cross_entropy_with_logits(o, (o - 1).sigmoid())
        return functional.binary_cross_entropy(o.sigmoid(), (o - 1).sigmoid())

    reading, output, _ = read(loss)
    tail = reading.tail(reading.graph.sources)
    assert not tail.unknown()
    other = 1.5 * output.detach() - 0.3
    torch.testing.assert_close(tail.value([other]), loss(other))
