"""Curvature averaged over the data of several workers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from optim_cases import conv_net, image_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import kronecker_factors

BATCHES = 7
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"mc_samples": 2},
    "exact, reduce": {"fisher": "exact", "approximation": "reduce"},
    "empirical": {"fisher": "empirical", "max_factor_size": 20},
    "diagonal": {"fisher": "exact", "kind": "diagonal"},
    "ekfac": {"fisher": "exact", "kind": "ekfac"},
}


def factors(rank: int, size: int) -> dict[str, Tensor]:
    """The blocks of each kind as one vector; of ``size`` workers, each has its share of batches."""
    warnings.simplefilter("ignore")
    found = {}
    for name, options in KINDS.items():
        model: Any = conv_net() if size == 1 else DistributedDataParallel(conv_net())
        data = [image_batch(20 + number, number) for number in range(rank, BATCHES, size)]
        blocks = kronecker_factors(model, nn.CrossEntropyLoss(reduction="sum"), data, **options)
        found[name] = torch.cat([blocks[layer].to_dense().flatten() for layer in blocks])
    found["unused"] = branches(rank, size)
    return found


class Branches(nn.Module):
    """An expert for batches whose first entries are positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.expert = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.shared(x)
        return result + self.expert(x) if x[0, 0] > 0 else result


def branches(rank: int, size: int) -> Tensor:
    """The diagonals of a model with a layer that one batch alone uses."""
    torch.manual_seed(1)
    inputs = [torch.randn(3 + number, 3).double().abs() for number in range(BATCHES)]
    data = [(x if number == 1 else -x, torch.arange(len(x)) % 2) for number, x in enumerate(inputs)]
    model: Any = Branches() if size == 1 else DistributedDataParallel(Branches())
    found = kronecker_factors(
        model, nn.CrossEntropyLoss(), data[rank::size], fisher="exact", kind="diagonal"
    )
    return torch.cat([found[layer].values.flatten() for layer in found])
