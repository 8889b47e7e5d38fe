"""The extension of BackPACK for channel groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.interop.backpack import with_groups

CONVOLUTIONS = [
    (lambda g: nn.Conv1d(4, 2, 3, 2, 1, 2, g), (5, 4, 9)),
    (lambda g: nn.Conv2d(4, 4, (2, 3), padding=(1, 0), groups=g), (5, 4, 4, 5)),
    (lambda g: nn.Conv3d(4, 2, 2, groups=g), (5, 4, 3, 3, 2)),
    (lambda g: nn.ConvTranspose1d(4, 2, 3, 2, groups=g), (5, 4, 3)),
    (lambda g: nn.ConvTranspose2d(4, 4, 2, 2, 1, groups=g), (5, 4, 3, 3)),
    (lambda g: nn.ConvTranspose3d(4, 2, 2, groups=g), (5, 4, 2, 2, 2)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_backpack(case: int, groups: int) -> None:
    backpack = pytest.importorskip("backpack")
    build, shape = CONVOLUTIONS[case]
    torch.manual_seed(0)
    conv = build(groups)
    features = conv(torch.zeros(shape)).flatten(1).shape[1]
    model = nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(features, 3)).double()
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(3, (shape[0],))
    factors = kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y)], fisher="exact")
    reduced = kronecker_factors(
        model, nn.CrossEntropyLoss(), [(x, y)], fisher="exact", approximation="reduce"
    )
    backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())(model(x), y)
    with backpack.backpack(with_groups(backpack.extensions.KFLR())):
        loss.backward()
    b, a = model[0].weight.kflr
    assert b.ndim == (2 if groups == 1 else 3)
    torch.testing.assert_close(a.reshape(groups, *a.shape[-2:]), factors["0"].A[:, :-1, :-1])
    torch.testing.assert_close(b.reshape(groups, *b.shape[-2:]), reduced["0"].B)


def test_backpack_refuses_other_extensions() -> None:
    extensions = pytest.importorskip("backpack.extensions")
    with pytest.raises(ValueError, match="must be BackPACK's KFAC or KFLR, got KFRA"):
        with_groups(extensions.KFRA())
