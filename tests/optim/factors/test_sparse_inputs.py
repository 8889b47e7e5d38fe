"""Layers whose inputs are sparse tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Generator, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature import kronecker_factors

X = torch.randn(24, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(3, (24,), generator=Generator().manual_seed(1))
FIXED: dict[str, Any] = {"adaptive": False, "lr": 0.1}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("options", [{}, FIXED])
def test_sparse_inputs_are_refused_with_a_remedy(
    options: dict[str, Any], layout: torch.layout
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss_fn = nn.CrossEntropyLoss()
    opt, before = KFAC(model, loss_fn, **options), weights(model)
    sparse = X.relu().to_sparse() if layout == torch.sparse_coo else X.relu().to_sparse_csr()
    words = r"input of '0' \(Linear\) must be dense, got a sparse tensor .*`x\.to_dense\(\)`"
    with pytest.raises(ValueError, match=words):
        loss_fn(model(sparse), Y).backward()
    with pytest.raises(ValueError, match=words):
        kronecker_factors(model, loss_fn, [(sparse, Y)])
    opt.zero_grad()
    loss_fn(model(sparse.to_dense()), Y).backward()
    opt.step()
    assert not torch.equal(weights(model), before)
