"""The reasons why parameters are not covered."""

from __future__ import annotations

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
            "gru": nn.GRU(2, 2),
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
    assert "no rule covers GRU" in reasons["gru.weight_ih_l0"]
    assert len(coverage(model).gaps()) == len(reasons) - 2


def test_rows_are_those_of_the_models_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.LayerNorm(3))
    found = coverage(model)
    assert [row.parameter for row in found] == [name for name, _ in model.named_parameters()]
    assert [row.layer for row in found] == ["0", "0", None, "2", "2"]
    assert [row.kind for row in found.gaps()] == ["PReLU"]
    assert str(found.gaps()).splitlines()[1].split()[:3] == ["1.weight", "PReLU", "-"]
