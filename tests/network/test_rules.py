"""Every rewrite rule against the network it rewrites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from cases import CONV_CASES, HIGH_CASES, ConvCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from einconv_kfac.expressions import (
    conv_transposeNd_unfold,
    convNd_forward,
    convNd_gram,
    convNd_input_vjp,
    convNd_kfac_reduce,
    convNd_kfc,
    convNd_toeplitz,
    convNd_unfold,
    convNd_weight_vjp,
)
from einconv_kfac.expressions.constants import constant_tensor
from einconv_kfac.expressions.views import stepped
from einconv_kfac.geometry import Axis, Geometry, conv_geometry
from einconv_kfac.network import (
    Delta,
    Leaf,
    Network,
    Node,
    Pattern,
    explain,
    rules,
    simplified,
)
from einconv_kfac.network.rules.indices import merge_parallel
from einconv_kfac.network.step import Drop, Merge, Split

PLACE = "einconv_kfac.expressions"


def value(network: Network) -> Tensor:
    """The value by one dense einsum, patterns and all, for tensors made up from their slots."""
    operands = []
    for node in network.nodes:
        operand = node.operand
        if isinstance(operand, Leaf):
            generator = torch.Generator().manual_seed(operand.slot)
            source = torch.randn(operand.source, generator=generator, dtype=torch.float64)
            operands.append(stepped(source, operand.steps))
        else:
            operands.append(constant_tensor(operand, torch.device("cpu"), torch.float64))
    letters = {index: j for j, index in enumerate(network.sizes)}
    arguments = []
    for node, operand in zip(network.nodes, operands):
        arguments += [operand, [letters[index] for index in node.indices]]
    output = torch.einsum(*arguments, [letters[index] for index in network.output])
    return stepped(output, network.undo).reshape(network.shape) * float(network.scale)


def forward(*sizes: int, **options: object) -> Network:
    return convNd_forward.network(conv_geometry(sizes[:1], sizes[1], **options), 2, 2, 3)


def adjoint(*sizes: int, **options: object) -> Network:
    return convNd_input_vjp.network(conv_geometry(sizes[:1], sizes[1], **options), 2, 2, 3)


def deltas(*pairs: str, leaf: str = "", output: str = "") -> Network:
    nodes = [Node(Delta(3), tuple(pair)) for pair in pairs]
    if leaf:
        nodes.append(Node(Leaf("x", 0, (3,) * len(leaf)), tuple(leaf)))
    return Network(tuple(nodes), tuple(output), (3,) * len(output))


def two_patterns(second: str, output: str) -> Network:
    """Two equal patterns that share indices, with a tensor on each of the indices."""
    pattern = Pattern(Axis(6, 2, 2, (1, 0), 2))
    names = dict.fromkeys("koi" + second)
    sizes = dict(zip("koi", pattern.shape)) | dict(zip(second, pattern.shape))
    leaves = [Node(Leaf(i, j, (sizes[i],)), (i,)) for j, i in enumerate(names)]
    nodes = (Node(pattern, tuple("koi")), Node(pattern, tuple(second)), *leaves)
    return Network(nodes, tuple(output), tuple(sizes[i] for i in output))


def two_leaves(left: str, right: str, output: str, **sizes: int) -> Network:
    nodes = [
        Node(Leaf("x", j, tuple(sizes[i] for i in names)), tuple(names))
        for j, names in enumerate((left, right))
    ]
    return Network(tuple(nodes), tuple(output), tuple(sizes[i] for i in output))


RULE_CASES: list[tuple[str, Network]] = [
    ("down_sample", forward(8, 2, stride=3)),
    ("down_sample", adjoint(8, 2, stride=3)),
    ("dense", forward(6, 2, stride=2)),
    ("dense", adjoint(6, 2, stride=2)),
    ("drop_duplicate_deltas", deltas("ab", "ba", leaf="b", output="a")),
    ("sum_lonely_deltas", deltas("ab", "cd", leaf="c", output="d")),
    ("contract_deltas", deltas("ab", leaf="b", output="a")),
    ("contract_deltas", deltas("ab", leaf="bb", output="a")),
    ("contract_deltas", deltas("aa", leaf="ab", output="b")),
    ("merge_parallel", two_leaves("abc", "cab", "c", a=2, b=3, c=4)),
    ("merge_parallel", two_leaves("abc", "c", "cab", a=2, b=3, c=4)),
    ("drop_units", two_leaves("ab", "bc", "abc", a=1, b=3, c=1)),
    ("crop", forward(9, 2, stride=3)),
    ("crop", adjoint(9, 2, stride=3)),
    ("crop", forward(8, 3, stride=2)),
    ("whole", forward(4, 4, stride=3)),
    ("whole", adjoint(4, 4)),
    ("sum_patterns", convNd_kfac_reduce.network(conv_geometry((7,), 3, padding=1), 2, 2)),
    ("unite_patterns", two_patterns("Koi", "kK")),
    ("unite_patterns", two_patterns("koI", "I")),
    ("unite_patterns", two_patterns("kOi", "")),
    ("unite_patterns", two_patterns("koi", "k")),
    ("swap", forward(8, 3, dilation=3)),
    ("swap", adjoint(8, 3, dilation=3)),
    ("trim_kernel", forward(1, 3, padding=1)),
    ("trim_kernel", convNd_weight_vjp.network(conv_geometry((2,), 5, padding=2), 2, 2, 3)),
    ("trim_kernel", convNd_unfold.network(conv_geometry((1,), 3, padding=1), 2, 2)),
    ("trim_output", forward(3, 1, padding=2)),
    ("trim_output", adjoint(3, 1, padding=2)),
]


@pytest.mark.parametrize(("name", "network"), RULE_CASES, ids=lambda p: p if type(p) is str else "")
def test_rule_keeps_the_value(name: str, network: Network) -> None:
    rule = next(rule for rule in rules.RULES if rule.__name__ == name)
    rewritten = rule(network)
    if rewritten is None:  # another rule has to come first
        assert name in simplified(network).fired
    else:
        torch.testing.assert_close(value(rewritten), value(network))
        assert rewritten.shape == network.shape
    torch.testing.assert_close(value(simplified(network)), value(network))


def test_every_rule_is_tested() -> None:
    assert {rule.__name__ for rule in rules.RULES} == {name for name, _ in RULE_CASES}


def operations(case: ConvCase) -> list[Network]:
    """The network of every operation on a case."""
    geometry, n, ci, co = case.geometry, case.batch, case.in_channels, case.out_channels
    sizes = {
        (n, ci, co): [
            "convNd_forward",
            "convNd_input_vjp",
            "convNd_weight_vjp",
            "convNd_per_example_weight_vjp",
            "convNd_gradient_norm",
        ],
        (n, ci): ["convNd_unfold", "convNd_fold", "convNd_kfc", "convNd_kfac_reduce"],
        (n, co): [f"conv_transposeNd_{name}" for name in ("unfold", "kfc", "kfac_reduce")],
        (2, n, ci, co): ["convNd_ggn_diagonal", "convNd_gram"],
        (ci, co): ["convNd_toeplitz"],
    }
    modules = [(import_module(f"{PLACE}.{name}"), key) for key in sizes for name in sizes[key]]
    return [module.network(geometry, *key) for module, key in modules]


def test_every_rule_fires() -> None:
    networks = [network for case in CONV_CASES + HIGH_CASES for network in operations(case)]
    fired = {name for network in networks for name in simplified(network).fired}
    names = {rule.__name__ for rule in rules.RULES}
    made_up = {"drop_duplicate_deltas", "unite_patterns"}  # of equations that are no operation
    assert names - fired == made_up
    others = {name for _, network in RULE_CASES for name in simplified(network).fired}
    assert made_up <= others


def test_halves_are_computed_once() -> None:
    network = convNd_gram.network(conv_geometry((6, 5), 2), 2, 3, 2, 4)
    explanation = explain(network)
    assert len(explanation.contractions) == 2  # of three, two are the same


def test_delta_between_outputs_stays() -> None:
    network = convNd_toeplitz.network(conv_geometry((6,), 2, stride=2), 2, 3)
    simple = simplified(network)
    assert [type(n.operand) for n in simple.nodes] == [Delta, Leaf]
    torch.testing.assert_close(value(simple), value(network))


def test_split_undoes_merge() -> None:
    leaf = Leaf("x", 0, (2, 3, 4)).then(Merge(1), Split(1, (3, 4)), Drop(0))
    assert leaf.steps == (Drop(0),)


def test_merging_needs_the_same_order_everywhere() -> None:
    assert merge_parallel(two_leaves("ab", "ba", "", a=2, b=3)) is None


@st.composite
def axes(draw: Callable[[st.SearchStrategy[int]], int]) -> Axis:
    """An axis of a convolution with any hyper-parameters."""
    kernel, stride, dilation = (draw(st.integers(1, 4)) for _ in range(3))
    left, right = (draw(st.integers(0, 4)) for _ in range(2))
    span = (kernel - 1) * dilation + 1
    size = draw(st.integers(max(1, span - left - right), span + 6))
    return Axis(size, kernel, stride, (left, right), dilation)


geometries = st.builds(
    lambda drawn, groups: Geometry(tuple(drawn), groups),
    st.lists(axes(), min_size=1, max_size=2),
    st.integers(1, 2),
)


@settings(derandomize=True, database=None, max_examples=60, deadline=None)
@given(geometries, st.booleans())
def test_simplification_keeps_the_value(geometry: Geometry, reshape_only: bool) -> None:
    groups = geometry.groups
    networks = [
        *(m.network(geometry, 2, 2 * groups, groups) for m in (convNd_forward, convNd_input_vjp)),
        convNd_weight_vjp.network(geometry, 2, groups, 2 * groups),
        *(m.network(geometry, 2, groups) for m in (convNd_unfold, conv_transposeNd_unfold)),
        *(m.network(geometry, 2, groups) for m in (convNd_kfc, convNd_kfac_reduce)),
        convNd_toeplitz.network(geometry, groups, 2 * groups),
    ]
    for network in networks:
        plain = replace(network, reshape_only=reshape_only)
        simple = simplified(plain)
        torch.testing.assert_close(value(simple), value(network))
        if reshape_only:
            assert not simple.finishing()
