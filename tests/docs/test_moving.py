"""The rows of docs/moving.md: arguments exist, and other libraries compute the same."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import einconv.conv_index_pattern
import einconv.utils
import pytest
import torch
import unfoldNd
from torch import Tensor, nn

import einconv_kfac
import einconv_kfac.functionals
from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors
from einconv_kfac.geometry import conv_geometry, conv_transpose_geometry, output_padding_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import (
        EKFACLinearOperator,
        KFACInverseLinearOperator,
        KFACLinearOperator,
    )

PAGE = Path(__file__).resolve().parents[2] / "docs" / "moving.md"
CALLABLE: dict[str, Any] = {
    "KFAC": KFAC,
    "KFACPreconditioner": KFACPreconditioner,
    "kronecker_factors": kronecker_factors,
}


def calls() -> Iterator[tuple[str, str]]:
    """Yield the name and the arguments of each call in a right column."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield from re.findall(r"`(\w+)\(([^`]*)\)`", line.split(" | ")[1])


def test_arguments_exist() -> None:
    found = [(name, given) for name, given in calls() if name in CALLABLE]
    assert len(found) > 15
    for name, given in found:
        known = inspect.signature(CALLABLE[name]).parameters
        for argument in re.findall(r"(\w+)=", given):
            assert argument in known, f"{name} has no argument `{argument}`"


@pytest.mark.parametrize("module", [einconv, einconv.utils, einconv.conv_index_pattern])
def test_every_public_function_of_einconv_has_a_row(module: Any) -> None:
    own = [n for n, f in inspect.getmembers(module, inspect.isfunction) if n[0] != "_"]
    defined = [n for n in own if getattr(module, n).__module__.startswith("einconv")]
    assert defined
    page = PAGE.read_text(encoding="utf-8")
    assert [n for n in defined if f"`{n}`" not in page and f".{n}" not in page] == []


CONVOLUTIONS = [(9, 3, 1, 0, 1), (9, 3, 2, 1, 2), (8, 4, 3, 2, 1), (7, 4, 1, "same", 1)]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_sizes_of_einconv(case: tuple[Any, ...]) -> None:
    i, k, s, p, d = case
    geometry = conv_geometry((i,), k, s, p, d)
    assert geometry.output_size == (einconv.utils.get_conv_output_size(i, k, s, p, d),)
    assert geometry.padding == (einconv.utils.get_conv_paddings(k, s, p, d),)
    pattern = einconv_kfac.index_pattern(i, k, s, p, d)
    assert torch.equal(pattern, einconv.conv_index_pattern.index_pattern_logical(i, k, s, p, d))


def test_parameters_are_copied_as_by_einconv() -> None:
    source, one, other = (nn.Conv2d(2, 3, 3) for _ in range(3))
    einconv.utils.sync_parameters(source, one)
    other.load_state_dict(source.state_dict())
    for left, right in zip(one.parameters(), other.parameters()):
        assert torch.equal(left, right)


def problem(reduction: str = "mean") -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.randint(4, (6,))
    return model, nn.CrossEntropyLoss(reduction=reduction), [(x, y)]


def operator(kind: Any, *problem: Any, **options: Any) -> Any:
    """Return an operator of curvlinops; its factors are computed on first use."""
    model, loss_fn, data = problem
    parameters = list(model.parameters())
    return kind(
        model, loss_fn, parameters, data, fisher_type="type-2",
        separate_weight_and_bias=False, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale_of_factors_without_gradients(reduction: str, approximation: Any) -> None:
    model, loss_fn, data = problem(reduction)
    ours = kronecker_factors(
        model, loss_fn, data, fisher="forward-only", approximation=approximation
    )
    theirs = KFACLinearOperator(
        model, loss_fn, list(model.parameters()), data, fisher_type="forward-only",
        separate_weight_and_bias=False, kfac_approx=approximation,
    )  # fmt: skip
    vector = {name: p.detach() for name, p in model.named_parameters()}
    examples = 6 if reduction == "sum" else 1
    positions = {"0": 4 if approximation == "expand" else 1, "3": 1}
    found = ours @ vector
    for (name, _), expected in zip(vector.items(), theirs @ list(vector.values())):
        scale = examples * positions[name.split(".")[0]]
        torch.testing.assert_close(found[name], scale * expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_operators_of_curvlinops(approximation: Any) -> None:
    given = problem()
    vector = [torch.randn_like(p) for p in given[0].parameters()]
    named = dict(zip(dict(given[0].named_parameters()), vector))
    ours = kronecker_factors(*given, fisher="exact", approximation=approximation)
    theirs = operator(KFACLinearOperator, *given, kfac_approx=approximation)
    pairs = [(ours @ named, theirs @ vector)]
    for exact, option in ((True, "use_exact_damping"), (False, "use_heuristic_damping")):
        inverse = KFACInverseLinearOperator(theirs, damping=0.1, **{option: True})
        pairs.append((ours.inverse(0.1, exact=exact) @ named, inverse @ vector))
    for left, right in pairs:
        for name, expected in zip(named, right):
            torch.testing.assert_close(left[name], expected)
    torch.testing.assert_close(ours.trace(), theirs.trace)
    torch.testing.assert_close(ours.frobenius_norm(), theirs.frobenius_norm)


@pytest.mark.filterwarnings("ignore")
def test_ekfac_of_curvlinops() -> None:
    given = problem()
    vector = [torch.randn_like(p) for p in given[0].parameters()]
    named = dict(zip(dict(given[0].named_parameters()), vector))
    ours = kronecker_factors(*given, fisher="exact", kind="ekfac") @ named
    theirs = operator(EKFACLinearOperator, *given) @ vector
    for name, expected in zip(named, theirs):
        torch.testing.assert_close(ours[name], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_factors_of_a_mean_over_terms(reduction: str) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 2)).double(), nn.MSELoss(reduction=reduction)
    data = [(torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double())]
    ours = kronecker_factors(model, loss_fn, data, fisher="empirical")
    theirs = KFACLinearOperator(
        model, loss_fn, list(model.parameters()), data, fisher_type="empirical",
        separate_weight_and_bias=False,
    )  # fmt: skip
    terms = 5 * 2 if reduction == "mean" else 1
    torch.testing.assert_close(terms * ours.trace(), theirs.trace)


TRANSPOSED = [(4, 3, 2, 1, 1, 1), (5, 2, 1, 0, 0, 3), (3, 4, 3, 2, 2, 2)]


@pytest.mark.parametrize("case", TRANSPOSED)
def test_sizes_of_transposed_convolutions(case: tuple[int, ...]) -> None:
    o, k, s, p, padding, d = case
    geometry = conv_transpose_geometry((o,), k, s, p, padding, d)
    x, weight = torch.zeros(1, 1, o), torch.zeros(1, 1, k)
    expected = torch.conv_transpose1d(
        x, weight, stride=s, padding=p, output_padding=padding, dilation=d
    )
    assert geometry.input_size == tuple(expected.shape[2:])


def test_output_sizes_of_unfold_transpose() -> None:
    x, k, options = torch.rand(2, 3, 5, 5), 3, {"stride": 2, "padding": 1}
    for size in ((9, 9), (10, 9)):
        found = output_padding_of(size, x.shape[2:], k, **options)
        own = einconv_kfac.functionals.unfoldNd_transpose(x, k, output_padding=found, **options)
        theirs = unfoldNd.UnfoldTransposeNd(k, **options)(x, output_size=size)
        torch.testing.assert_close(own, theirs)
