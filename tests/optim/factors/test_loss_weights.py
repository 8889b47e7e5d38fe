"""Factors of the weighted sum of a step's losses, against the dense matrix of that sum.

All inputs of layers have the same norm, so that the partial trace of the dense Gauss-Newton matrix
over the inputs is a multiple of ``B``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from ggn import dense_empirical, dense_ggn
from optim_cases import conv_net, image_batch, weights, with_kl_clip
from torch import Tensor, nn
from torch.nn.functional import normalize

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.estimation.evaluation import RuleEvaluation
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.estimation.moments import LayerMoments
from einconv_kfac.curvature.layers.discovery import find_layers

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
FIXED: dict[str, Any] = {"lr": 0.1, "adaptive": False}
CROSS_ENTROPY = nn.CrossEntropyLoss()
NORM = 2.0
"""The squared norm of an input, with the constant 1 of the bias."""


class Unit(nn.Module):
    """Divides each example by its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1)


class Part(NamedTuple):
    """One loss of a step."""

    loss_fn: nn.Module
    x: Tensor
    y: Tensor
    weight: float


Factors = dict[str, tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Unit(), nn.Linear(5, 4), nn.Tanh(), Unit(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def part(
    weight: float, size: int, seed: int, *, squares: bool = False, total: bool = False
) -> Part:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (size,), generator=generator)
    reduction = "sum" if total else "mean"
    if not squares:
        return Part(nn.CrossEntropyLoss(reduction=reduction), x, y, weight)
    values = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return Part(nn.MSELoss(reduction=reduction), x, values, weight)


def expected(model: nn.Sequential, parts: Sequence[Part], fisher: str = "exact") -> Factors:
    """The factors by their definition."""
    dense = dense_empirical if fisher == "empirical" else dense_ggn
    found = {}
    for index in (1, 4):
        layer = model[index]
        with torch.no_grad():
            a = torch.cat([model[:index](own.x) for own in parts if own.weight])
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        matrix: Any = sum(
            own.weight * dense(model, own.loss_fn, own.x, own.y, str(index)) for own in parts
        )
        shape = (layer.out_features, a.shape[1])
        b = torch.einsum("gcded->gce", matrix.unflatten(2, shape).unflatten(1, shape)) / NORM
        if fisher == "forward-only":
            b = sum(own.weight for own in parts) * torch.eye(len(b[0])).to(b)[None]
        found[str(index)] = (a.mT @ a / len(a))[None], b
    return found


def apart(model: nn.Module, opt: Any, parts: Sequence[Part]) -> None:
    """A backward pass for each loss, which is multiplied after it was observed."""
    for own in parts:
        (own.weight * opt.observe(own.loss_fn(model(own.x), own.y))).backward()


def together(model: nn.Module, opt: Any, parts: Sequence[Part]) -> None:
    """One backward pass of the sum."""
    losses = [own.weight * opt.observe(own.loss_fn(model(own.x), own.y)) for own in parts]
    torch.stack(losses).sum().backward()


def inside(model: nn.Module, opt: Any, parts: Sequence[Part]) -> None:
    """The weights are part of what is observed."""
    for own in parts:
        opt.observe(own.weight * own.loss_fn(model(own.x), own.y)).backward()


def by_module(model: nn.Module, opt: Any, parts: Sequence[Part]) -> None:
    """The losses are calls of the module that the optimizer was given."""
    for own in parts:
        (own.weight * own.loss_fn(model(own.x), own.y)).backward()


Backward = Callable[[nn.Module, Any, Sequence[Part]], None]


def fixed(model: nn.Module, loss_fn: nn.Module | None, **options: Any) -> Any:
    return KFAC(model, loss_fn, **FIXED, **options)


OWNERS: dict[str, Callable[..., Any]] = {
    "fixed": fixed,
    "automatic": KFAC,
    "preconditioner": KFACPreconditioner,
}


def layers_of(owner: Any) -> Any:
    state = owner.state_dict()
    return (state if "layers" in state else state["kfac"]["preconditioner"])["layers"]


def factors(
    parts: Sequence[Part],
    backward: Backward = apart,
    owner: str = "fixed",
    **options: Any,
) -> tuple[nn.Sequential, Factors]:
    """The model and the factors of a first step."""
    model = network()
    initial = network()
    loss_fn = parts[0].loss_fn if backward is by_module else None
    opt = OWNERS[owner](model, loss_fn, **{"fisher": "exact", **options})
    backward(model, opt, parts)
    opt.step()
    return initial, {n: tuple(own["factors"]) for n, own in layers_of(opt).items()}


def check(found: tuple[nn.Sequential, Factors], parts: Sequence[Part], fisher: str) -> None:
    model, own = found
    for name, pair in expected(model, parts, fisher).items():
        for a, b in zip(own[name], pair):
            torch.testing.assert_close(a, b, **EXACT)


SAME = part(0.3, 8, 0, squares=True)
PARTS: dict[str, list[Part]] = {
    "one batch": [part(1.0, 8, 0), SAME._replace(x=part(1.0, 8, 0).x)],
    "two batches": [part(1.0, 6, 1), part(0.3, 6, 2)],
    "two sizes": [part(0.3, 3, 1, squares=True), part(1.0, 9, 2)],
    "equal weights, two sizes": [part(0.5, 4, 1), part(0.5, 9, 2)],
    "zero": [part(0.0, 5, 3), part(0.7, 6, 1), part(0.0, 3, 4), part(0.2, 2, 2)],
    "small first": [part(1e-6, 4, 1), part(2.0, 5, 2), part(1.0, 6, 3)],
}


WAYS: dict[str, Backward] = {"apart": apart, "together": together}
FISHERS = "exact", "empirical", "forward-only"
IN_TURN = [
    (case, [*WAYS][(i // 3 + j) % 2], owner, FISHERS[(i + j) % 3])
    for i, case in enumerate(PARTS)
    for j, owner in enumerate(OWNERS)
]
"""Any two of case, backward pass, owner and Fisher meet."""


@pytest.mark.parametrize(("case", "backward", "owner", "fisher"), IN_TURN)
def test_factors_are_those_of_the_weighted_sum(
    case: str, backward: str, owner: str, fisher: str
) -> None:
    parts = PARTS[case]
    check(factors(parts, WAYS[backward], owner, fisher=fisher), parts, fisher)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("total", [False, True])
def test_weights_of_calls_of_the_given_module(owner: str, total: bool) -> None:
    parts = [part(w, size, size, total=total) for w, size in ((0.7, 8), (0.2, 3), (0.1, 5))]
    parts = [own._replace(loss_fn=parts[0].loss_fn) for own in parts]
    check(factors(parts, by_module, owner), parts, "exact")


@pytest.mark.parametrize("owner", OWNERS)
def test_samples_have_the_weights_as_expectation(owner: str) -> None:
    parts = PARTS["two sizes"]
    copies = [own._replace(x=own.x.repeat(100, 1), y=torch.cat([own.y] * 100)) for own in parts]
    model, found = factors(copies, owner=owner, fisher="mc", mc_samples=4)
    for name, (_, b) in expected(model, parts).items():
        assert (found[name][1] - b).norm() < 0.1 * b.norm()


def test_the_block_is_the_dense_matrix_where_that_is_a_kronecker_product() -> None:
    """Two squared errors of one batch."""
    first, second = (part(w, 8, 5, squares=True) for w in (1.0, 0.3))
    second = second._replace(y=second.y + 1)
    model, found = factors([first, second])
    a, b = (own[0] for own in found["4"])
    dense: Any = sum(p.weight * dense_ggn(model, p.loss_fn, p.x, p.y, "4") for p in (first, second))
    torch.testing.assert_close(torch.kron(b, a), dense[0], **EXACT)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("backward", [apart, together, inside])
def test_uneven_micro_batches_are_the_full_batch(backward: Backward, owner: str) -> None:
    whole = part(1.0, 19, 0)
    slices = (slice(0, 8), slice(8, 16), slice(16, 19))
    parts = [Part(whole.loss_fn, whole.x[s], whole.y[s], len(whole.x[s]) / 19) for s in slices]
    check(factors(parts, backward, owner), [whole], "exact")
    if backward is not inside:
        check(factors(parts, backward, owner, fisher="empirical"), [whole], "empirical")


@pytest.mark.parametrize("owner", OWNERS)
def test_micro_batches_without_weights_add_up(owner: str) -> None:
    parts = [part(1.0, 6, seed)._replace(loss_fn=CROSS_ENTROPY) for seed in range(3)]
    check(factors(parts, by_module, owner), parts, "exact")


UNEVEN = [
    (options, inverse, ("expand", "reduce")[(i + j) % 2])
    for i, options in enumerate(({}, FIXED))
    for j, inverse in enumerate(("factored", "exact", "ekfac"))
]
"""Any two of mode, inverse and approximation in all combinations."""


@pytest.mark.parametrize(("options", "inverse", "approximation"), UNEVEN)
def test_training_on_uneven_micro_batches_is_training_on_the_whole(
    options: dict[str, Any], inverse: Any, approximation: Any
) -> None:
    """Convolutions and squared gradients as well; factors of many examples have no null space."""
    found, size = [], 90
    for slices in ([slice(0, size)], [slice(0, 40), slice(40, 70), slice(70, size)]):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        own = {"inverse": inverse, "approximation": approximation, **with_kl_clip(options, 0.1)}
        opt = KFAC(model, loss_fn, fisher="exact", **own)
        for seed in range(4):
            x, y = image_batch(size, seed)
            opt.zero_grad()
            for rows in slices:
                (len(x[rows]) / size * loss_fn(model(x[rows]), y[rows])).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("owner", ["fixed", "preconditioner"])
def test_weights_of_both_signs_are_refused(owner: str) -> None:
    model, loss_fn = network(), CROSS_ENTROPY
    opt = OWNERS[owner](model, loss_fn, fisher="exact")
    first, second = (part(*own)._replace(loss_fn=loss_fn) for own in ((1.0, 8, 0), (-0.3, 4, 1)))
    by_module(model, opt, [first, second])
    before, gradient = weights(model), model[1].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"weights of the same sign, got 1 and -0.3.*`observe`"):
        opt.step()
    assert torch.equal(weights(model), before)
    assert torch.equal(model[1].weight.grad, gradient)
    model = network()
    opt = OWNERS[owner](model, None, fisher="exact")
    losses = [loss_fn(model(own.x), own.y) for own in (first, second)]
    opt.observe(losses[0] - 0.3 * losses[1]).backward()
    opt.step()
    assert model[1].weight.grad.isfinite().all()


def test_negative_weights_alone_are_those_of_a_loss_that_is_maximised() -> None:
    parts = [
        part(w, size, size)._replace(loss_fn=CROSS_ENTROPY) for w, size in ((0.7, 8), (0.2, 3))
    ]
    negated = [own._replace(weight=-own.weight) for own in parts]
    check(factors(negated, by_module), parts, "exact")


def test_equal_weights_are_the_mean_to_the_last_bit() -> None:
    """The factors are those of sums without weights, times the sum of the weights, which is 1."""
    model = network().float()
    layers = find_layers(model)
    estimator = FisherEstimator(CROSS_ENTROPY, "exact")
    moments = {layer.name: LayerMoments(layer, "expand") for layer in layers}
    opt = KFAC(model, CROSS_ENTROPY, fisher="exact", **FIXED)
    for seed in range(4):
        own = part(0.25, 7, seed)
        with LayerCapture(layers) as capture:
            output = model(own.x.float())
            calls = capture.take()
        evaluation = RuleEvaluation(CROSS_ENTROPY, output, own.y)
        estimator.add_(moments, calls, evaluation, torch.Generator())
        (0.25 * CROSS_ENTROPY(model(own.x.float()), own.y)).backward()
    opt.step()
    for name, layer in layers_of(opt).items():
        for found, mean in zip(layer["factors"], moments[name].factors()):
            assert torch.equal(found, mean)
