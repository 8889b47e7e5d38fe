"""Bad input to the expressions: the argument, the rule and the value are named."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from einconv_kfac import index_pattern, simplify
from einconv_kfac.network import Leaf, Network, Node
from einconv_kfac.network.equation import equation, parse_equation

X, W, V = torch.rand(2, 4, 8), torch.rand(6, 2, 3), torch.rand(2, 6, 6)
S = V[None]
ROWS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("convNd_forward", (X, W), {}, "`weight` must have shape"),
    ("convNd_forward", (X[0], W), {}, r"`x` must have shape .* got \[4, 8\]"),
    ("convNd_input_jvp", (W, X), {}, "`weight` must have shape"),
    ("convNd_weight_jvp", (X, W), {}, "`weight` must have shape"),
    ("convNd_unfold", (X, 9), {}, "`kernel_size` must fit"),
    ("convNd_unfold", (X, 0), {}, "`kernel_size` must be at least 1, got 0"),
    ("convNd_fold", (X, 8, 3), {}, r"`z` must have shape \[batch, channels \* 3, 6\]"),
    ("convNd_toeplitz", (W, 2), {"groups": 2}, "`kernel_size` must fit"),
    ("convNd_toeplitz", (W, 8), {"groups": 4}, "divisible by groups=4, got 6"),
    ("convNd_toeplitz", (W[0], 8), {}, "`weight` must have shape"),
    ("convNd_input_vjp", (W, V, 9), {"groups": 2}, r"shape of the output, \[batch, channels, 7\]"),
    ("convNd_input_vjp", (W, V[:, :4], 8), {"groups": 2}, "`v` must have the 6 channels"),
    ("convNd_input_vjp", (W, V, (8, 8)), {"groups": 2}, "`input_size` must have one entry"),
    ("convNd_weight_vjp", (X, V, 4), {"groups": 2}, "shape of the output"),
    ("convNd_weight_vjp", (X, V[:1], 3), {"groups": 2}, r"\[2, channels, 6\], got \[1, 6, 6\]"),
    ("convNd_weight_vjp", (X, V, 3), {"groups": 4}, "divisible by groups=4, got 6"),
    ("convNd_per_example_weight_vjp", (X, V[:, 0], 3), {}, "shape of the output"),
    ("convNd_gradient_norm", (X, V, 2), {}, "shape of the output"),
    ("convNd_ggn_diagonal", (X, V, 3), {}, "`s` must have the shape of the output"),
    ("convNd_gram", (X, S[..., :3], 3), {}, "`s` must have the shape of the output"),
    ("convNd_kfc", (X, 3), {"groups": 3}, "divisible by groups=3, got 4"),
    ("convNd_kfc", (X, 3), {"stride": 2, "padding": "same"}, "'same' must come with stride 1"),
    ("convNd_kfac_reduce", (X, 3), {"padding": -1}, "`padding` must be at least 0"),
    ("conv_transposeNd_forward", (X, W), {}, "`weight` must have shape"),
    ("conv_transposeNd_input_vjp", (W, X), {}, "`weight` must have shape"),
    ("conv_transposeNd_weight_vjp", (V, X, 4), {}, "`x` must have the shape of the output"),
    ("conv_transposeNd_unfold", (X, 3), {"output_padding": 1}, "`output_padding` must be smaller"),
    ("conv_transposeNd_kfc", (X, 3), {"groups": 3}, "divisible by groups=3, got 4"),
    ("conv_transposeNd_kfac_reduce", (X, 3, 2), {"output_size": 20}, "`output_size` must be"),
]


@pytest.mark.parametrize(("operation", "arguments", "options", "message"), ROWS)
def test_bad_input_is_named(
    operation: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    with pytest.raises(ValueError, match=message):
        module.einsum_expression(*arguments, **options)


@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("operation", ["convNd_kfc", "convNd_kfac_reduce"])
def test_means_of_integers_are_refused(operation: str, simplified: bool) -> None:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    x = torch.arange(24).reshape(2, 2, 6)
    with pytest.raises(ValueError, match=r"`x` must be of floating-point .* 1/2, got torch.int64"):
        module.einsum_expression(x, 6, simplify=simplified)
    equation, operands, shape = module.einsum_expression(x[:1], 6, simplify=simplified)
    found = torch.einsum(equation, *operands).reshape(shape)
    assert torch.equal(found[0], torch.outer(x[0].flatten(), x[0].flatten()))


def test_bad_patterns_equations_and_networks_are_named() -> None:
    with pytest.raises(ValueError, match="`kernel_size` must fit"):
        index_pattern(3, 4)
    with pytest.raises(ValueError, match=r"`operands` must be the 2 tensors .* got 1"):
        simplify("ab,bc->ac", [X])
    with pytest.raises(
        ValueError, match=r"`operands\[1\]` must have the 2 dimensions .* \[6, 2, 3\]"
    ):
        simplify("abc,bc->ac", [X, W])
    with pytest.raises(ValueError, match="`equation` must be like"):
        parse_equation("ab,bc")
    with pytest.raises(ValueError, match="must have at most 52 indices, got 53"):
        equation([[str(j) for j in range(53)]], [])
    with pytest.raises(ValueError, match=r"`indices` must name the 2 dimensions of x"):
        Node(Leaf("x", 0, (2, 3)), ("a",))
    node = Node(Leaf("x", 0, (2, 3)), ("a", "b"))
    with pytest.raises(ValueError, match="`output` must use indices of the operands"):
        Network((node,), ("c",), (2,))
    with pytest.raises(ValueError, match="index 'a' must have one size, got 2 and 3"):
        Network((node, Node(Leaf("y", 1, (3,)), ("a",))), ("a",), (2,))
