"""The reasons why parameters are not covered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from einconv_kfac.curvature import coverage


def test_coverage_of_odd_models() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Renamed(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(2, 2),
            "renamed": Renamed(2, 2),
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "frozen": nn.Linear(2, 2),
            "embedding": nn.Embedding(9000, 2, max_norm=1.0),
            "bilinear": nn.Bilinear(2, 2, 2),
        }
    )
    model["frozen"].weight.requires_grad_(False)
    reasons = {row.parameter: row.reason for row in coverage(model)}
    assert reasons["renamed.weight"] == ""
    assert "Own has a forward pass of its own" in reasons["own.weight"]
    assert "parametrized" in reasons["norm.parametrizations.weight.original0"]
    assert reasons["frozen.weight"] == "it is frozen"
    assert reasons["frozen.bias"] == "its weight is frozen"
    assert "max_norm changes the weight" in reasons["embedding.weight"]
    assert "no rule covers Bilinear" in reasons["bilinear.weight"]
    assert len(coverage(model).gaps()) == len(reasons) - 2


def test_rows_are_those_of_the_models_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.LayerNorm(3))
    found = coverage(model)
    assert [row.parameter for row in found] == [name for name, _ in model.named_parameters()]
    assert [row.layer for row in found] == ["0", "0", None, "2", "2"]
    assert [row.kind for row in found.gaps()] == ["PReLU"]
    assert str(found.gaps()).splitlines()[1].split()[:3] == ["1.weight", "PReLU", "-"]


class Scaled(nn.Module):
    """A layer whose name appears in the names of torch's parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.parametrizations = nn.Linear(2, 2)
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))


def test_every_parameter_has_a_reason() -> None:
    """Nothing raises, also where `find_layers` does."""
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3)
    attention.k_proj_weight.requires_grad_(False)
    model = nn.ModuleDict(
        {
            "lazy": nn.LazyLinear(2),
            "replaced": replaced,
            "scaled": Scaled(),
            "attention": attention,
            "bilinear": nn.Bilinear(2, 2, 2),
            "list": nn.ParameterList([torch.ones(2)]),
        }
    )
    reasons = {row.parameter: row.reason for row in coverage(model).gaps()}
    assert "not initialized" in reasons["lazy.weight"]
    assert reasons["replaced.weight"] == "its forward pass was replaced"
    assert "scaled.parametrizations.weight" not in reasons
    assert "parametrized" in reasons["scaled.norm.parametrizations.weight.original"]
    assert reasons["attention.bias_k"] == "the rule of MultiheadAttention leaves it out"
    assert reasons["attention.k_proj_weight"] == "it is frozen"
    assert "attention.q_proj_weight" not in reasons
    assert "no rule covers Bilinear" in reasons["bilinear.weight"]
    assert "no rule covers ParameterList" in reasons["list.0"]
    assert all(reasons.values())
    assert str(coverage(model))
