"""Operations between outputs and a loss, each against the same operation by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, 3, generator=GENERATOR, dtype=torch.float64)
T = torch.rand(4, 6, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.arange(12).reshape(4, 3) % 6
WINDOW = torch.hann_window(4, dtype=torch.float64)


def square(o: Tensor) -> Tensor:
    """Positive definite matrices, ``[4, 3, 3]``."""
    return o.mT @ o + torch.eye(3, dtype=o.dtype)


def spectrum(o: Tensor) -> Tensor:
    """The magnitudes of a short-time Fourier transform."""
    return torch.stft(o.flatten(1), 4, 2, window=WINDOW, return_complex=True).abs()


def connectionist(o: Tensor) -> Tensor:
    """The CTC loss of four sequences."""
    targets, lengths = torch.ones(4, 2, dtype=torch.long), torch.full((4,), 2)
    inputs = o.log_softmax(2).transpose(0, 1)
    return functional.ctc_loss(inputs, 1 + targets.cumsum(1) % 2, torch.full((4,), 6), lengths)


def attention(o: Tensor) -> Tensor:
    """A loss of attention, by single operations."""
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(o, o, o).square().mean()


def slopes(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the squared derivative of a function, which is taken with a vector that depends."""

    def loss(o: Tensor) -> Tensor:
        x = o if o.requires_grad else o.clone().requires_grad_()
        y = function(x)
        vector = 1 + y.square() if y.ndim else None
        return torch.autograd.grad(y, x, vector, create_graph=True)[0].square().mean()

    return loss


