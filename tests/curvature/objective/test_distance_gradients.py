"""Derivatives through distances, with and without distances that are zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import edge_of
from einconv_kfac.curvature.objective.linear_map import LinearMap

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(2, 4, 3, generator=GENERATOR, dtype=torch.float64)
PLAIN, BY_PRODUCTS = "donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist"


def by_rows(x: Tensor, y: Tensor) -> Tensor:
    """Distances of rows, of which those that are zero have the derivative zero."""
    squares = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    return torch.where(squares > 0, squares.where(squares > 0, 1).sqrt(), 0)


def pairs(x: Tensor) -> Tensor:
    """The same for the pairs of rows."""
    i, j = torch.triu_indices(len(x), len(x), 1)
    return by_rows(x, x)[i, j]


DISTANCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "of rows": (lambda x: torch.cdist(x, Y, compute_mode=PLAIN), lambda x: by_rows(x, Y)),
    "to rows": (lambda x: torch.cdist(Y, x, compute_mode=PLAIN), lambda x: by_rows(Y, x)),
    "of itself": (lambda x: torch.cdist(x, x, compute_mode=PLAIN), lambda x: by_rows(x, x)),
    "by products": (
        lambda x: torch.cdist(x, Y, compute_mode=BY_PRODUCTS),
        lambda x: by_rows(x, Y),
    ),
    "pairs": (functional.pdist, pairs),
    "pairs with equal rows": (
        lambda x: functional.pdist(torch.cat([x, x])),
        lambda x: pairs(torch.cat([x, x])),
    ),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_jacobian_vector_products(name: str) -> None:
    function, by_hand = DISTANCES[name]
    x = X.clone().requires_grad_()
    source = x * 1.0
    distances = function(source)
    start, end = edge_of(source), edge_of(distances)
    nodes, waiting = dict[object, int](), [end[0]]
    while waiting:
        node = waiting.pop()
        nodes[node] = -len(nodes)
        waiting += [p for p, _ in node.next_functions if p is not None and p is not start[0]]
    map_ = LinearMap(end, nodes, lambda edge: edge == start)  # type: ignore[arg-type]
    along = torch.randn(X.shape, generator=GENERATOR, dtype=torch.float64)
    _, expected = torch.func.jvp(by_hand, (X,), (along,))
    found = map_({start: along})
    torch.testing.assert_close(found, expected)
    weights = torch.randn(distances.shape, generator=GENERATOR, dtype=torch.float64)
    (transposed,) = torch.autograd.grad(distances, source, weights)
    torch.testing.assert_close(map_.transposed(weights)[start], transposed)
