"""Models whose forward pass copies layers, or asks what its parameters are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (24,), generator=GENERATOR)
MODES: list[dict[str, Any]] = [
    {"fisher": "exact"},
    {"fisher": "exact", "safeguard": True},
    {"fisher": "exact", "curvature_fraction": 0.5},
    {"fisher": "exact", "adaptive": False, "lr": 0.1},
]
Copied = Callable[[nn.Module, nn.Module], nn.Module]


def by_deepcopy(part: nn.Module, _: nn.Module) -> nn.Module:
    return deepcopy(part)


def by_pickle(part: nn.Module, _: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(part))
    return found


def by_state(part: nn.Module, other: nn.Module) -> nn.Module:
    other.load_state_dict(part.state_dict())
    return other


class Taught(nn.Module):
    """The output of a part, beside that of a frozen copy of it.

    Args:
        make: Makes the part.
        copied: Returns a copy of it, perhaps in another module of its kind.
    """

    def __init__(self, make: Callable[[], nn.Module], copied: Copied) -> None:
        super().__init__()
        self.first, self.part, self.copied = nn.Linear(5, 4), make(), copied
        self.double()
        self.other = [make().double()]  # no part of the model

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        frozen = self.copied(self.part, self.other[0]).requires_grad_(False)
        result: Tensor = self.part(hidden) + 0.5 * frozen(hidden)
        return result


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layer(x.unflatten(1, (2, 2)))
        last: Tensor = outputs[:, -1]
        return last


PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(6, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 1, 2), nn.Flatten()
    ),
    "normalized": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 3)
    ),
    "on batch statistics": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "recurrent": Last,
}


def trained(part: str, copied: Copied, options: dict[str, Any]) -> Tensor:
    """The weights after some steps."""
    torch.manual_seed(0)
    model, loss_fn = Taught(PARTS[part], copied), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for _ in range(2):
        opt.zero_grad()
        loss_fn(model(X), Y).backward()
        opt.step()
    return weights(model)


WAYS = by_deepcopy, by_pickle
HALF = [
    (part, WAYS[(i + j) // 2 % 2], options)
    for i, part in enumerate(PARTS)
    for j, options in enumerate(MODES)
    if (i + j) % 2 == 0
    if part != "on batch statistics" or "curvature_fraction" not in options
]
"""Each part in half of the modes where its examples are separate; the copies in turn."""


@pytest.mark.parametrize(("part", "copied", "options"), HALF)
@pytest.mark.filterwarnings("error", "ignore:Kronecker factors cover:UserWarning")
def test_a_copied_layer_is_constant(part: str, copied: Copied, options: dict[str, Any]) -> None:
    """As one that is no part of the model: nothing of the replay is copied with the layer."""
    found, expected = (trained(part, own, options) for own in (copied, by_state))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