def views(o: Tensor) -> Tensor:
    """A product of parts."""
    return o[:, 1] * o[:, 2:5, 0] * o.diagonal(dim1=1, dim2=2) * o.unfold(1, 3, 3)[:, 1, 0]


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma": lambda o: torch.distributions.Beta(o.exp(), (0.5 * o).exp()).log_prob(T).mean(),
    "digamma": lambda o: o.exp().digamma().mean(),
    "x log y": lambda o: torch.xlogy(o.exp(), 1 + o.square()).mean(),
    "divergence of both": lambda o: functional.kl_div(
        o.log_softmax(2), (o * T).softmax(2), reduction="batchmean"
    ),
    "entropy": lambda o: torch.special.entr(o.sigmoid()).sum(),
    "angles": lambda o: torch.atan2(o[..., 0], o[..., 1]).mean() + o[..., 2].atan().mean(),
    "cosines": lambda o: (0.9 * o.tanh()).acos().mean() + (0.9 * o.tanh()).asin().square().mean(),
    "tangents": lambda o: (0.3 * o).tan().mean() + o.erfc().mean() + o.sinc().mean(),
    "hard": lambda o: (functional.hardswish(o) * functional.relu6(o)).mean(),
    "log of exponentials": lambda o: torch.logaddexp(o, o.flip(0)).mean(),
    "binary log of exponentials": lambda o: torch.logaddexp2(o, T).mean(),
    "largest and smallest": lambda o: (torch.fmax(o, T) * torch.fmin(o, T)).mean(),
    "x log of 1 + y": lambda o: torch.special.xlog1py(o.exp(), o.square()).mean(),
    "hypotenuse of a constant": lambda o: torch.hypot(o.sin(), T).mean() + torch.hypot(T, o).mean(),
    "normal distribution": lambda o: (
        torch.special.erfcx(o) - torch.special.log_ndtr(o) + torch.special.ndtri(o.sigmoid())
    ).mean(),
    "Bessel functions": lambda o: (
        torch.i0(o) + torch.special.i0e(o) + torch.special.i1(o) * torch.special.i1e(o)
    ).mean(),
    "turned": lambda o: (torch.rot90(o).deg2rad() - torch.rot90(T).deg2rad()).square().mean(),
    "shuffled": lambda o: (functional.channel_shuffle(o, 2) * T).square().mean(),
    "distances": lambda o: torch.cdist(o, o.flip(0) + 1).mean(),
    "maximum": lambda o: o.max() - (o.min() - T.min()).square(),
    "product": lambda o: (1 + 0.1 * o).cumprod(1).mean(),
    "convolution": lambda o: (
        functional.conv1d(o, o[:2].exp(), o[0, 0, :2], stride=2, padding=1).square().mean()
    ),
    "transposed convolution": lambda o: (
        functional.conv_transpose2d(o[:, None], o[:1, None, :2, :2].sin(), stride=2).square().mean()
    ),
    "modulated convolution": lambda o: (
        functional.conv1d(
            o.reshape(1, 24, 3), o.repeat_interleave(2, 0).reshape(8, 6, 3), padding=1, groups=4
        )
        .tanh()
        .mean()
    ),
    "gate": lambda o: functional.glu(o, dim=1).mean(),
    "pooling": lambda o: functional.max_pool2d(o, (2, 1), stride=1).square().mean(),
    "grid": lambda o: (
        functional.grid_sample(o[:, None], T[:, :2, :2].unsqueeze(1)[..., :2], align_corners=False)
        .square()
        .mean()
    ),
    "not a number": lambda o: o.nan_to_num(1.0).square().mean(),
    "Gaussian": lambda o: (
        torch.distributions.MultivariateNormal(o[:, 0], scale_tril=square(o).tril())
        .log_prob(T[:, 0])
        .mean()
    ),
    "precision": lambda o: (
        torch.distributions.MultivariateNormal(o[:, 0], square(o)).log_prob(T[:, 0]).mean()
    ),
    "triangular": lambda o: torch.linalg.solve_triangular(
        square(o).triu(), o, upper=True, left=False, unitriangular=True
    ).mean(),
    "spectrum": lambda o: functional.mse_loss(spectrum(o), spectrum(T)),
    "Fourier": lambda o: torch.fft.fft(torch.fft.rfft(o, dim=1), dim=2).abs().square().mean(),
    "inverse Fourier": lambda o: torch.fft.irfft(torch.fft.rfft(o, dim=1), dim=1).square().mean(),
    "connectionist": connectionist,
    "inverses": lambda o: torch.linalg.inv(square(o)).mean() + torch.erfinv(0.5 * o.tanh()).mean(),
    "system": lambda o: torch.linalg.solve(square(o), o.mT).mean(),
    "system of a vector": lambda o: torch.linalg.solve(square(o), o[:, 0]).square().mean(),
    "system from the right": lambda o: torch.linalg.solve(square(o), o, left=False).mean(),
    "determinants": lambda o: torch.linalg.det(square(o)).mean() + torch.logdet(square(o)).sum(),
    "Cholesky": lambda o: (
        torch.cholesky_solve(o.mT, torch.linalg.cholesky(square(o))).mean()
        + torch.cholesky_inverse(torch.linalg.cholesky(square(o))).sum()
    ),
    "eigenvalues": lambda o: (torch.linalg.eigvalsh(square(o)) - 1).square().mean(),
    "singular values": lambda o: (torch.linalg.svdvals(o) - T[:, 0]).square().mean(),
    "nuclear norm": lambda o: torch.linalg.matrix_norm(o - T, "nuc").mean(),
    "exponential": lambda o: torch.linalg.matrix_exp(0.3 * square(o)).mean(),
    "cross product": lambda o: (torch.linalg.cross(o, o.flip(1)) - T).square().mean(),
    "pairs": lambda o: (functional.pdist(o.flatten(1)) - 1).square().mean(),
    "pairs of rows": lambda o: (torch.cdist(o, o) - 1).square().mean(),
    "products": lambda o: ((1 + 0.1 * o).prod(1) - 1).square().mean() + o.prod(2, True).mean(),
    "inverse functions": lambda o: (
        o.asinh().square().mean()
        + (1.5 + o.square()).acosh().mean()
        + (0.5 * o.tanh()).atanh().mean()
        + (0.9 * o.sigmoid()).logit().mean()
        + torch.mvlgamma(2 + o.exp(), 2).mean()
    ),
    "sums of exponentials": lambda o: (o.logcumsumexp(1) - T).square().mean(),
    "attention": attention,
    "pooling in three dimensions": lambda o: functional.max_pool3d(o[None], (1, 2, 2)).mean(),
    "positive parts": lambda o: (
        functional.relu(o[:, 1:, 0] + o[:, :-1, 1]).mean()
        + functional.relu(torch.cat([o, -2 * o.flip(0)], 1)).square().mean()
        + functional.relu(o.mean(1) / 3).sum()
    ),
    "hinge": lambda o: functional.relu(0.5 - o).mean() + functional.relu(1 + 2 * o).square().mean(),
    "margin": lambda o: functional.relu((o - T).norm(dim=2) - o.norm(dim=2) + 0.3).mean(),
    "hardest triplets": lambda o: functional.relu(
        torch.cdist(o, T).max(2).values
        - torch.cdist(o, T).topk(1, largest=False).values[..., 0]
        - 1
    ).mean(),
    "median": lambda o: (o - T).abs().median(),
    "slopes of tanh": slopes(torch.tanh),
    "slopes of sigmoid": slopes(torch.sigmoid),
    "slopes of softplus": slopes(lambda o: functional.softplus(o, 2)),
    "slopes of gelu": slopes(lambda o: functional.gelu(o, approximate="tanh")),
    "slopes of logsigmoid": slopes(functional.logsigmoid),
    "slopes of softmax": slopes(lambda o: o.softmax(1)),
    "slopes of log-softmax": slopes(lambda o: o.log_softmax(-1)),
    "slopes of squared errors": slopes(lambda o: functional.mse_loss(o, T)),
    "slopes of differences": slopes(lambda o: functional.mse_loss(o, o.flip(0), reduction="sum")),
    "slopes of Huber": slopes(lambda o: functional.huber_loss(2 * o, T, delta=0.7)),
    "slopes of smooth L1": slopes(lambda o: functional.smooth_l1_loss(o, T, beta=0.5)),
    "slopes of cross entropy": slopes(lambda o: functional.cross_entropy(o, CLASSES)),
    "slopes of parts": slopes(views),
}


