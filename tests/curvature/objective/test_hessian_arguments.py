"""Logarithms of exponentials of scores that are no outputs: the Hessian is that by the scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.func import hessian, jacrev
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)


def products(o: Tensor) -> Tensor:
    """Scores of pairs that belong together, and of others."""
    return torch.stack([(o[:, :2] * o[:, 2:4]).sum(1), -(o[:, :2] * o[:, 4:]).sum(1)])


def cosines(o: Tensor) -> Tensor:
    return functional.cosine_similarity(o[:, None, :3], o[None, :, 3:], dim=-1) / 0.5


def similarities(o: Tensor) -> Tensor:
    return functional.normalize(o) @ functional.normalize(T).mT / 0.5


def likelihood(scores: Tensor) -> Tensor:
    return -functional.logsigmoid(scores).sum(0).mean()


def contrast(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores, torch.arange(5))


SPELLED: dict[str, tuple[Loss, Loss, Loss]] = {
    "logarithms of sigmoids": (
        lambda o: -(products(o)[0].sigmoid().log() + products(o)[1].sigmoid().log()).mean(),
        products,
        likelihood,
    ),
    "one less a sigmoid": (
        lambda o: (
            -torch.log(products(o)[0].sigmoid()).mean()
            - torch.log(1 - (-products(o)[1]).sigmoid()).mean()
        ),
        products,
        likelihood,
    ),
    "binary cross entropies": (
        lambda o: (
            2 * functional.binary_cross_entropy(products(o).sigmoid(), torch.ones(2, 5).double())
        ),
        products,
        likelihood,
    ),
    "quotients of exponentials": (
        lambda o: -((e := cosines(o).exp()).diagonal() / e.sum(1)).log().mean(),
        cosines,
        contrast,
    ),
    "exponentials of selected scores": (
        lambda o: -torch.log((s := similarities(o))[:, 0].exp() / s.exp().sum(1)).mean(),
        similarities,
        lambda s: functional.cross_entropy(s, torch.zeros(5, dtype=torch.long)),
    ),
}
"""Losses, the scores in them, and the losses as functions of these."""


@pytest.mark.parametrize("name", SPELLED)
def test_hessians_by_scores(name: str) -> None:
    loss, scores, outer = SPELLED[name]
    values = scores(X)
    torch.testing.assert_close(loss(X), outer(values))
    inner = hessian(outer)(values).reshape(values.numel(), values.numel())
    slopes = jacrev(scores)(X).reshape(values.numel(), X.numel())
    torch.testing.assert_close(loss_curvature(loss, X), slopes.mT @ inner @ slopes)
