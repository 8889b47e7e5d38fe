"""The comparison with the exact GGN, on small models and on real ones from other libraries."""

from __future__ import annotations

import pytest
import torch
from ggn import dense_ggn
from real_models import MODELS, random
from torch import Tensor, nn

from einconv_kfac.curvature import coverage, kronecker_factors, verify


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_numbers_are_those_of_dense_matrices(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.PReLU()
    ).double()
    x, y, loss_fn = random(4, 2, 3, 3), torch.tensor([0, 1, 2, 1]), nn.CrossEntropyLoss()
    found = verify(model, loss_fn, (x, y), kind=kind)
    factors = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact", kind=kind)
    for row in found.layers:
        exact = dense_ggn(model, loss_fn, x, y, row.layer)
        ours = factors[row.layer].to_dense()
        assert row.relative_error == pytest.approx(float((ours - exact).norm() / exact.norm()))
        assert row.cosine == pytest.approx(float((ours * exact).sum() / ours.norm() / exact.norm()))
        trace = exact.diagonal(dim1=-2, dim2=-1).sum() / ours.diagonal(dim1=-2, dim2=-1).sum()
        assert row.trace_ratio == pytest.approx(float(1 / trace))
    assert found.loss_scale == pytest.approx(1)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "relative", "error", "cosine", "trace", "ratio"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "3"]
    assert "4.weight   PReLU  -      no rule covers PReLU" in lines[-1]


def test_a_loss_without_curvature_has_exact_blocks_of_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2)).double()
    x, y, loss_fn = random(3, 2, 4), random(3, 2) + 10, nn.HuberLoss()  # linear, far from targets
    assert not dense_ggn(model, loss_fn, x, y, "0").any()
    found = verify(model, loss_fn, (x, y))
    for row in found.layers:
        assert (row.relative_error, row.cosine, row.trace_ratio) == (0, 1, 1)
    assert found.loss_scale != found.loss_scale


def test_a_wrong_loss_rule_shows() -> None:
    class Doubled(nn.MSELoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(output, target) + output.square().mean() * target.mean()

    model, x = nn.Linear(3, 2).double(), random(4, 3)
    y = random(4, 2)
    assert verify(model, Doubled(), (x, y)).loss_scale == pytest.approx(1)  # by autograd
    weights = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))

    class Halved(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return super().forward(output, target) / 2

    labels = torch.tensor([0, 1, 1, 0])
    assert verify(model, weights, (x, labels)).loss_scale == pytest.approx(1)
    assert verify(model, Halved(), (x, labels)).loss_scale == pytest.approx(2)


LIKELIHOODS: list[tuple[nn.Module, nn.Module, Tensor]] = [
    (nn.LogSoftmax(1), nn.NLLLoss(ignore_index=1), torch.tensor([0, 1, 2, 2])),
    (nn.LogSoftmax(1), nn.KLDivLoss(reduction="batchmean"), random(4, 3).softmax(1)),
    (nn.Sigmoid(), nn.BCELoss(reduction="sum"), random(4, 3).sigmoid()),
    (nn.Identity(), nn.HuberLoss(delta=0.7), random(4, 3)),
    (nn.Identity(), nn.SmoothL1Loss(beta=2.0), random(4, 3)),
    (nn.Identity(), nn.SoftMarginLoss(), random(4, 3).sign()),
    (nn.Identity(), nn.MultiLabelSoftMarginLoss(), random(4, 3).sigmoid()),
]


@pytest.mark.parametrize("case", LIKELIHOODS, ids=lambda case: type(case[1]).__name__)
def test_scale_of_likelihoods(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    link, loss_fn, target = case
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), link).double()
    found = verify(model, loss_fn, (random(4, 3), target), kind="diagonal")
    assert found.loss_scale == pytest.approx(1)
    assert found.layers[0].trace_ratio == pytest.approx(1)


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    torch.manual_seed(0)
    model, x, gaps = MODELS[name]()
    model = model.double().eval()
    y = torch.zeros_like(model(x)).argmax(1)
    found = verify(model, nn.CrossEntropyLoss(), (x, y), kind="ekfac")
    assert {row.parameter for row in found.gaps} == gaps
    assert found.loss_scale == pytest.approx(1)
    for row in found.layers:  # corrected eigenvalues keep the trace where nothing is left out
        if "norm" not in row.layer and "bn" not in row.layer:
            assert row.trace_ratio == pytest.approx(1, rel=1e-6), row
    assert len(coverage(model)) == len(list(model.parameters()))
