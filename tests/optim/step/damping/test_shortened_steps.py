"""Steps that are shortened until the loss falls leave the damping alone, once it is the first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

PATCHES, WIDTH, CLASSES = 9, 16, 4


class SmallWeights(nn.Module):
    """A vision transformer as it starts: its last normalisation sees a sum of small numbers.

    The loss is far from quadratic along steps of any layer but the last ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, WIDTH)
        self.token = nn.Parameter(1e-6 * torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, PATCHES + 1, WIDTH))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, 0.0, **options)  # type: ignore[arg-type]
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


def test_the_damping_does_not_outgrow_the_first_one() -> None:
    torch.manual_seed(0)
    model, loss_fn = SmallWeights().double(), nn.CrossEntropyLoss()
    y = torch.arange(12) % CLASSES
    x = (torch.randn(12, PATCHES, 12) + y[:, None, None] / 2).double()
    opt, dampings, ratios = KFAC(model, loss_fn), [], []
    for _ in range(20):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
        dampings.append(opt.statistics()["damping"])
        ratios.append(opt.statistics()["ratio"])
    assert min(ratios) < 0  # steps were shortened
    for before, after, ratio in zip(dampings, dampings[1:], ratios):
        assert not (ratio < 0 and before >= dampings[0] and after > before)
    assert max(dampings) < 8 * dampings[0]
    assert loss_fn(model(x), y) < 1.2