def grid_has_curvature() -> bool:
    """Return whether this version of torch differentiates samples of a grid twice."""
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    sampled = functional.grid_sample(x, torch.zeros_like(x).view(1, 1, 2, 2), align_corners=False)
    (slope,) = torch.autograd.grad(sampled.square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), x)
    except RuntimeError:
        return False
    return True


if not grid_has_curvature():
    del LOSSES["grid"]


def read(loss: Callable[[Tensor], Tensor]) -> tuple[Reading, Tensor, Tensor]:
    """Read a loss of an output ``[4, 6, 3]``."""
    output = X.clone().requires_grad_() * 1.0
    mark_(output, "test", output.detach())
    value = loss(output)
    one = torch.ones_like(value)
    edge = edge_of(value)
    return Reading(edge, value.detach(), one, lambda e: mark_of(e, "test"), {}), output, value


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_slopes_at_other_outputs(name: str) -> None:
    reading, output, value = read(LOSSES[name])
    tail = reading.tail(reading.graph.sources)
    value.backward()  # frees the graph
    assert not tail.unknown()
    other = output.detach() + 0.3 * torch.randn(output.shape, generator=GENERATOR).double()
    torch.testing.assert_close(tail.value([other]), LOSSES[name](other), rtol=1e-9, atol=1e-12)
    (slope,) = tail.slopes()
    expected = torch.autograd.functional.jacobian(LOSSES[name], output.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_curvature_is_not_negative(name: str) -> None:
    reading, output, _ = read(LOSSES[name])
    u = torch.randn(3, *output.shape, generator=GENERATOR, dtype=torch.float64)
    found = reading.tail(reading.graph.sources).expansion([[each] for each in u]).curvature
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-9 * float(found.trace())


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "signs": lambda o: ((o - T) * (o - T).sign()).mean(),
    "whole numbers": lambda o: (o.round() - o).square().mean(),
    "tenths": lambda o: (o.round(decimals=1) + 0.5 * o).square().mean(),
    "floors": lambda o: (o - o.floor()).square().mean() + (o.ceil() * o).mean(),
    "fractions": lambda o: (o.frac() * o.trunc()).square().mean(),
    "angles": lambda o: (torch.remainder(o - T + 1, 2) - 1).square().mean(),
    "of another sign": lambda o: (torch.fmod(o - T, 2) + 0.5).square().mean(),
    "remainders of both": lambda o: torch.remainder(o, 1 + T * o.flip(0).square()).square().mean(),
}
"""Losses of operations that are linear in pieces."""


@pytest.mark.parametrize("name", STEPS)
def test_pieces_stay_what_they_were(name: str) -> None:
    reading, output, value = read(STEPS[name])
    tail = reading.tail(reading.graph.sources)
    value.backward()
    assert not tail.unknown()
    near = output.detach() * (1 + 1e-9)  # in the same pieces
    for own in (output.detach(), near):
        torch.testing.assert_close(tail.value([own]), STEPS[name](own), rtol=1e-9, atol=1e-12)
    (slope,) = tail.slopes()
    expected = torch.autograd.functional.jacobian(STEPS[name], output.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
    u = torch.randn(3, *output.shape, generator=GENERATOR, dtype=torch.float64)
    found = tail.expansion([[each] for each in u]).curvature
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-9 * float(found.trace())


class Sub(torch.autograd.Function):
    """A function of a user with the name of an operation of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


def derivative(o: Tensor) -> Tensor:
    """The derivative of a leaky ReLU, as in a gradient penalty."""
    y = functional.leaky_relu(o.sin())
    (slope,) = torch.autograd.grad(y.sum(), o, create_graph=True)
    return slope.square().mean()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda o: Sub.apply(o).mean(), "autograd.Function Sub"),
        (derivative, "LeakyReluBackward"),
        (lambda o: torch.linalg.pinv(o).mean(), "LinalgPinv"),
        (lambda o: torch.linalg.eigh(square(o)).eigenvectors.mean(), "LinalgEigh"),
        (lambda o: torch.linalg.svd(o).U.mean(), "LinalgSvd"),
        (lambda o: functional.threshold(o, 0.1, 2.0).mean(), "Threshold"),
    ],
)
def test_operations_that_cannot_be_evaluated_again_are_named(
    loss: Callable[[Tensor], Tensor], kind: str
) -> None:
    reading, _, _ = read(loss)
    assert kind in reading.tail(reading.graph.sources).unknown()
