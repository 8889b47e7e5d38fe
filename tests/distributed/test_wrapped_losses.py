"""Losses that a wrapped model returns, as the script observes them, beside the bare model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, distributed, nn
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC

WRAPPERS: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class WithLoss(nn.Module):
    """A network that returns its loss.

    Args:
        reduction: That of the loss; ``"none"`` for the losses of examples.
    """

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.layers(x)
        return scores.detach(), nn.functional.cross_entropy(scores, y, reduction=self.reduction)


def trained(
    wrapper: dict[str, Any] | None, *, inside: bool = False, reduction: str = "mean"
) -> Tensor:
    """The parameters after some steps; the optimizer may get the module inside of the wrapper."""
    module = WithLoss(reduction)
    model = module if wrapper is None else DistributedDataParallel(module, **wrapper)
    opt = KFAC(module if inside else model, fisher="exact")
    for number in range(3):
        torch.manual_seed(number)
        opt.zero_grad()
        _, loss = model(torch.randn(12, 4).double(), torch.randint(3, (12,)))
        opt.observe(0.5 * loss.mean()).backward()
        opt.step()
    return weights(module)


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda own: next(iter(own), "plain"))
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_observed_loss_of_a_wrapper_is_that_of_its_module(
    wrapper: dict[str, Any], inside: bool, reduction: str
) -> None:
    found = trained(wrapper, inside=inside, reduction=reduction)
    torch.testing.assert_close(found, trained(None), rtol=1e-9, atol=0)
