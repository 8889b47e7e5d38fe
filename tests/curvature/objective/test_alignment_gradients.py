"""The CTC loss has the curvature of cross entropies with the expected labels of each position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature, read_loss
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
N, TIME, CLASSES = 4, 5, 3
X = torch.randn(N, TIME, CLASSES, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([[1, 2], [2, 1], [1, 1], [1, 2]])
LENGTHS = torch.tensor([5, 4, 2, 5])  # the third sequence is too short for two equal labels
SIZES = torch.tensor([2, 1, 2, 2])


def by_sequence(log_p: Tensor) -> Tensor:
    return functional.ctc_loss(log_p, LABELS, LENGTHS, SIZES, reduction="none", zero_infinity=True)


def by_rows(o: Tensor) -> Tensor:
    """Log-probabilities ``[t, n, c]``, computed for rows of scores."""
    return o.flatten(0, 1).log_softmax(-1).view(o.shape).permute(1, 0, 2)


REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda o: o.log_softmax(-1).transpose(0, 1),
    "scores transposed": lambda o: o.transpose(0, 1).log_softmax(2),
    "rows": by_rows,
}


def expected(weights: Tensor) -> Tensor:
    """Return the Hessian of cross entropies with a weight for each position, ``[n, t]``."""
    p = X.softmax(-1)
    blocks = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.block_diag(*(blocks * weights[..., None, None]).flatten(0, 1))


COUNTED = (torch.arange(TIME) < LENGTHS[:, None]) & (torch.arange(N) != 2)[:, None]


@pytest.mark.parametrize("name", REARRANGED)
def test_every_position_counts_as_a_cross_entropy(name: str) -> None:
    found = loss_curvature(lambda o: by_sequence(REARRANGED[name](o)).sum(), X)
    torch.testing.assert_close(found, expected(COUNTED.double()))


@pytest.mark.parametrize("name", REARRANGED)
def test_a_mean_has_the_weights_of_its_sequences(name: str) -> None:
    def loss(o: Tensor) -> Tensor:
        log_p = REARRANGED[name](o)
        return functional.ctc_loss(log_p, LABELS, LENGTHS, SIZES, zero_infinity=True)

    weights = COUNTED / (N * SIZES[:, None].double())
    torch.testing.assert_close(loss_curvature(loss, X), expected(weights))


@pytest.mark.parametrize("name", REARRANGED)
def test_a_model_that_ends_with_log_probabilities(name: str) -> None:
    """The curvature by the log-probabilities is that by the scores, which it leads back to."""
    last = REARRANGED[name]
    jacobian = torch.func.jacrev(last)(X).reshape(X.numel(), X.numel())
    units = torch.eye(X.numel(), dtype=X.dtype).reshape(-1, *last(X).shape)
    tail = read_loss(lambda log_p: by_sequence(log_p).sum(), X, last)
    found = tail.expansion([[unit] for unit in units]).curvature
    torch.testing.assert_close(jacobian.mT @ found @ jacobian, expected(COUNTED.double()))


class Recogniser(nn.Module):
    """A model that computes the losses of its sequences, or returns log-probabilities."""

    def __init__(self, *, computes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.computes = nn.Linear(CLASSES, CLASSES).double(), computes

    def forward(self, x: Tensor) -> Tensor:
        log_p = self.layer(x).log_softmax(-1).transpose(0, 1)
        return by_sequence(log_p) if self.computes else log_p


def test_losses_that_the_model_computes() -> None:
    found = []
    for computes in (True, False):
        model = Recogniser(computes=computes)
        opt = KFAC(model, fisher="exact")
        for _ in range(3):
            opt.zero_grad()
            returned = model(X)
            opt.observe((returned if computes else by_sequence(returned)).mean()).backward()
            opt.step()
        found.append(model.layer.weight.detach())
    torch.testing.assert_close(*found)


def test_slopes_are_those_of_torch() -> None:
    def loss(o: Tensor) -> Tensor:
        return by_sequence(o.log_softmax(-1).transpose(0, 1)).sum()

    (slope,) = read_loss(loss, X).slopes()
    torch.testing.assert_close(slope, torch.autograd.functional.jacobian(loss, X))


def test_other_log_probabilities_keep_the_slopes_of_torch() -> None:
    def loss(o: Tensor) -> Tensor:
        return by_sequence((o.softmax(-1) + 1e-6).log().transpose(0, 1)).sum()

    (slope,) = read_loss(loss, X).slopes()
    torch.testing.assert_close(slope, torch.autograd.functional.jacobian(loss, X))
