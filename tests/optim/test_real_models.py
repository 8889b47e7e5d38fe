"""KFAC trains real models: on its automatic defaults, and with fixed rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import train_step
from real_models import MODELS, random, unet
from torch import Tensor, nn

from einconv_kfac import KFAC

Case = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]


def classifier(name: str) -> Case:
    model, x, _ = MODELS[name]()
    return labelled(model, x)


def labelled(model: nn.Module, x: Tensor) -> Case:
    """Add random classes, one for each output position."""
    model = model.double()
    with torch.no_grad():
        shape = model.eval()(x).argmax(1).shape
    y = torch.randint(3, shape, generator=torch.Generator().manual_seed(1))
    return model.train(), nn.CrossEntropyLoss(), (x, y)


def autoencoder() -> Case:
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1)]
    x = (random(4, 1, 8, 8).cumsum(-1) > 0).double()
    return nn.Sequential(*layers).double(), nn.BCEWithLogitsLoss(), (x, x)


def regression() -> Case:
    layers = [nn.Linear(5, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 2)]
    x = random(12, 5)
    return nn.Sequential(*layers).double(), nn.MSELoss(), (x, x[:, :2].square())


class Words(nn.Module):
    """Classes of short texts: an embedding, and a recurrent layer without Kronecker factors."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.middle = nn.GRU(6, 6, batch_first=True) if recurrent else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x if self.middle is None else self.middle(x)[0]
        return self.head(x.mean(1))


def words(recurrent: bool) -> Case:
    tokens = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(0))
    return labelled(Words(recurrent), tokens)


CASES: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: classifier(name) for name in MODELS},
    "unet-2d": lambda: labelled(*unet(2)[:2]),
    "autoencoder": autoencoder,
    "regression": regression,
    "embedding": lambda: words(recurrent=False),
    "recurrent": lambda: words(recurrent=True),
}

FIXED = {"lr": 0.1, "adaptive": False}
IN_TURN = [
    pytest.param(name, options, id=f"{name}-{'fixed' if options else 'auto'}")
    for index, name in enumerate(CASES)
    for options in ([{}, FIXED] if index % 2 else [{}])
]
"""All models automatically, every second one with fixed rates as well."""


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize(("name", "options"), IN_TURN)
def test_four_steps_reduce_the_loss(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, loss_fn, batch = CASES[name]()
    opt = KFAC(model, loss_fn, **options)
    losses = [train_step(model, loss_fn, opt, batch) for _ in range(4)]
    assert opt._preconditioner.steps == 4
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.tensor(losses).isfinite())
