"""Selections and positive parts that depend on the output, and whose rule no node keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.curvature.objective.tail import Tail

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 5, generator=GENERATOR, dtype=torch.float64)
T = torch.rand(8, 5, generator=GENERATOR, dtype=torch.float64)
OTHER = X + 0.5 * torch.randn(8, 5, generator=GENERATOR, dtype=torch.float64)


def tail_of(loss: Callable[[Tensor], Tensor]) -> Tail:
    """Return what is read off a loss of the output ``X``."""
    output = X.clone().requires_grad_() * 1.0
    mark_(output, "test", output.detach())
    value = loss(output)
    own = edge_of(value), value.detach(), torch.ones_like(value)
    reading = Reading(*own, lambda edge: mark_of(edge, "test"), {})
    tail = reading.tail(reading.graph.sources)
    assert not tail.unknown()
    return tail


def entries(found: object, dim: int, *, keepdim: bool = True) -> Callable[[Tensor], Tensor]:
    """Return what takes the entries at the indices that an operation returned."""
    indices = found.indices if keepdim else found.indices.unsqueeze(dim)  # type: ignore[attr-defined]
    return lambda o: o.gather(dim, indices)


SELECTED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "largest": (lambda o: o.topk(3, dim=1).values, entries(X.topk(3, dim=1), 1)),
    "smallest": (
        lambda o: o.topk(2, dim=0, largest=False).values,
        entries(X.topk(2, dim=0, largest=False), 0),
    ),
    "sorted": (lambda o: o.sort(0, descending=True).values, entries(X.sort(0, True), 0)),
    "third": (lambda o: o.kthvalue(3, dim=1).values, entries(X.kthvalue(3, 1), 1, keepdim=False)),
    "median": (lambda o: o.median(0, True).values, entries(X.median(0, True), 0)),
    "most frequent": (lambda o: o.mode(1).values, entries(X.mode(1), 1, keepdim=False)),
    "maximum of what is not known": (
        lambda o: (o - T).max(1).values,
        entries((X - T).max(1), 1, keepdim=False),
    ),
    "running maximum": (lambda o: o.cummax(1).values, entries(X.cummax(1), 1)),
}


@pytest.mark.parametrize("name", SELECTED)
def test_selected_entries_stay_selected(name: str) -> None:
    select, fixed = SELECTED[name]
    target = torch.rand_like(fixed(X))
    tail = tail_of(lambda o: (select(o).reshape(target.shape) - target).square().mean())
    expected = (fixed(OTHER) - fixed(X) + select(X).reshape(target.shape) - target).square().mean()
    torch.testing.assert_close(tail.value([OTHER]), expected)
    along = torch.randn(8, 5, generator=GENERATOR, dtype=torch.float64)
    found = tail.expansion([[along]]).curvature[0, 0]
    torch.testing.assert_close(found, 2 * fixed(along).square().mean())


THRESHOLDS = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64).requires_grad_()
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logarithm of a sum": lambda o: o.logsumexp(1) - 1.8,
    "of few": lambda o: (
        o.masked_fill(T > 0.6, -torch.inf).logsumexp(1).masked_fill(T[:, 0] > 0.7, -1.0)
    ),
    "log-probabilities": lambda o: o.log_softmax(1) + 1.7,
    "probabilities": lambda o: 0.3 - o.softmax(1),
    "solution": lambda o: torch.linalg.solve(o[:5] + 4 * torch.eye(5).double(), o[3:]),
    "eigenvalues": lambda o: torch.linalg.eigvalsh(o.T @ o) - 5,
    "singular values": lambda o: 2 - torch.linalg.svdvals(o),
    "parameters": lambda o: o - THRESHOLDS,
    "filled": lambda o: o.masked_fill(T > 0.8, -3.0),
    "padded": lambda o: functional.pad(o, (1, 1), value=-1.0),
    "selected of two": lambda o: torch.where(T > 0.8, T - 2, 2 * o),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_positive_part_of_other_operations(name: str) -> None:
    def loss(o: Tensor) -> Tensor:
        return functional.relu(PARTS[name](o)).square().mean()

    torch.testing.assert_close(tail_of(loss).value([OTHER]), loss(OTHER))


@pytest.mark.parametrize("shift", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_a_constant_follows_from_the_positive_part(shift: float, scale: float) -> None:
    """Also where other entries than before are positive."""

    def loss(o: Tensor) -> Tensor:
        return functional.relu(shift + scale * o).square().mean()

    torch.testing.assert_close(tail_of(loss).value([OTHER]), loss(OTHER))


CONSTANTS = {
    "many": T,
    "one that is too small to be seen": torch.where(X < 0, -9.0, 0.5),
    "none that is seen": torch.full_like(X, -9.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_entries_without_a_positive_part_stay_so_where_constants_are_unknown(name: str) -> None:
    shift = CONSTANTS[name]
    tail = tail_of(lambda o: functional.relu(o + shift).square().mean())
    expected = functional.relu(OTHER + shift).where(shift + X > 0, 0).square().mean()
    torch.testing.assert_close(tail.value([OTHER]), expected)


def test_a_constant_that_does_not_explain_the_other_entries() -> None:
    """The positive entries have the same one, with which others would be positive as well."""
    shift = torch.where(torch.arange(5) < 2, 0.5, -9.0).expand(8, 5)
    tail = tail_of(lambda o: functional.relu(o + shift).mean())
    expected = functional.relu(OTHER + shift).where(shift + X > 0, 0).mean()
    torch.testing.assert_close(tail.value([OTHER]), expected)


def test_a_positive_part_of_selected_entries() -> None:
    tail = tail_of(lambda o: functional.relu(1 - o.topk(3, dim=1).values).square().mean())
    selected = OTHER.gather(1, X.topk(3, dim=1).indices)
    torch.testing.assert_close(tail.value([OTHER]), functional.relu(1 - selected).square().mean())


def test_a_positive_part_behind_many_linear_operations() -> None:
    """Each uses the one before twice: there are more ways through them than one can walk."""

    def loss(o: Tensor) -> Tensor:
        for _ in range(600):
            o = 0.5 * o + 0.5 * o.flip(0)
        return functional.relu(1 - o).square().mean()

    torch.testing.assert_close(tail_of(loss).value([OTHER]), loss(OTHER))
