"""Parameters without Kronecker factors: the reasons, and the warning about many of them."""

from __future__ import annotations

import warnings

import pytest
from torch import Tensor, nn

from einconv_kfac.optim import KFAC


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


LOSS = nn.MSELoss()


def test_reasons_are_printed() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.PReLU(), Own(2, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    coverage = KFAC(model, LOSS).coverage()
    assert coverage["1.weight"] == "adam"
    assert coverage.reasons.keys() == {"1.weight", "2.weight", "2.bias"}
    shown = str(coverage).splitlines()
    assert shown[0].split() == ["parameter", "trained", "by"]
    assert shown[3].split(maxsplit=1) == [
        "1.weight",
        "adam: no rule covers PReLU; `register_layer` adds one",
    ]
    assert shown[4].startswith("2.weight")
    assert "forward pass of its own" in shown[4]
    assert shown[6].split() == ["3.weight", "frozen"]


@pytest.mark.parametrize("fallback", ["adam", "gradient"])
def test_warning_counts_and_names_types(fallback: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Own(9, 9), nn.PReLU(5))
    with pytest.warns(UserWarning, match=r"cover 6 of 101 .*Own \(90\), PReLU \(5\)") as found:
        KFAC(model, LOSS, fallback=fallback)
    assert fallback in str(found[0].message)
    assert len(found) == 1
    assert found[0].filename == __file__


def test_no_warning_where_most_is_covered_or_left_out() -> None:
    models = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.Linear(2, 2)),
        nn.TransformerEncoderLayer(4, 2, 8),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in models:
            KFAC(model, LOSS)
        left_out = KFAC(nn.Sequential(nn.Linear(9, 9), nn.Linear(2, 2)), LOSS, exclude="0")
    assert "`exclude`" in left_out.coverage().reasons["0.weight"]


def test_frozen_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Own(9, 9))
    model[1].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFAC(model, LOSS)
