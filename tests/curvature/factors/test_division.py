"""Factors that are divided into tasks, against the definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from factor_definition import columns, factor

from einconv_kfac.curvature.factors import conv_input_factor, division, linear_input_factor
from einconv_kfac.curvature.factors.choice import ALGORITHMS, applicable, choose
from einconv_kfac.curvature.factors.division import Division, add_divided, division_of
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric import channel_blocks, update
from einconv_kfac.curvature.factors.symmetric.update import Target, prepare
from einconv_kfac.geometry import Axis, Geometry, conv_geometry

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IMAGE = (Axis(7, 3, 1, (1, 1)), Axis(8, 3, 1, (1, 0)))
STRIDED = (Axis(9, 3, 2, (1, 1)), Axis(8, 3, 1, (0, 1), 2))
LINE = (Axis(11, 3, 1, (1, 1)),)


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(geometry: Geometry, batch: int, channels: int) -> torch.Tensor:
    shape = (batch, geometry.groups * channels, *geometry.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", [division.GROUPS, division.EXAMPLES, division.OWN, "alone"])
@pytest.mark.parametrize("axes", [IMAGE, STRIDED, LINE], ids=["image", "strided", "line"])
@pytest.mark.parametrize(
    "name", [name for name in ALGORITHMS if name not in ("pointwise", "fused")]
)
def test_every_algorithm(
    name: str, axes: tuple[Axis, ...], kind: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways to divide each algorithm, with parts of different sizes."""
    monkeypatch.setattr(channel_blocks, "FEWEST_BLOCK_CHANNELS", 2)
    geometry = Geometry(axes, 4 if kind == division.GROUPS else 1)
    problem = Problem(geometry, 5, 7, torch.float64, "cpu", threads=threads)
    algorithm = ALGORITHMS[name]
    if name not in applicable(problem):
        pytest.skip("not for this convolution")
    if kind == division.OWN and len(algorithm.shares(problem, threads)) == 1:
        pytest.skip("not divided in a way of its own")
    found = Division(division.UNDIVIDED, 1, 0.0)
    if kind != "alone":
        found = Division(kind, threads, 0.0)
    monkeypatch.setattr(division, "division_of", lambda *_: found)
    division.parts.cache_clear()
    x = draw(geometry, 5, 7)
    expected = factor(columns(x, geometry), "expand") * 5
    old = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    old = old + old.mT
    for out, beta in ((None, 0.0), (old.clone(), 0.5)):
        target = prepare(x, (geometry.groups, problem.size), Target(out, beta, 2.0))
        with torch.no_grad():
            add_divided(algorithm, x, problem, target)
        torch.testing.assert_close(target.out, beta * old + 2 * expected, **TOLERANCE)
        assert torch.equal(target.out, target.out.mT)
    division.parts.cache_clear()


@pytest.mark.parametrize("channels", [3, 200])
def test_shared_products(channels: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of products, on several threads."""
    monkeypatch.setattr(update, "SHARED_MACS", 1)
    a = torch.randn(9, 5, channels, dtype=torch.float64)
    expected = torch.einsum("nsd,nse->de", a, a)[None] / 9
    got = linear_input_factor(a)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(
        linear_input_factor(a, out=got.clone(), beta=0.5), 1.5 * expected, **TOLERANCE
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 8, 30, 30), {"kernel_size": 3, "padding": 1}),
        ((6, 12, 20, 20), {"kernel_size": 3, "padding": 1, "groups": 12}),
        ((8, 70, 9, 9), {"kernel_size": 3, "padding": 1}),
        ((8, 24, 9, 9), {"kernel_size": 1}),
    ],
)
def test_chosen_division(
    shape: tuple[int, ...], options: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen where tasks cost nothing."""
    monkeypatch.setattr(channel_blocks, "FEWEST_BLOCK_CHANNELS", 32)
    x = torch.randn(shape, dtype=torch.float64)
    geometry = conv_geometry(shape[2:], **options)
    expected = factor(columns(x, geometry), "expand")
    got = conv_input_factor(x, **options)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    assert torch.equal(got, conv_input_factor(x, **options))


def test_modes_see_all_operations(threads: int) -> None:
    """A mode of the calling thread records what is computed, so nothing is divided."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += "mm" in str(function) or "convolution" in str(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(16, 32, 56, 56)
    problem = Problem(conv_geometry((56, 56), 3, padding=1), 16, 32, x.dtype, "cpu", False, threads)
    assert division_of(problem, ALGORITHMS[choose(problem)]).tasks > 1
    with Count() as count:
        conv_input_factor(x, 3, padding=1)
    assert count.products > 0


def test_one_thread_is_undivided() -> None:
    for channels in (1, 64):
        problem = Problem(conv_geometry((56, 56), 3, padding=1), 16, channels, torch.float32, "cpu")
        assert not division_of(problem, ALGORITHMS[choose(problem)]).tasks
