"""Bags of embeddings: torch's operator has no forward mode, and is differentiable only once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, jvp

from einconv_kfac import KFAC
from einconv_kfac.optim.replay.bags import native_embeddings
from einconv_kfac.optim.replay.substitution import substituted
from tests.optim_cases import train_step

ENTRIES = torch.tensor([[0, 1, 1, 2], [3, 2, 0, 4], [5, 5, 5, 1]])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mode": "sum"},
    {"mode": "max"},
    {"mode": "max", "padding_idx": 5},
    {"padding_idx": 1},
    {"mode": "sum", "padding_idx": 5},
    {"include_last_offset": True},
]


def calls(options: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return arguments: a matrix, and bags by offset, of which one is empty."""
    ends = [12] * options.get("include_last_offset", 0)
    by_offset = ENTRIES.flatten(), {"offsets": torch.tensor([0, 3, 3, 7, *ends])}
    found: list[tuple[Tensor, dict[str, Tensor]]] = (
        [by_offset] if ends else [(ENTRIES, {}), by_offset]
    )
    if options.get("mode") == "sum":
        weights = [torch.rand(x.shape, dtype=torch.float64) for x, _ in found]
        found += [(x, {**own, "per_sample_weights": w}) for (x, own), w in zip(found, weights)]
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_bag_has_the_values_and_the_jacobian_of_torchs(options: dict[str, Any]) -> None:
    model = nn.EmbeddingBag(6, 3, **options).double()
    weight, direction = model.weight.detach(), torch.randn(6, 3, dtype=torch.float64)
    for x, keywords in calls(options):
        output = partial(_output, model, x, keywords)
        jac = jacobian(output, weight)  # type: ignore[no-untyped-call]
        expected = output(weight), torch.einsum("neab,ab->ne", jac, direction)
        with substituted(native_embeddings([*model.modules()])):
            found = jvp(output, (weight,), (direction,))
        torch.testing.assert_close(found, expected)


def _output(model: nn.Module, x: Tensor, keywords: dict[str, Tensor], weight: Tensor) -> Tensor:
    result: Tensor = functional_call(model, {"weight": weight}, (x,), keywords)
    return result


class MeanOfEmbeddings(nn.EmbeddingBag):
    """What a bag computes, in operations that have all derivatives."""

    def forward(self, *args: Any) -> Tensor:
        """Return the mean of the embeddings of each row."""
        return nn.functional.embedding(args[0], self.weight).mean(1)


def _losses(bag: type[nn.EmbeddingBag], exclude: list[str]) -> list[float]:
    """Return the losses of twelve steps on new batches."""
    torch.manual_seed(0)
    model = nn.Sequential(bag(20, 6), nn.Linear(6, 3)).double()
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, exclude=exclude)
    losses = []
    for _ in range(12):
        x = torch.randint(20, (32, 5))
        losses.append(train_step(model, loss_fn, opt, (x, x.sum(1) % 3)))
    return losses


def test_a_classifier_of_bags_takes_the_steps_of_its_spelled_out_twin() -> None:
    found = _losses(nn.EmbeddingBag, ["0"])
    assert found == pytest.approx(_losses(MeanOfEmbeddings, ["0"]), rel=1e-9)


def test_a_classifier_of_bags_trains_with_factors() -> None:
    losses = _losses(nn.EmbeddingBag, [])
    assert min(losses[6:]) < losses[0]


def test_options_that_change_the_weight_are_left_to_torch() -> None:
    bags = [nn.EmbeddingBag(4, 2, max_norm=1.0), nn.EmbeddingBag(4, 2, scale_grad_by_freq=True)]
    assert not native_embeddings(bags)
