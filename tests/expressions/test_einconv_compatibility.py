"""Code written for einconv runs with the import replaced, with equal results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import einconv
import pytest
import torch
from einconv.conv_index_pattern import index_pattern_logical

import einconv_kfac
from einconv_kfac import index_pattern, simplify
from einconv_kfac.expressions import convNd_kfac_reduce, convNd_kfc

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own

SNIPPETS = [
    """
from PACKAGE import index_pattern
result = index_pattern(8, 3, stride=2, padding=1, dilation=2).double()
""",
    """
from PACKAGE import index_pattern
result = index_pattern(8, 4, padding="same", dtype=torch.float64)
""",
    """
from PACKAGE import index_pattern, simplify
pattern = index_pattern(8, 2, stride=2, dtype=torch.float64)
other = index_pattern(9, 2, stride=3, device=torch.device("cpu"), dtype=torch.float64)
equation, operands = simplify("nab,koa,mpb->nkomp", [x[:, :8, :9], pattern, other])
result = torch.einsum(equation, *operands).reshape(4, 2, 4, 2, 3)
""",
    """
from PACKAGE.functionals import convNd
result = convNd(x[:, None], w, b, stride=(2, 1), padding=1, dilation=1, simplify=SIMPLIFY)
""",
    """
from PACKAGE.functionals import unfoldNd
result = unfoldNd(x[:, None], (3, 2), dilation=2, padding=1, stride=2, simplify=SIMPLIFY)
""",
    """
from PACKAGE.modules import ConvNd
layer = ConvNd(2, 1, 3, 3, padding="same", dtype=torch.float64, simplify=SIMPLIFY)
result = layer(x[:, None])
""",
    """
from PACKAGE.modules import ConvNd
source = torch.nn.Conv2d(1, 3, 3, stride=2, dtype=torch.float64)
result = ConvNd.from_nn_Conv(source, simplify=SIMPLIFY)(x[:, None])
""",
    """
from PACKAGE.modules import UnfoldNd
result = UnfoldNd(3, dilation=1, padding=1, stride=2, simplify=SIMPLIFY)(x[:, None])
""",
    *(
        f"""
