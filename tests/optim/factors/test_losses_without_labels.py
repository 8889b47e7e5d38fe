"""A loss of whose labels none counts adds nothing to a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Generator, Tensor, nn

from einconv_kfac import KFAC

FIXED: dict[str, Any] = {"adaptive": False, "lr": 0.1, "damping": 0.03, "kl_clip": None}
MODES: list[dict[str, Any]] = [
    {"fisher": "exact"},
    {**FIXED, "fisher": "exact"},
    {**FIXED, "fisher": "exact", "inverse": "ekfac"},
    {**FIXED, "fisher": "empirical"},
]
LOSSES: dict[str, dict[str, Any]] = {
    "ignored": {"ignore_index": 2, "reduction": "sum"},
    "without weight": {"weight": torch.tensor([1.0, 1.0, 0.0]).double(), "reduction": "sum"},
}


def trained(mode: dict[str, Any], loss_fn: nn.Module, paddings: int) -> Tensor:
    """Return the weights after four steps, with batches of padding between those that count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = KFAC(model, **mode)
    generator = Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (12,), generator=generator)
    for _ in range(4):
        opt.zero_grad()
        opt.observe(loss_fn(model(x), y) / 12).backward()
        for index in range(paddings):
            other = loss_fn(model((index + 2) * x[:7]), torch.full((7,), 2))
            opt.observe(other / 12).backward()
        opt.step()
    return weights(model)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_as_absent(mode: dict[str, Any], options: dict[str, Any]) -> None:
    loss_fn = nn.CrossEntropyLoss(**options)
    expected = trained(mode, loss_fn, 0)
    torch.testing.assert_close(trained(mode, loss_fn, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss, nn.L1Loss], ids=["labels", "targets"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_examples_is_as_absent(mode: dict[str, Any], loss_fn: Any) -> None:
    found = []
    for sizes in ((7,), (7, 0), (0, 7)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt, total = KFAC(model, **mode), loss_fn(reduction="sum")
        for number in range(3):
            opt.zero_grad()
            for size in sizes:
                x = torch.randn(size, 4, generator=Generator().manual_seed(number)).double()
                is_class = isinstance(total, nn.CrossEntropyLoss)
                y = torch.arange(size) % 3 if is_class else x[:, :3]
                opt.observe(total(model(x), y) / 7).backward()
            opt.step()
        found.append(weights(model))
    for own in found[1:]:
        torch.testing.assert_close(own, found[0], rtol=1e-12, atol=1e-12)
