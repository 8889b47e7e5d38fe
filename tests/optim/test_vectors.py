"""The algebra of directions equals that of the vectors of all their entries, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from einconv_kfac.optim import vectors
from einconv_kfac.optim.vectors import (
    LARGEST_JOINED_ENTRIES,
    Direction,
    combination,
    first_not_finite,
    gram_matrix,
    inner,
    inner_products,
    scaled,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (3, 4),
    "a.bias": (3,),
    "large.weight": (2, LARGEST_JOINED_ENTRIES),
    "b.weight": (2, 3, 4, 5),
    "number": (),
    "nothing": (0, 2),
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x,
    "complex": lambda x: torch.complex(x, x.flip(0) if x.ndim else x).conj(),
    "strided": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "two types": lambda x: x.float() if x.ndim == 2 else x,
}


def direction(seed: int, kind: str, names: set[str] | None = None) -> Direction:
    """Random tensors of some of the names."""
    generator = torch.Generator().manual_seed(seed)
    every = {
        name: KINDS[kind](torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    return {name: tensor for name, tensor in every.items() if names is None or name in names}


def product(a: Direction, b: Direction, weights: dict[str, float] | None = None) -> Tensor:
    """The inner product, from the real parts of products."""
    total = torch.zeros((), dtype=torch.float64)
    for name in a.keys() & b.keys():
        part = (a[name].to(torch.complex128) * b[name].conj()).sum().real
        total += part * (weights[name] if weights else 1.0)
    return total


def directions(kind: str) -> list[Direction]:
    """Directions that differ in their names."""
    some = {"a.bias", "large.weight", "b.weight"}
    others = {"b.weight", "number"}
    known = [None, some, others, None]
    return [direction(seed, kind, names) for seed, names in enumerate(known)]


@pytest.fixture(params=[1 << 20, 1])
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Join all small tensors, or one at a time."""
    monkeypatch.setattr(vectors, "JOINED_ENTRIES", request.param)


TOLERANCE = {"two types": 1e-5}


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("weights", [None, {n: 0.5 + (i > 1) for i, n in enumerate(SHAPES)}])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, weights: dict[str, float] | None) -> None:
    known = directions(kind)
    expected = torch.stack([torch.stack([product(a, b, weights) for b in known]) for a in known])
    close = {"rtol": TOLERANCE.get(kind, 1e-12), "atol": TOLERANCE.get(kind, 1e-12) * 100}
    torch.testing.assert_close(gram_matrix(known, weights), expected, **close)
    found = torch.stack([inner(a, b, weights) for a in known for b in known])
    torch.testing.assert_close(found, expected.flatten(), **close)
    if weights is None:
        torch.testing.assert_close(inner_products(known[1], known), expected[1], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_combinations(kind: str) -> None:
    known, coefficients = directions(kind), [0.3, -2.0, 1.5, 0.0]
    before = [{name: tensor.clone() for name, tensor in own.items()} for own in known]
    found = combination(SHAPES, coefficients, known)
    assert list(found) == list(SHAPES)
    for name, tensor in found.items():
        terms = [c * own[name] for c, own in zip(coefficients, known) if name in own]
        torch.testing.assert_close(tensor, sum(terms))
    factors = {name: 1.0 + i for i, name in enumerate(SHAPES)}
    for name, tensor in scaled(known[0], factors).items():
        torch.testing.assert_close(tensor, known[0][name] * factors[name])
    assert scaled({}, factors) == {}
    for own, old in zip(known, before):
        assert all(torch.equal(own[name], old[name]) for name in own)


def test_low_precision_is_combined_in_float32() -> None:
    low = {"x": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    found = combination(["x"], [1e-3, 1.0], [low, {"x": torch.ones(2)}])
    assert found["x"].dtype == torch.float32
    torch.testing.assert_close(found["x"], torch.tensor([1.001, 1.002]))
    small = {"x": torch.full((4,), 1e-5, dtype=torch.float16)}
    assert float(inner(small, small)) == pytest.approx(4e-10, rel=0.02)


def test_overflowing_norms_are_finite() -> None:
    huge = torch.full((4,), 3e38)
    infinite, nan = torch.tensor([1.0, torch.inf]), torch.tensor(torch.nan)
    assert first_not_finite({"a": huge, "b": torch.ones(2)}) is None
    assert first_not_finite({"a": huge, "b": infinite, "c": nan}) == "b"
    assert first_not_finite({"a": nan}) == "a"
    assert first_not_finite({}) is None