from PACKAGE.expressions import {name}
equation, operands, shape = {name}.einsum_expression({arguments}, simplify=SIMPLIFY)
result = torch.einsum(equation, *operands).reshape(shape)
"""
        for name, arguments in {
            "convNd_forward": "x[:, None], w, stride=2, padding=1",
            "convNd_input_vjp": "w, v, (10, 9), padding=1",
            "convNd_weight_vjp": "x[:, None], v, (3, 3), padding=1",
            "convNd_unfold": "x[:, None], 2, stride=2",
            "convNd_kfc": "x[:, None], 3, padding=1",
            "convNd_kfac_reduce": "x[:, None], 2, stride=2",
        }.items()
    ),
]


@pytest.mark.parametrize("snippet", SNIPPETS)
@pytest.mark.parametrize("simplified", [True, False])
def test_snippet_gives_the_same(snippet: str, simplified: bool) -> None:
    results = []
    for package in ("einconv", "einconv_kfac"):
        torch.manual_seed(0)
        names: dict[str, Any] = {
            "torch": torch,
            "SIMPLIFY": simplified,
            "x": torch.randn(4, 10, 9, dtype=torch.float64),
            "w": torch.randn(3, 1, 3, 3, dtype=torch.float64),
            "b": torch.randn(3, dtype=torch.float64),
            "v": torch.randn(4, 3, 10, 9, dtype=torch.float64),
        }
        exec(snippet.replace("PACKAGE", package), names)
        results.append(names["result"])
    torch.testing.assert_close(results[1], results[0])


def public_names() -> Iterator[tuple[str, str]]:
    """Every public name of einconv, with the module from which it is imported."""
    for name in ["einconv", *(m.name for m in walk_packages(einconv.__path__, "einconv."))]:
        module = import_module(name)
        yield from ((name, public) for public in getattr(module, "__all__", ()))
        if hasattr(module, "einsum_expression"):
            place, _, last = name.rpartition(".")
            yield place, last


def test_snippets_use_every_public_name() -> None:
    imports = re.findall(r"^from PACKAGE(\S*) import (.+)$", "\n".join(SNIPPETS), re.MULTILINE)
    used = {(f"einconv{place}", name) for place, names in imports for name in names.split(", ")}
    assert used == set(public_names())
    assert len(used) == 12


@pytest.mark.parametrize(("place", "name"), list(public_names()))
def test_public_names_take_the_same_arguments(place: str, name: str) -> None:
    signatures = []
    for module in (import_module(place), import_module(place.replace("einconv", "einconv_kfac"))):
        found = import_module(f"{module.__name__}.{name}") if "expressions" in place else module
        function = getattr(found, "einsum_expression" if "expressions" in place else name)
        parameters = inspect.signature(function).parameters.values()
        signatures.append([(p.name, p.kind, p.default) for p in parameters])
    assert signatures[0] == signatures[1]
    assert einconv.index_pattern is not einconv_kfac.index_pattern


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize(("size", "kernel", "dilation"), [(7, 1, 1), (8, 4, 1), (9, 3, 2)])
@pytest.mark.parametrize("stride", [1, 3])
def test_index_pattern(
    size: int, kernel: int, dilation: int, stride: int, padding: int | str
) -> None:
    if padding == "same" and stride > 1:
        return
    arguments = (size, kernel, stride, padding, dilation)
    assert torch.equal(index_pattern(*arguments), index_pattern_logical(*arguments))


# What is known to fail in einconv 0.1.0


def test_dense_reduce_in_three_dimensions_has_letters_enough() -> None:
    x = torch.randn(2, 3, 4, 6, 2, dtype=torch.float64)
    theirs = import_module("einconv.expressions.convNd_kfac_reduce")
    with pytest.raises(ValueError, match="Ran out of letters"):
        theirs.einsum_expression(x, (2, 3, 1), stride=(2, 3, 1))
    equation, operands, shape = convNd_kfac_reduce.einsum_expression(x, (2, 3, 1), (2, 3, 1))
    blocks = x.reshape(2, 3, 2, 2, 2, 3, 2, 1).mean((2, 4, 6)).flatten(1)
    expected = (blocks.T @ blocks / 2)[None]
    torch.testing.assert_close(torch.einsum(equation, *operands).reshape(shape), expected)


def test_types_survive_simplification() -> None:
    x = torch.ones(1, dtype=torch.float64)
    pattern = index_pattern(4, 2, stride=2, dtype=torch.float64)
    equation, operands = simplify("a,koi->a", [x, pattern])  # deltas contracted with nothing
    result = torch.einsum(equation, *operands)
    assert result.dtype == torch.float64
    assert result.item() == 4
    for module in (convNd_kfc, convNd_kfac_reduce):
        equation, operands, _ = module.einsum_expression(torch.ones(3, 1, 7).double(), 1)
        expected = torch.full((1,), 7.0 if module is convNd_kfc else 1.0).double()
        torch.testing.assert_close(
            torch.einsum(equation, *operands).reshape(1), expected, rtol=1e-15, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
@pytest.mark.parametrize("equation", ["koi->", "koi->ki", "koi,kab->ai"])
def test_patterns_alone_leave_an_operand(equation: str, dtype: torch.dtype) -> None:
    patterns = [index_pattern(1, 1, padding=1, dtype=dtype)]  # a row of 0, 1, 0
    patterns += [index_pattern(1, 1, dtype=dtype)] * equation.count(",")
    expected = torch.einsum(equation, *patterns)
    found, operands = simplify(equation, patterns)
    assert operands
    torch.testing.assert_close(torch.einsum(found, *operands).reshape(expected.shape), expected)


@pytest.mark.parametrize("copied", [torch.clone, lambda p: p.to(torch.float64), lambda p: p * 1])
def test_copies_of_patterns_are_recognized(copied: Any) -> None:
    pattern = copied(index_pattern(8, 2, stride=2, dtype=torch.float32))
    x = torch.randn(3, 8, dtype=pattern.dtype)
    equation, operands = simplify("ni,koi->nko", [x, pattern])
    assert len(operands) == 1
    result = torch.einsum(equation, *operands).reshape(3, 2, 4)
    torch.testing.assert_close(result, x.reshape(3, 4, 2).transpose(1, 2))


def test_pointwise_stride_on_odd_sizes_needs_no_pattern() -> None:
    x, weight = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 1, 1)
    module = import_module("einconv_kfac.expressions.convNd_forward")
    assert len(module.einsum_expression(x, weight, stride=2)[1]) == 2


def test_lookalikes_are_no_patterns() -> None:
    torch.manual_seed(0)
    for tensor in (torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.randn(2, 3, 4), torch.eye(3)):
        indices = "koi"[: tensor.ndim]
        equation, operands = simplify(f"{indices}->{indices}", [tensor])
        assert len(operands) == 1
        torch.testing.assert_close(torch.einsum(equation, *operands).reshape(tensor.shape), tensor)
