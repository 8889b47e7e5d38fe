"""Layers of other libraries, found by name, and bags of embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from einconv_kfac.curvature import coverage, find_layers, kronecker_factors
from einconv_kfac.curvature.layers.layer_registry import layer_rule

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def named(base: type[nn.Module], name: str) -> type[Any]:
    """A subclass that looks like the class of a library."""
    module, _, kind = name.rpartition(".")
    return type(kind, (base,), {"__module__": module, "__qualname__": kind})


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_transposed_weight_of_transformers() -> None:
    """The block is the GGN, as for any linear layer."""
    model = named(Transposed, "transformers.pytorch_utils.Conv1D")().double()
    x, y = random(5, 4), torch.zeros(5, 3, dtype=torch.float64)
    own = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, x).flatten())(own)
    jacobian = torch.cat([rows["weight"].mT, rows["bias"][..., None]], -1).flatten(1)
    loss_fn = nn.MSELoss(reduction="sum")
    (dense,) = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact")[""].to_dense()
    torch.testing.assert_close(dense, 2 * jacobian.T @ jacobian, **TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "timm.layers.std_conv.StdConv2d",
        "timm.layers.std_conv.StdConv2dSame",
        "timm.layers.std_conv.ScaledStdConv2d",
        "timm.layers.std_conv.ScaledStdConv2dSame",
    ],
)
def test_standardized_weights_have_no_block(name: str) -> None:
    model = named(nn.Conv2d, name)(2, 3, 3)
    assert not find_layers(model, every=True)
    assert all("standardized" in row.reason for row in coverage(model))


def test_subclasses_count_and_other_names_do_not() -> None:
    kind = named(Transposed, "transformers.pytorch_utils.Conv1D")
    assert layer_rule(named(kind, "mine.Special")()) is layer_rule(kind())
    assert layer_rule(named(Transposed, "mine.Conv1D")()) is None


OPTIONS = [
    {},
    {"mode": "sum"},
    {"mode": "sum", "padding_idx": 2},
    {"mode": "mean", "padding_idx": 2},
    {"mode": "sum", "include_last_offset": True},
]


@pytest.mark.parametrize("by_offset", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bags(options: dict[str, Any], weighted: bool, by_offset: bool) -> None:
    """The diagonal is that of the GGN; bags may be empty, and have entries twice."""
    if weighted and options.get("mode") != "sum":
        pytest.skip("torch has weights only for sums")
    if options.get("include_last_offset") and not by_offset:
        pytest.skip("torch has it only with offsets")
    model = nn.EmbeddingBag(6, 3, **options).double()
    entries = torch.tensor([[0, 1, 1, 2], [3, 2, 0, 4], [5, 5, 5, 1]])
    keywords: dict[str, Tensor] = {}
    if by_offset:
        ends = [12] * options.get("include_last_offset", 0)
        keywords, entries = {"offsets": torch.tensor([0, 3, 3, 7, *ends])}, entries.flatten()
    if weighted:
        keywords["per_sample_weights"] = random(*entries.shape)

    def output(weight: Tensor) -> Tensor:
        result: Tensor = functional_call(model, {"weight": weight}, (entries,), keywords)
        return result

    weight = model.weight.detach()
    target = torch.zeros_like(output(weight))
    rows = jacrev(lambda own: output(own).flatten(), chunk_size=1)(weight)
    blocks = kronecker_factors(
        model,
        nn.MSELoss(reduction="sum"),
        [((entries, keywords), target)],
        forward=lambda own, batch: (own(batch[0][0], **batch[0][1]), batch[1]),
        kind="diagonal",
        fisher="exact",
    )
    (layer,) = find_layers(model)
    found = layer.from_matrix(blocks[""].values)["weight"]
    torch.testing.assert_close(found, 2 * rows.square().sum(0), **TOLERANCE)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"max_norm": 1.0}], ids=str)
def test_bags_without_a_block(options: dict[str, Any]) -> None:
    model = nn.EmbeddingBag(6, 3, **options)
    assert not find_layers(model)
    (name,) = options
    assert name in coverage(model)[0].reason
